"""Alignment to V-JEPA 2, the semantic discriminator and the terms of the GAN step. All encoders are random."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tokenizer.common.distributed import BatchShard
from tokenizer.common.errors import UserError
from tokenizer.frozen.encoders import FeatureShape, FrozenConfig
from tokenizer.losses.gan import (
    DiscriminatorConfig,
    Gan,
    Head,
    LocalBatchNorm,
    PatchDiscriminatorConfig,
    SemanticDiscriminator,
    SemanticDiscriminatorConfig,
    frozen,
    generator_loss,
)
from tokenizer.losses.objective import Alignment, AlignmentConfig, AlignmentHead, alignment_loss
from tokenizer.model import VideoTokenizer
from tokenizer.presets import PRESETS

pytest.importorskip("transformers")

CPU = torch.device("cpu")
RANDOM = FrozenConfig(random_for_tests="tiny", precision="none")
DEBUG = PRESETS["VQ_debug"]  # 4 x 4 x 4 cells of width 48


def clips(num_clips: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(num_clips, 3, 16, 32, 32, generator=torch.Generator().manual_seed(seed))


def tokenizer() -> VideoTokenizer:
    torch.manual_seed(0)
    return VideoTokenizer(DEBUG)


LENGTHS = torch.tensor([[8, 4, 2, 2], [2, 2, 4, 8]])


# --- alignment ------------------------------------------------------------------------------------------------------


def test_alignment_loss_by_hand() -> None:
    guess = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, -2.0]]])
    target = torch.tensor([[[6.0, 8.0], [0.0, 5.0], [0.0, 1.0]]])  # cosines 1, 0, -1
    assert float(alignment_loss(guess, target)) == pytest.approx(0.0, abs=1e-6)
    assert float(alignment_loss(guess[:, :2], target[:, :2])) == pytest.approx(-0.5)


def test_a_cell_answers_for_its_own_places() -> None:
    """Two time slots and 2 x 2 places for each of the 4 x 4 x 4 cells: cell c's numbers land where cell c lies."""
    head = AlignmentHead(AlignmentConfig(layer=1, hidden=8), DEBUG, FeatureShape(8, 8, 5))
    head.mlp, head.to_places = nn.Identity(), nn.Linear(48, 2 * 2 * 2 * 5)
    nn.init.constant_(head.to_places.weight, 1 / 48)
    nn.init.zeros_(head.to_places.bias)
    cell_B64 = torch.arange(64.0)[None]
    guess_BSE = head(cell_B64[..., None].expand(-1, -1, 48))
    assert guess_BSE.shape == (1, 8 * 8 * 8, 5)
    found = guess_BSE[0, :, 0].view(8, 8, 8)
    wanted = cell_B64.view(4, 4, 4)
    for axis in range(3):
        wanted = wanted.repeat_interleave(2, dim=axis)
    assert torch.allclose(found, wanted, atol=1e-4)
    # inside a cell, the numbers of the linear layer stand as (slot, row, column, feature)
    head.to_places.weight.data.zero_()
    head.to_places.bias.data = torch.arange(40.0)
    guess = head(torch.zeros(1, 64, 48))[0].view(8, 8, 8, 5)
    assert torch.equal(guess[:2, :2, :2].flatten(), torch.arange(40.0))


def test_the_tokenizer_hands_out_features_after_the_layer_that_was_asked_for() -> None:
    model = tokenizer()
    plain = model(clips(), LENGTHS)
    first, last = (model(clips(), LENGTHS, layer) for layer in (1, 2))
    assert plain.feature_BMD is None and first.feature_BMD.shape == (2, 64, 48)
    assert torch.equal(plain.video_BCTHW, first.video_BCTHW)
    assert torch.equal(model.to_video(last.feature_BMD), last.video_BCTHW)
    assert not torch.equal(first.feature_BMD, last.feature_BMD)


def test_alignment_teaches_head_and_decoder_up_to_its_layer() -> None:
    model, alignment = tokenizer(), Alignment(AlignmentConfig(layer=1, hidden=16, encoder=RANDOM), DEBUG, CPU)
    alignment.term(model(clips(), LENGTHS, 1).feature_BMD, clips()).backward()
    assert [n for n, p in alignment.head.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is not None for p in model.decoder[0].parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.decoder[1].parameters())


def test_alignment_learns() -> None:
    """The head alone, on fixed features of the decoder, turns towards the features of the clip."""
    model, alignment = tokenizer(), Alignment(AlignmentConfig(layer=1, hidden=32, encoder=RANDOM), DEBUG, CPU)
    with torch.no_grad():
        feature_BMD = model(clips(), LENGTHS, 1).feature_BMD
    optimizer = torch.optim.Adam(alignment.head.parameters(), lr=1e-2)
    values = []
    for _ in range(30):
        loss = alignment.term(feature_BMD, clips())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.3


