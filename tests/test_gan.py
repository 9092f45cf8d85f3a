"""The losses of the adversarial game by hand, the augmentation, and the patch discriminator."""

import math

import pytest
import torch
from torch import Tensor

from tokenizer.common.errors import UserError
from tokenizer.losses.gan import (
    CUTOUT,
    SHIFT,
    LeCam,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    augment_clips,
    discriminator_loss,
    generator_loss,
)

TINY = PatchDiscriminatorConfig(layers=1, width=16, heads=2)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# --- losses ---------------------------------------------------------------------------------------------------------


def test_non_saturating_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
    # against clean labels: softplus(-real) and softplus(fake)
    wanted = ((softplus(-2) + softplus(0)) / 2 + (softplus(-1) + softplus(1)) / 2) / 2
    assert float(discriminator_loss("non_saturating", real, fake, 0.0, draws())) == pytest.approx(wanted, rel=1e-6)
    assert float(generator_loss("non_saturating", fake)) == pytest.approx((softplus(1) + softplus(-1)) / 2, rel=1e-6)


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[-3.0, 1.0]])
    assert float(discriminator_loss("hinge", real, fake, 0.3, draws())) == (0.5 + 1.0) / 2  # (0 + 1)/2 and (0 + 2)/2
    assert float(generator_loss("hinge", fake)) == 1.0


