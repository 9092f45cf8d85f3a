"""The semantic discriminator: small trainable heads on what a frozen VideoMAE sees (paper.md section 3).

Letters: B clips, C T H W, S places of VideoMAE, E width of a feature, K places judged in all (taps x S).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tokenizer.common.errors import UserError
from tokenizer.frozen.videomae import FrozenVideoMAE
from tokenizer.frozen.weights import FrozenConfig

_SLOPE = 0.2  # of LeakyReLU below 0
_VIRTUAL_BATCH = 8


@dataclass
class SemanticDiscriminatorConfig:
    """Heads on VideoMAE-B; the defaults are the paper's (29.6M trainable parameters)."""

    taps: list[int] = field(default_factory=lambda: [0, 3, 6, 9, 12])  # after so many blocks; 0 is the embedding
    kernel: int = 9  # neighbouring places that a head looks at together, odd
    encoder: FrozenConfig = field(default_factory=FrozenConfig)  # VideoMAE

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"videomae.kernel = {self.kernel}: must be odd and at least 1")
        if len(set(self.taps)) != len(self.taps):
            raise UserError(f"videomae.taps = {self.taps}: each once")


class LocalBatchNorm(nn.Module):
    """Batch norm over eight clips at a time, always by their own statistics: real and fake clips never share them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BES: Tensor) -> Tensor:
        groups = [
            F.batch_norm(group, None, None, self.weight, self.bias, training=True)
            for group in x_BES.split(_VIRTUAL_BATCH)
        ]
        return torch.cat(groups)


class _Block(nn.Module):
    """Convolution over the row of places, which closes to a ring; local batch norm; LeakyReLU."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular", bias=False)
        self.conv = spectral_norm(conv)  # no bias: the norm would take it away again
        self.norm = LocalBatchNorm(width)

    def forward(self, x_BES: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x_BES)), _SLOPE)


class Head(nn.Module):
    """Features of one tap -> a logit for each place, logits_BS."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.first = _Block(width, 1)
        self.second = _Block(width, kernel)
        self.to_logit = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, feature_BSE: Tensor) -> Tensor:
        x_BES = self.first(feature_BSE.transpose(1, 2))
        x_BES = (x_BES + self.second(x_BES)) * math.sqrt(0.5)
        return self.to_logit(x_BES)[:, 0]


class SemanticDiscriminator(nn.Module):
    """Clips -> one logit for each place at each tap. Trainable and saved are the heads alone."""

    def __init__(self, config: SemanticDiscriminatorConfig, encoder: FrozenVideoMAE, num_frames: int) -> None:
        """Raises UserError for taps or clips that VideoMAE does not have."""
        super().__init__()
        encoder.check(num_frames, config.taps)
        self.taps = config.taps
        self.encoder = encoder
        self.heads = nn.ModuleList(Head(encoder.width, config.kernel) for _ in config.taps)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Pixels around [0, 1] -> logits_BK; high = real."""
        features = self.encoder.features(video_BCTHW, self.taps)
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1)
