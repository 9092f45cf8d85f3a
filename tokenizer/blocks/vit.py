"""A plain pre-LayerNorm vision transformer layer, in which every position sees every other.

The router and the patch discriminator are stacks of it. Letters: B clips, M positions, D width, h heads, e width of a
head.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.common.compiled import Layer


class SelfAttention(nn.Module):
    """Multi-head self-attention: every position sees every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x_BMD: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(x_BMD), "B M (three h e) -> three B h M e", three=3, h=self.heads)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "B h M e -> B M (h e)"))


class ViTLayer(Layer):
    """Self-attention, then a feed-forward, each after a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BMD: Tensor) -> Tensor:
        """[B, M, D] -> [B, M, D]"""
        return self.stretch(ViTLayer._whole, x_BMD)

    def _whole(self, x_BMD: Tensor) -> Tensor:
        x_BMD = x_BMD + self.attention(self.norm_attention(x_BMD))
        return x_BMD + self.mlp(self.norm_mlp(x_BMD))