def test_shapes_that_do_not_meet_are_refused() -> None:
    with pytest.raises(UserError, match="8 x 6 x 6 features"):
        AlignmentHead(AlignmentConfig(layer=1), DEBUG, FeatureShape(8, 6, 5))
    with pytest.raises(UserError, match="the decoder has 2 layers"):
        AlignmentHead(AlignmentConfig(), DEBUG, FeatureShape(8, 8, 5))
    with pytest.raises(UserError, match="alignment.layer = 0"):
        AlignmentConfig(layer=0)


# --- the semantic discriminator -------------------------------------------------------------------------------------


def test_local_batch_norm_looks_at_eight_clips_at_a_time() -> None:
    norm = LocalBatchNorm(3)
    x_BES = torch.randn(12, 3, 5, generator=torch.Generator().manual_seed(0)) * 4 + 1
    y_BES = norm(x_BES)
    for group in (slice(0, 8), slice(8, 12)):
        mean = x_BES[group].mean(dim=(0, 2), keepdim=True)
        variance = x_BES[group].var(dim=(0, 2), keepdim=True, correction=0)
        assert torch.allclose(y_BES[group], (x_BES[group] - mean) / (variance + 1e-5).sqrt(), atol=1e-5)
    assert torch.equal(norm.eval()(x_BES), y_BES)  # no running statistics: training and judging are alike


def test_a_head_by_hand() -> None:
    """Width 1 and unit kernels: the norm makes -1, 1 of two places, LeakyReLU -0.2, 1; then the ring of three."""
    head = Head(1, 3)
    for conv, weight in ((head.first.conv, 2.0), (head.second.conv, 1.0), (head.to_logit, -3.0)):
        conv.parametrizations.weight.original.data.fill_(weight)
        settled = [conv.weight for _ in range(3)]  # each look in training mode is a step of the power iteration
        assert torch.allclose(settled[-1].norm(), torch.ones(()))
    head.to_logit.bias.data.fill_(0.5)
    place_BSE = torch.tensor([[[1.0], [1.0], [3.0], [3.0]]])
    x = torch.tensor([-0.2, -0.2, 1.0, 1.0])
    ring = (x.roll(1) + x + x.roll(-1)) / 3**0.5  # spectral norm: a kernel of three ones has norm sqrt(3)
    y = (ring - ring.mean()) / ring.std(correction=0)
    head.eval()
    wanted = -1.0 * (x + torch.where(y > 0, y, 0.2 * y)) / 2**0.5 + 0.5  # of -3 the spectral norm leaves the sign
    assert torch.allclose(head(place_BSE)[0], wanted, atol=1e-4)


def test_spectral_norm_holds_every_convolution_to_1() -> None:
    torch.manual_seed(0)
    head = Head(16, 9)
    for conv in (head.first.conv, head.second.conv, head.to_logit):
        for _ in range(50):
            weight = conv.weight
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2) == pytest.approx(1, abs=1e-2)


def test_it_judges_every_place_at_every_tap_and_saves_its_heads_alone() -> None:
    gan = Gan(DiscriminatorConfig("videomae", videomae=SemanticDiscriminatorConfig(encoder=RANDOM)), 16, 32, 0, CPU)
    video_BCTHW = clips().requires_grad_()
    logits_BK = gan.discriminator(video_BCTHW)
    assert logits_BK.shape == (2, 5 * 8 * 4 * 4)
    logits_BK.square().sum().backward()
    assert video_BCTHW.grad is not None and video_BCTHW.grad.abs().amin(dim=(1, 3, 4)).all()
    assert {name.split(".")[1] for name in gan.module.state_dict() if "discriminator" in name} == {"heads"}


def test_the_semantic_discriminator_has_the_papers_size() -> None:
    config = SemanticDiscriminatorConfig()
    with torch.device("meta"):
        heads = nn.ModuleList(Head(768, config.kernel) for _ in config.taps)
    assert sum(p.numel() for p in heads.parameters()) == pytest.approx(29.6e6, rel=0.01)


@pytest.mark.parametrize("wrong", [{"kernel": 8}, {"taps": [0, 0]}])
def test_impossible_heads_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError):
        SemanticDiscriminatorConfig(**wrong)


# --- the discriminator's side of the GAN loss -----------------------------------------------------------------------

NETS = {
    "patch": {"patch": PatchDiscriminatorConfig(layers=1, width=16, heads=2)},
    "videomae": {"videomae": SemanticDiscriminatorConfig(taps=[0, 3], encoder=RANDOM), "augment": True},
}


