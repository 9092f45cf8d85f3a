"""The second player: a discriminator with its own optimiser, steps and random draws (paper.md section 3).

    generator's step       term(fake, step): the discriminator judges, its own weights stand still
    discriminator's step   loss(batch, step): it learns from the clips and reconstructions of that very step, detached

Neither step touches the other's weights. Letters: B clips, C T H W, K places judged in a clip.

What the two sides of the adversarial game minimise, on plain logits (paper.md section 3).

    discriminator   says "real" (a high logit) of training clips and "fake" of reconstructions
    generator       the tokenizer: its reconstructions should be called real

A discriminator judges many places of a clip; every place counts alike. All of it runs in float32.

Letters: B clips, K places that a discriminator judges in a clip.

Differentiable augmentation in front of a discriminator: it sees altered clips only, real and reconstructed.

A discriminator on top of a frozen network would otherwise learn the few training clips by heart. Colour, shift and a
hole, drawn once for a clip and the same in all its frames, so that its motion stays true (paper.md section 3).

Letters: B clips, C T H W.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.common.device import generator_for
from tokenizer.common.distributed import Places, mean_over_ranks
from tokenizer.common.errors import UserError
from tokenizer.frozen.encoders import FrozenVideoMAE
from tokenizer.losses.discriminators import (
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    SemanticDiscriminator,
    SemanticDiscriminatorConfig,
)
from tokenizer.training.optim import OptimConfig

LOSSES = ("non_saturating", "hinge")
_LECAM_DECAY = 0.999


def discriminator_loss(
    kind: str,
    real_BK: Tensor,
    fake_BK: Tensor,
    label_noise: float,
    generator: torch.Generator,
    places: Places | None = None,
) -> Tensor:
    """What the discriminator minimises: the mean of its losses on both sides, a scalar.

    non_saturating: binary cross-entropy against noisy labels, drawn anew for every place from [1 - label_noise, 1] for
    real clips and from [0, label_noise] for reconstructions: each moves to its own side only, never across.
    hinge: relu(1 - real) and relu(1 + fake); it knows no labels and draws nothing.
    places: where the clips stand in the global batch, if they are not all of it.
    """
    real_BK, fake_BK = real_BK.float(), fake_BK.float()
    if kind == "hinge":
        return (F.relu(1 - real_BK).mean() + F.relu(1 + fake_BK).mean()) / 2
    places = places or Places(list(range(len(real_BK))), len(real_BK))
    shape = (2, places.total, real_BK.shape[1])  # drawn for all clips, so that processes draw what one would
    real_noise_BK, fake_noise_BK = (
        places.pick(noise).to(real_BK.device) for noise in torch.rand(shape, generator=generator) * label_noise
    )
    real = F.binary_cross_entropy_with_logits(real_BK, 1 - real_noise_BK)
    return (real + F.binary_cross_entropy_with_logits(fake_BK, fake_noise_BK)) / 2


def generator_loss(kind: str, fake_BK: Tensor) -> Tensor:
    """What the tokenizer minimises, a scalar: -log sigmoid(fake), or with hinge -fake. Its labels are never noisy."""
    fake_BK = fake_BK.float()
    return -fake_BK.mean() if kind == "hinge" else F.softplus(-fake_BK).mean()


class LeCam(nn.Module):
    """Keeps a discriminator from running away: its logits stay near slow means of what it said of the *other* side.

    The means have decay 0.999, ramping up from 0.1 as (1 + n) / (10 + n), so that the first clips do not count against
    zeros.
    """

    real_mean: Tensor
    fake_mean: Tensor
    num_updates: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("real_mean", "fake_mean", "num_updates"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def update(self, real_BK: Tensor, fake_BK: Tensor) -> None:
        """Take one batch, of all processes together, into the means."""
        new = 1 - torch.clamp((1 + self.num_updates) / (10 + self.num_updates), max=_LECAM_DECAY)
        self.real_mean.lerp_(mean_over_ranks(real_BK.float().mean()), new)
        self.fake_mean.lerp_(mean_over_ranks(fake_BK.float().mean()), new)
        self.num_updates += 1

    def forward(self, real_BK: Tensor, fake_BK: Tensor) -> Tensor:
        """Mean square of relu(real - mean fake), plus that of relu(mean real - fake): a scalar, before its weight."""
        above_BK = F.relu(real_BK.float() - self.fake_mean)
        below_BK = F.relu(self.real_mean - fake_BK.float())
        return above_BK.square().mean() + below_BK.square().mean()


SHIFT = 1 / 8  # of the side, the farthest that a clip moves
CUTOUT = 0.2  # of the side, the side of the hole
_BRIGHTNESS = 0.25  # of the pixel range, the most that is added or taken


def augment_clips(video_BCTHW: Tensor, generator: torch.Generator, places: Places | None = None) -> Tensor:
    """Pixels around [0, 1] -> the same clips altered, each by its own draw; gradients flow to the pixels.

    What a shift or a hole leaves empty is grey (0.5). Draws come from `generator`, on the CPU, seven for each clip of
    the global batch. places: where these clips stand in it, if they are not all of it.
    """
    places = places or Places(list(range(len(video_BCTHW))), len(video_BCTHW))
    draw_B7 = places.pick(torch.rand(places.total, 7, generator=generator))
    x = video_BCTHW - 0.5  # grey is 0
    x = _cut_hole(_shift(_recolour(x, draw_B7[:, :3]), draw_B7[:, 3:5]), draw_B7[:, 5:])
    return x + 0.5


def _recolour(x_BCTHW: Tensor, draw_B3: Tensor) -> Tensor:
    """Brightness -0.25 .. 0.25 added; saturation 0 .. 2 times around the grey of each pixel; contrast 0.5 .. 1.5 times
    around the mean of the clip."""
    draw_3B = draw_B3.T[..., None, None, None, None].to(x_BCTHW)
    x_BCTHW = x_BCTHW + (2 * draw_3B[0] - 1) * _BRIGHTNESS
    grey = x_BCTHW.mean(dim=1, keepdim=True)
    x_BCTHW = grey + (x_BCTHW - grey) * (2 * draw_3B[1])
    mean = x_BCTHW.mean(dim=(1, 2, 3, 4), keepdim=True)
    return mean + (x_BCTHW - mean) * (draw_3B[2] + 0.5)


def _shift(x_BCTHW: Tensor, draw_B2: Tensor) -> Tensor:
    """Moved by whole pixels, up to an eighth of the side."""
    height, width = x_BCTHW.shape[-2:]
    far = round(max(height, width) * SHIFT)
    start_B2 = (draw_B2 * (2 * far + 1)).long().tolist()
    padded = F.pad(x_BCTHW, (far, far, far, far))
    return torch.stack(
        [clip[..., y : y + height, x : x + width] for clip, (y, x) in zip(padded, start_B2, strict=True)]
    )


def _cut_hole(x_BCTHW: Tensor, draw_B2: Tensor) -> Tensor:
    """A square of a fifth of the side, centred anywhere in the frame, is made grey."""
    height, width = x_BCTHW.shape[-2:]
    centre_2B1 = draw_B2.T[..., None]
    row_BH, column_BW = (
        (torch.arange(side) + 0.5 - side * centre_B1).abs() <= side * CUTOUT / 2
        for side, centre_B1 in zip((height, width), centre_2B1, strict=True)
    )
    hole_BHW = row_BH[:, :, None] & column_BW[:, None, :]
    return x_BCTHW.masked_fill(hole_BHW[:, None, None].to(x_BCTHW.device), 0.0)


NETS = ("none", "patch", "videomae")


@dataclass
class AdversaryConfig:
    """Read where loss.gan is above 0. Defaults are those of the patch discriminator."""

    net: str = "none"  # none | patch (on pixels) | videomae (on what VideoMAE sees)
    loss: str = "non_saturating"  # or "hinge"
    start_step: int = 0  # before it neither player knows of the other
    every: int = 5  # the discriminator learns at every so many-th step
    label_noise: float = 0.3  # non_saturating: labels are drawn from [1 - noise, 1] and [0, noise]
    lecam: float = 0.001  # weight of LeCam in the discriminator's loss
    augment: bool = False  # differentiable augmentation of all that it sees
    patch: PatchDiscriminatorConfig = field(default_factory=PatchDiscriminatorConfig)
    videomae: SemanticDiscriminatorConfig = field(default_factory=SemanticDiscriminatorConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=3e-5, betas=[0.5, 0.9], weight_decay=0.0, warmup_steps=0)
    )

    def __post_init__(self) -> None:
        if self.net not in NETS or self.loss not in LOSSES:
            raise UserError(
                f"adversary.net = {self.net!r} is one of {NETS}, adversary.loss = {self.loss!r} of {LOSSES}"
            )
        if self.start_step < 0 or self.every < 1 or self.lecam < 0:
            raise UserError("adversary.start_step and adversary.lecam must be >= 0, adversary.every at least 1")
        if not 0 <= self.label_noise < 0.5:
            raise UserError(f"adversary.label_noise = {self.label_noise}: must lie in [0, 0.5)")
        for net, section in (("patch", self.patch), ("videomae", self.videomae)):
            if self.net != net and section != type(section)():
                raise UserError(f"adversary.{net} is set, but adversary.net = {self.net!r} does not read it")
        if self.loss == "hinge" and self.label_noise:
            raise UserError("adversary.loss = 'hinge' knows no labels: set adversary.label_noise=0")


class _Seen(NamedTuple):
    """What the discriminator judges in its step."""

    real_BCTHW: Tensor
    fake_BCTHW: Tensor
    places: Places | None


class Adversary:
    """What `TrainState` and the loss of a tokenizer need of the discriminator."""

    def __init__(self, config: AdversaryConfig, num_frames: int, size: int, seed: int, device: torch.device) -> None:
        """Raises UserError where weights are absent or the clips do not fit."""
        self.config, self.seed, self.optim, self.period = config, seed, config.optim, config.every
        self.encoder = FrozenVideoMAE(config.videomae.encoder).to(device) if config.net == "videomae" else None
        self.discriminator, self.lecam = self._build(num_frames, size), LeCam()
        self.module: nn.Module = nn.ModuleDict({"discriminator": self.discriminator, "lecam": self.lecam}).to(device)
        self._seen: deque[_Seen] = deque()  # of each part of this step's batch
        self._seen_step = -1

    def term(self, real_BCTHW: Tensor, fake_BCTHW: Tensor, step: int, places: Places | None = None) -> Tensor | None:
        """What the tokenizer minimises at this step, a scalar; None before the game begins.

        Both sides are kept, detached, for the discriminator's step. places: where the clips stand in the global batch,
        if they are not all of it; what is drawn for a clip does not depend on the number of processes.
        """
        if step < self.config.start_step:
            return None
        if step != self._seen_step:
            self._seen.clear()
            self._seen_step = step
        if self._learns_at(step):
            self._seen.append(_Seen(real_BCTHW, fake_BCTHW.detach(), places))
        with _standing_still(self.module):
            return generator_loss(self.config.loss, self._judge(fake_BCTHW, "generator", step, places))

    def loss(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        """What the discriminator minimises, and what to log; None where it rests at this step."""
        config = self.config
        if not self._learns_at(step):
            return None
        if not self._seen or step != self._seen_step:
            raise RuntimeError("the discriminator's step comes after the tokenizer's, which keeps what it judges")
        seen = self._seen.popleft()
        real_BK = self._judge(seen.real_BCTHW, "real", step, seen.places)
        fake_BK = self._judge(seen.fake_BCTHW, "fake", step, seen.places)
        labels = generator_for(self.seed, "labels", step)
        total = discriminator_loss(config.loss, real_BK, fake_BK, config.label_noise, labels, seen.places)
        terms = {"adversary/gan": total.detach()}
        if config.lecam > 0:
            self.lecam.update(real_BK, fake_BK)
            penalty = self.lecam(real_BK, fake_BK)
            total = total + config.lecam * penalty
            terms["adversary/lecam"] = penalty.detach()
        return total, terms | _health(real_BK.detach().float(), fake_BK.detach().float())

    def _learns_at(self, step: int) -> bool:
        since = step - self.config.start_step
        return since >= 0 and since % self.config.every == 0

    def _judge(self, video_BCTHW: Tensor, side: str, step: int, places: Places | None) -> Tensor:
        if self.config.augment:
            video_BCTHW = augment_clips(video_BCTHW, generator_for(self.seed, "augment", side, step), places)
        return self.discriminator(video_BCTHW)

    def _build(self, num_frames: int, size: int) -> nn.Module:
        if self.encoder is not None:
            return SemanticDiscriminator(self.config.videomae, self.encoder, num_frames)
        return PatchDiscriminator(self.config.patch, num_frames, size)


def _health(real_BK: Tensor, fake_BK: Tensor) -> dict[str, Tensor]:
    """accuracy: share of places judged rightly (0.5 = guessing); logit_gap: mean real minus mean fake."""
    right = ((real_BK > 0).float().mean() + (fake_BK < 0).float().mean()) / 2
    return {"adversary/accuracy": right, "adversary/logit_gap": real_BK.mean() - fake_BK.mean()}


@contextmanager
def _standing_still(module: nn.Module) -> Iterator[None]:
    """Inside, a forward builds no path to the module's weights, and its buffers (spectral norm) do not move."""
    thawed, was_training = [p for p in module.parameters() if p.requires_grad], module.training
    module.requires_grad_(False).eval()
    try:
        yield
    finally:
        module.train(was_training)
        for parameter in thawed:
            parameter.requires_grad_(True)
