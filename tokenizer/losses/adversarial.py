"""What the two sides of the adversarial game minimise, on plain logits (paper.md section 3).

    discriminator   says "real" (a high logit) of training clips and "fake" of reconstructions
    generator       the tokenizer: its reconstructions should be called real

A discriminator judges many places of a clip; every place counts alike. All of it runs in float32.

Letters: B clips, K places that a discriminator judges in a clip.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.common.ranks import mean_over_ranks
from tokenizer.common.sharing import Places

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
