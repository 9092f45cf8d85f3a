"""The semantic discriminator: small trainable heads on features of a frozen VideoMAE (arXiv 2603.12267).

Letters: B clips, C T H W, S places of VideoMAE, E width of a feature, K places judged in all (taps x S).

The base discriminator: a transformer with a logit for every spatio-temporal patch.

Letters: B clips, C T H W, M patches of a clip, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tokenizer.blocks.patches import patchify
from tokenizer.blocks.positions import sincos_3d
from tokenizer.blocks.transformer import ViTLayer
from tokenizer.common.errors import UserError
from tokenizer.frozen.encoders import FrozenConfig, FrozenVideoMAE


@dataclass
class PatchDiscriminatorConfig:
    """Size of the patch discriminator; the defaults are the paper's (38M parameters)."""

    layers: int = 12
    width: int = 512
    heads: int = 8
    mlp_ratio: float = 4.0
    patch_frames: int = 4
    patch_size: int = 8

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.patch_frames, self.patch_size) < 1 or self.mlp_ratio <= 0:
            raise UserError("the patch discriminator's layers, heads, patch_frames, patch_size, mlp_ratio must be > 0")
        if self.width % self.heads or self.width % 8:
            raise UserError(f"patch.width = {self.width} must be a multiple of 8 and of patch.heads = {self.heads}")


class PatchDiscriminator(nn.Module):
    """Clips of `num_frames` frames of `size` x `size` pixels -> one logit for each patch."""

    position_MD: Tensor

    def __init__(self, config: PatchDiscriminatorConfig, num_frames: int, size: int) -> None:
        """Raises UserError where the clips are no whole number of patches."""
        super().__init__()
        if num_frames % config.patch_frames or size % config.patch_size:
            raise UserError(
                f"clips of {num_frames} frames of {size} pixels are no whole number of the discriminator's patches: "
                f"patch.patch_frames = {config.patch_frames}, patch.patch_size = {config.patch_size}"
            )
        self.config = config
        num_blocks, grid = num_frames // config.patch_frames, size // config.patch_size
        self.embed = nn.Linear(3 * config.patch_frames * config.patch_size**2, config.width)
        self.register_buffer("position_MD", sincos_3d(num_blocks, grid, config.width), persistent=False)
        self.layers = nn.ModuleList(
            ViTLayer(config.width, config.heads, config.mlp_ratio) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices: Xavier uniform. Biases: 0. Head: N(0, 0.02), so that at first it has hardly an opinion."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Pixels around [0, 1] -> logits [B, M], one for each patch; high = real."""
        x_BMD = self.embed(patchify(2 * video_BCTHW - 1, self.config.patch_frames, self.config.patch_size))
        x_BMD = x_BMD + self.position_MD
        for layer in self.layers:
            x_BMD = layer(x_BMD)
        return self.head(self.norm(x_BMD))[..., 0]


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