def test_noisy_labels_stay_on_their_own_side() -> None:
    """d loss / d logit = (sigmoid - label) / count, so the gradient at logit 0 tells every label."""
    real, fake = torch.zeros(40, 50, requires_grad=True), torch.zeros(40, 50, requires_grad=True)
    discriminator_loss("non_saturating", real, fake, 0.3, draws()).backward()
    assert real.grad is not None and fake.grad is not None
    real_label, fake_label = (0.5 - 2 * grad * grad.numel() for grad in (real.grad, fake.grad))
    assert 0.7 - 1e-5 <= float(real_label.min()) < 0.71 and 0.99 < float(real_label.max()) <= 1 + 1e-5
    assert -1e-5 <= float(fake_label.min()) < 0.01 and 0.29 < float(fake_label.max()) <= 0.3 + 1e-5
    opinion = torch.randn(40, 50, generator=draws())
    losses = [discriminator_loss("non_saturating", opinion, opinion, 0.3, draws(seed)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("kind", ["non_saturating", "hinge"])
def test_each_side_wants_the_opposite_of_a_reconstruction(kind: str) -> None:
    real, fake = torch.zeros(3, 4), torch.zeros(3, 4, requires_grad=True)
    (grad_of_discriminator,) = torch.autograd.grad(discriminator_loss(kind, real, fake, 0.3, draws()), fake)
    (grad_of_generator,) = torch.autograd.grad(generator_loss(kind, fake), fake)
    assert (grad_of_discriminator > 0).all() and (grad_of_generator < 0).all()


def test_lecam_by_hand() -> None:
    lecam = LeCam()
    lecam.update(torch.tensor([[2.0, 4.0]]), torch.tensor([[-1.0, -3.0]]))
    assert (float(lecam.real_mean), float(lecam.fake_mean)) == pytest.approx((0.9 * 3, 0.9 * -2))  # decay 0.1 at first
    # relu(real - mean fake): 1.8 + 1 and relu(1.8 - 4) = 0; relu(mean real - fake): 2.7 - 0.7 and relu(2.7 - 5) = 0
    value = lecam(torch.tensor([[1.0, -4.0]]), torch.tensor([[0.7, 5.0]]))
    assert float(value) == pytest.approx((2.8**2 + 0) / 2 + (2.0**2 + 0) / 2)
    lecam.update(torch.tensor([[0.0]]), torch.tensor([[0.0]]))
    assert float(lecam.real_mean) == pytest.approx(2.7 * 2 / 11)  # decay (1 + 1) / (10 + 1)
    lecam.num_updates.fill_(1e6)
    lecam.update(torch.tensor([[0.0]]), torch.tensor([[0.0]]))
    assert float(lecam.real_mean) == pytest.approx(2.7 * 2 / 11 * 0.999)


def test_lecam_pulls_logits_back_and_learns_no_mean() -> None:
    lecam, real, fake = LeCam(), torch.full((2, 3), 5.0, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    lecam.update(real, fake)
    lecam(real, fake).backward()
    assert real.grad is not None and (real.grad > 0).all()  # descent lowers the logits of real clips
    assert not any(buffer.requires_grad for buffer in lecam.buffers())


# --- augmentation ---------------------------------------------------------------------------------------------------


def moving_clips(num_clips: int = 6, side: int = 40) -> Tensor:
    return torch.rand(num_clips, 3, 4, side, side, generator=draws(5))


def test_every_frame_of_a_clip_is_altered_alike() -> None:
    still = moving_clips()[:, :, :1].expand(-1, -1, 4, -1, -1)
    seen = augment_clips(still, draws())
    assert all(torch.equal(seen[:, :, t], seen[:, :, 0]) for t in range(4))
    assert not torch.allclose(seen, still, atol=0.05)
    same = augment_clips(still[:1].expand(6, -1, -1, -1, -1), draws())
    assert len({round(float(clip.mean()), 5) for clip in same}) == 6  # each clip by its own draw


def test_augmentation_draws_from_its_generator_alone_and_passes_gradients() -> None:
    clips = moving_clips().requires_grad_()
    seen = augment_clips(clips, draws())
    torch.manual_seed(1)
    assert torch.equal(seen, augment_clips(clips, draws())) and not torch.equal(seen, augment_clips(clips, draws(1)))
    seen.sum().backward()
    assert clips.grad is not None and clips.grad.isfinite().all()


def test_colour_alone_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With draws of 1: + 0.25, saturation 2, contrast 1.5; of a grey clip only its brightness changes."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.ones(shape))
    monkeypatch.setattr("tokenizer.losses.gan._shift", lambda x, draw: x)
    monkeypatch.setattr("tokenizer.losses.gan._cut_hole", lambda x, draw: x)
    grey = torch.full((1, 3, 2, 4, 4), 0.3)
    assert torch.allclose(augment_clips(grey, draws()), grey + 0.25)
    # one red pixel value 0.6 above its grey: (r, g, b) = (0.4, -0.2, -0.2) around grey, mean of the clip = its grey
    red = torch.tensor([0.9, 0.3, 0.3]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 4, 4)
    wanted = 0.5 + 0.25 + torch.tensor([0.4, -0.2, -0.2]) * 2 * 1.5
    assert torch.allclose(augment_clips(red, draws())[0, :, 0, 0, 0], wanted)


def test_the_shift_moves_whole_pixels_and_the_hole_is_a_fifth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.losses.gan._recolour", lambda x, draw: x)
    side = 40
    white = torch.ones(8, 3, 4, side, side)
    grey_share = (augment_clips(white, draws()) == 0.5).float().mean(dim=(1, 2, 3, 4))
    far = round(side * SHIFT)
    assert float(grey_share.max()) <= 1 - (1 - far / side) ** 2 + CUTOUT**2 + 1e-6
    assert float(grey_share.min()) > 0

    monkeypatch.setattr("tokenizer.losses.gan._cut_hole", lambda x, draw: x)
    clips = moving_clips(8, side)
    shifts = set()
    for clip, seen in zip(clips, augment_clips(clips, draws()), strict=True):
        padded = torch.nn.functional.pad(clip, (far,) * 4, value=0.5)
        places = [
            (y, x)
            for y in range(2 * far + 1)
            for x in range(2 * far + 1)
            if torch.allclose(padded[..., y : y + side, x : x + side], seen, atol=1e-6)
        ]
        assert len(places) == 1
        shifts.add(places[0])
    assert len(shifts) > 4


# --- the patch discriminator ----------------------------------------------------------------------------------------


def test_the_patch_discriminator_judges_every_patch() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(TINY, 8, 32)
    clips = torch.rand(2, 3, 8, 32, 32, generator=draws()).requires_grad_()
    logits = model(clips)
    assert logits.shape == (2, 2 * 4 * 4)
    assert torch.allclose(logits[1:], model(clips[1:]), atol=1e-6)  # each clip by itself
    logits.square().sum().backward()
    assert clips.grad is not None and clips.grad.abs().amin(dim=(2, 3, 4)).all()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_patch_discriminator_tells_places_apart_and_sees_far() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(TINY, 8, 32)
    flat = torch.full((1, 3, 8, 32, 32), 0.5)
    assert len(model(flat)[0].unique()) == 32  # positions alone make the difference
    changed = flat.clone()
    changed[..., :4, :8, :8] = 1.0  # the first patch
    assert (model(changed)[0] != model(flat)[0]).all()


def test_the_patch_discriminator_has_the_papers_size() -> None:
    with torch.device("meta"):
        model = PatchDiscriminator(PatchDiscriminatorConfig(), 16, 128)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(38.2e6, rel=0.01)
    assert "position_MD" not in model.state_dict()


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"width": 20}, {"width": 24, "heads": 5}, {"mlp_ratio": 0.0}])
def test_impossible_discriminators_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        PatchDiscriminatorConfig(**wrong)


def test_clips_that_are_no_whole_number_of_patches_are_refused() -> None:
    with pytest.raises(UserError, match="18 frames of 32 pixels"):
        PatchDiscriminator(TINY, 18, 32)
