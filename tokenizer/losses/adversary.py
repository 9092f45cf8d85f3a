"""The second player: a discriminator with its own optimiser, steps and random draws (paper.md section 3).

    generator's step       term(fake, step): the discriminator judges, its own weights stand still
    discriminator's step   loss(batch, step): it learns from the clips and reconstructions of that very step, detached

Neither step touches the other's weights. Letters: B clips, C T H W, K places judged in a clip.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenizer.common.errors import UserError
from tokenizer.common.optim import OptimConfig
from tokenizer.common.runtime import generator_for
from tokenizer.common.sharing import Places
from tokenizer.frozen.videomae import FrozenVideoMAE
from tokenizer.losses.adversarial import LOSSES, LeCam, discriminator_loss, generator_loss
from tokenizer.losses.diffaug import augment_clips
from tokenizer.losses.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from tokenizer.losses.discriminator_videomae import SemanticDiscriminator, SemanticDiscriminatorConfig

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