def gan_of(net: str, **settings: object) -> Gan:
    torch.manual_seed(0)
    return Gan(DiscriminatorConfig(net, **{"every": 1} | NETS[net] | settings), 16, 32, 0, CPU)


def terms(
    gan: Gan, real: Tensor, fake: Tensor, step: int, shard: BatchShard | None = None
) -> tuple[Tensor, Tensor, dict]:
    """The generator's term, and the discriminator's loss with its figures."""
    with frozen(gan.module):
        term = generator_loss(gan.config.loss, gan.judge(fake, "generator", step, shard))
    real_BK, fake_BK = gan.judge(real, "real", step, shard), gan.judge(fake.detach(), "fake", step, shard)
    return term, *gan.loss(real_BK, fake_BK, step, shard)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("net", ["patch", "videomae"])
def test_the_generators_term_leaves_the_discriminator_as_it_is(net: str) -> None:
    model, gan = tokenizer(), gan_of(net)
    before = state_of(gan.module)
    fake = model(clips(), LENGTHS).video_BCTHW
    with frozen(gan.module):
        generator_loss("non_saturating", gan.judge(fake, "generator", 0)).backward()
    assert all(p.grad is None and p.requires_grad for p in gan.discriminator.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert gan.module.training and same(before, gan.module.state_dict())  # not even spectral norm has moved


def test_gan_training_starts_and_rests_by_the_step() -> None:
    gan = gan_of("patch", start_step=3, every=2)
    assert [(gan.started(step), gan.learns(step)) for step in range(8)] == [
        (step >= 3, step in (3, 5, 7)) for step in range(8)
    ]


def test_the_steps_terms_by_hand() -> None:
    """A head with logit 2 everywhere: softplus(-2) for the tokenizer; the discriminator is right about half of it."""
    gan, video_BCTHW = gan_of("patch", label_noise=0.0, lecam=0.5), clips()
    gan.discriminator.head.weight.data.zero_()
    gan.discriminator.head.bias.data.fill_(2.0)
    softplus = torch.nn.functional.softplus(torch.tensor([2.0, -2.0]))
    term, total, figures = terms(gan, video_BCTHW, video_BCTHW, 0)
    assert term.item() == pytest.approx(float(softplus[1]))
    assert float(figures["gan"]) == pytest.approx(float(softplus.mean()))
    assert float(figures["accuracy"]) == 0.5 and float(figures["logit_gap"]) == 0.0
    # the means have moved to 0.9 * 2: relu(2 - 1.8) and relu(1.8 - 2)
    assert float(figures["lecam"]) == pytest.approx(0.2**2, rel=1e-4)
    assert total.item() == pytest.approx(float(softplus.mean()) + 0.5 * 0.2**2)  # its weight counts once


def test_draws_depend_on_seed_and_step_alone() -> None:
    def losses(step: int) -> list[float]:
        gan = gan_of("videomae")
        torch.manual_seed(step + 100)
        return [each.item() for each in terms(gan, clips(), clips(seed=1), step)[:2]]

    assert losses(4) == losses(4) != losses(5)


@pytest.mark.parametrize("net", ["patch", "videomae"])
def test_draws_for_a_clip_are_the_same_on_two_processes_as_on_one(net: str) -> None:
    """Labels and augmentation belong to the place in the global batch: two halves have the mean of the whole."""
    one, fake = clips(4), clips(4, seed=1)

    def losses(shard: BatchShard) -> list[float]:
        gan = gan_of(net, lecam=0.0)
        for module in gan.module.modules():
            if isinstance(module, LocalBatchNorm):
                module.forward = lambda x_BES: x_BES  # type: ignore[method-assign]  # it looks at a whole group
        return [each.item() for each in terms(gan, one[shard.rows], fake[shard.rows], 0, shard)[:2]]

    halves = [losses(BatchShard(own, 4)) for own in ([0, 3], [1, 2])]
    wanted = losses(BatchShard([0, 1, 2, 3], 4))
    assert [(a + b) / 2 for a, b in zip(*halves, strict=True)] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"net": "conv"}, "'conv'"),
        ({"net": "patch", "loss": "hinge"}, "label_noise=0"),
        ({"net": "patch", "every": 0}, "every"),
        ({"net": "patch", "label_noise": 0.5}, "label_noise"),
        ({"net": "patch", "videomae": SemanticDiscriminatorConfig(kernel=3)}, "does not read it"),
    ],
)
def test_impossible_discriminator_settings_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        DiscriminatorConfig(**wrong)


def test_a_semantic_discriminator_needs_sixteen_frames() -> None:
    with pytest.raises(UserError, match="16 frames, not of 8"):
        SemanticDiscriminator(SemanticDiscriminatorConfig(), gan_of("videomae").encoder, 8)
