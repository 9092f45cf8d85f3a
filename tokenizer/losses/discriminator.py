"""The base discriminator: a transformer that judges every spatio-temporal patch (paper.md section 3).

Letters: B clips, C T H W, M patches of a clip, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizer.blocks.patchify import patchify
from tokenizer.blocks.positions import sincos_3d
from tokenizer.blocks.vit import ViTLayer
from tokenizer.common.errors import UserError


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
