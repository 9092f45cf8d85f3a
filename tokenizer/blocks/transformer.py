"""The two kinds of transformer layers: the Q-Former's, and a plain vision transformer's. Both are pre-LayerNorm.

A Q-Former layer is self-attention over the queries, cross-attention to a reference, feed-forward. The reference is
read, never updated. One set of weights is run in two ways: `forward` takes a packed batch at once (training,
reconstruction); `step` takes one temporal block and the keys and values of the blocks before it (streaming, curation's
prefix tree).

In a plain layer every position sees every other. The router and the patch discriminator are stacks of it; a blockwise
router takes one temporal block at a time through its `step`.

Letters: L queries, S reference rows (both packed), D width, B clips, K queries of one block, M positions, h heads, e
head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.assignment import Packing
from tokenizer.blocks.attention import Attention, attend_prefix, block_causal_attention
from tokenizer.common.errors import UserError

KeysValues = tuple[Tensor, Tensor]


def check_positive(config: object) -> None:
    """UserError for a number that is not above 0."""
    for name, value in vars(config).items():
        if isinstance(value, int | float) and not value > 0:
            raise UserError(f"{name} = {value}: must be above 0")


@dataclass
class TransformerConfig:
    """One of the two transformers."""

    layers: int = 6
    width: int = 512
    heads: int = 8

    def __post_init__(self) -> None:
        check_positive(self)
        if self.width % self.heads or self.width % 8:
            raise UserError(f"width = {self.width} must be a multiple of 8 and of heads = {self.heads}")


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    compiles = True  # see compile_layers

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, x_LD: Tensor, pos_LD: Tensor, ref_SD: Tensor, placed_SD: Tensor, query: Packing, reference: Packing
    ) -> Tensor:
        """A packed batch, block-causal in both attentions -> [L, D]. `placed_SD`: the reference with its positions."""
        normed_LD = self.norm_self(x_LD)
        own_LD = normed_LD + pos_LD  # positions enter queries and keys, never values
        q, (k, v) = self.self_attention.queries(own_LD), self.self_attention.keys_values(normed_LD, own_LD)
        mixed_Lhe = block_causal_attention(q, k, v, query, query)  # [L, h, e]
        x_LD = x_LD + self.self_attention.output(mixed_Lhe)
        q = self.cross_attention.queries(self.norm_cross(x_LD) + pos_LD)  # [L, h, e]
        mixed_Lhe = block_causal_attention(q, *self.cross_attention.keys_values(ref_SD, placed_SD), query, reference)
        x_LD = x_LD + self.cross_attention.output(mixed_Lhe)
        return x_LD + self.mlp(self.norm_mlp(x_LD))

    def step(
        self, x_BKD: Tensor, pos_KD: Tensor, past: list[KeysValues], reference: KeysValues
    ) -> tuple[Tensor, KeysValues]:
        """One temporal block -> its values [B, K, D], and its own (keys, values) for the blocks to come.

        `past`: self-attention (keys, values) of the blocks before, `reference`: cross-attention ones of blocks <= t.
        """
        normed_BKD = self.norm_self(x_BKD)
        own_BKD = normed_BKD + pos_KD  # [B, K, D]
        q, own = self.self_attention.queries(own_BKD), self.self_attention.keys_values(normed_BKD, own_BKD)
        # blocks <= t are all keys there are: causal without a mask
        x_BKD = x_BKD + self.self_attention.output(attend_prefix(q, *concat_blocks([*past, own])))
        q = self.cross_attention.queries(self.norm_cross(x_BKD) + pos_KD)
        x_BKD = x_BKD + self.cross_attention.output(attend_prefix(q, *reference))
        return x_BKD + self.mlp(self.norm_mlp(x_BKD)), own


class QFormer(nn.ModuleList):
    """A stack of layers, iterated with their type."""

    def __init__(self, layers: int, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__(QFormerLayer(width, heads, mlp_ratio) for _ in range(layers))

    def __iter__(self) -> Iterator[QFormerLayer]:
        return cast("Iterator[QFormerLayer]", super().__iter__())


def concat_blocks(blocks: list[KeysValues]) -> KeysValues:
    """(keys, values) of several temporal blocks, one after the other."""
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat([k for k, _ in blocks], dim=1), torch.cat([v for _, v in blocks], dim=1)


class SelfAttention(nn.Module):
    """Multi-head self-attention: every position sees every other; in `step` those of earlier blocks too."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x_BMD: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(x_BMD), "B M (three h e) -> three B h M e", three=3, h=self.heads)
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "B h M e -> B M (h e)"))

    def step(self, x_BMD: Tensor, past: list[KeysValues]) -> tuple[Tensor, KeysValues]:
        """One temporal block after those of `past` -> [B, M, D], and its own (keys, values)."""
        q, k, v = rearrange(self.to_qkv(x_BMD), "B M (three h e) -> three B M h e", three=3, h=self.heads)
        mixed_BMhe = attend_prefix(q, *concat_blocks([*past, (k, v)]))
        return self.to_out(rearrange(mixed_BMhe, "B M h e -> B M (h e)")), (k, v)


class ViTLayer(nn.Module):
    """Self-attention, then a feed-forward, each after a LayerNorm and added to its input."""

    compiles = True  # see compile_layers

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BMD: Tensor) -> Tensor:
        """[B, M, D] -> [B, M, D]"""
        x_BMD = x_BMD + self.attention(self.norm_attention(x_BMD))
        return x_BMD + self.mlp(self.norm_mlp(x_BMD))

    def step(self, x_BMD: Tensor, past: list[KeysValues]) -> tuple[Tensor, KeysValues]:
        """One temporal block -> [B, M, D], and the (keys, values) that later blocks read."""
        mixed_BMD, own = self.attention.step(self.norm_attention(x_BMD), past)
        x_BMD = x_BMD + mixed_BMD
        return x_BMD + self.mlp(self.norm_mlp(x_BMD)), own
