"""The idea of EVATok: how many tokens each temporal block of a clip gets. Read this file first.

A clip is cut into N temporal blocks; block t gets a *length* out of m levels. An *assignment* is a row of N lengths;
all m^N of them, in lexicographic order, are the table. A batch of clips with unequal assignments is *packed*: the
tokens of all clips stand one after the other, clip by clip, block by block, with no padding anywhere. So "blocks up
to t of clip b" is always one contiguous stretch, and block-causal attention needs no mask (paper.md sections 1, 2).

Everything here is a pure function of small integers; lengths live on the CPU, because they decide tensor shapes.

Letters: B clips, N temporal blocks, A assignments (m^N), L tokens of the whole batch, packed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tokenizer.common.errors import UserError


@dataclass(frozen=True)
class AssignmentSpace:
    """All assignments of `num_blocks` blocks over `levels` (ascending token counts).

    Row r of `table_AN` is the r-th assignment in lexicographic order: row 0 gives every block the smallest level, the
    last row gives every block the largest. The paper's space is levels (32, 64, 128, 256, 512) over 4 blocks: 625 rows.
    """

    levels: tuple[int, ...]
    num_blocks: int

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in itertools.pairwise(self.levels))
        if not self.levels or self.levels[0] < 1 or not ascending:
            raise UserError(f"levels = {list(self.levels)}: give positive token counts in ascending order, each once")
        if self.num_blocks < 1:
            raise UserError(f"num_blocks = {self.num_blocks}: a clip has at least one temporal block")

    @cached_property
    def table_AN(self) -> Tensor:
        """int64 [A, N], lexicographic."""
        return torch.tensor(list(itertools.product(self.levels, repeat=self.num_blocks)), dtype=torch.long)

    @cached_property
    def tokens_A(self) -> Tensor:
        """int64 [A], tokens of each assignment in all its blocks together."""
        return self.table_AN.sum(dim=1)

    @property
    def num_rows(self) -> int:
        return len(self.levels) ** self.num_blocks

    @property
    def min_tokens(self) -> int:
        return self.levels[0] * self.num_blocks

    @property
    def max_tokens(self) -> int:
        return self.levels[-1] * self.num_blocks

    def lengths_of(self, row_B: Tensor) -> Tensor:
        """Rows of the table, int64 [...] -> lengths, int64 [..., N]."""
        return self.table_AN[row_B]

    def rows_of(self, length_BN: Tensor) -> Tensor:
        """Lengths, int64 [..., N] -> rows, int64 [...]; the inverse of `lengths_of`.

        Raises UserError where a length is none of the levels.
        """
        if length_BN.shape[-1] != self.num_blocks:
            raise UserError(f"an assignment has {self.num_blocks} lengths, one per block; got {length_BN.shape[-1]}")
        level_m = torch.tensor(self.levels)
        digit_BN = torch.searchsorted(level_m, length_BN.contiguous()).clamp(max=len(self.levels) - 1)
        strange = length_BN[level_m[digit_BN] != length_BN]
        if strange.numel():
            raise UserError(f"length {int(strange.flatten()[0])} is none of the levels {list(self.levels)}")
        weight_N = len(self.levels) ** torch.arange(self.num_blocks - 1, -1, -1)
        return (digit_BN * weight_N).sum(dim=-1)

    def uniform_row(self, level: int) -> int:
        """The row that gives every block `level` tokens."""
        return int(self.rows_of(torch.full((self.num_blocks,), level)))

    def rows_with_prefix(self, prefix: Sequence[int]) -> Tensor:
        """Rows, int64 [m^(N - len(prefix))], whose first blocks have exactly the lengths of `prefix`."""
        for length in prefix:
            if length not in self.levels:
                raise UserError(f"prefix length {length} is none of the levels {list(self.levels)}")
        if len(prefix) > self.num_blocks:
            raise UserError(f"a prefix of {len(prefix)} lengths does not fit into {self.num_blocks} blocks")
        fits_A = (self.table_AN[:, : len(prefix)] == torch.tensor(list(prefix), dtype=torch.long)).all(dim=1)
        return fits_A.nonzero().flatten()

    def draw_rows(self, num: int, generator: torch.Generator) -> Tensor:
        """`num` rows drawn uniformly and independently, int64 [num] (paper.md section 1, stage 1)."""
        return torch.randint(self.num_rows, (num,), generator=generator)

    def best_row(self, score_BA: Tensor, max_tokens: int | None = None) -> Tensor:
        """Row of the highest score among those of at most `max_tokens` tokens, int64 [B]; ties go to fewer tokens.

        Raises UserError where `max_tokens` is below the smallest assignment.
        """
        if max_tokens is not None and max_tokens < self.min_tokens:
            raise UserError(f"{max_tokens} tokens are below the smallest assignment: the minimum is {self.min_tokens}")
        order_A = self.tokens_A.sort(stable=True).indices
        if max_tokens is not None:
            order_A = order_A[self.tokens_A[order_A] <= max_tokens]
        return order_A[score_BA.cpu()[..., order_A].argmax(dim=-1)]  # argmax takes the first, so the cheapest, maximum

    def prefix_nodes(self) -> list[tuple[int, ...]]:
        """Every prefix of an assignment, depth first: the nodes of the tree that curation walks (780 for 5^4)."""

        def below(prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
            if len(prefix) == self.num_blocks:
                return []
            return [n for level in self.levels for n in ((*prefix, level), *below((*prefix, level)))]

        return below(())


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each token of a packed batch stands. Made by `pack`.

    `lengths` is the plain-Python copy of the [B, N] lengths, so that no loop over blocks asks a device for a number.
    """

    lengths: tuple[tuple[int, ...], ...]

    @property
    def num_clips(self) -> int:
        return len(self.lengths)

    @property
    def num_blocks(self) -> int:
        return len(self.lengths[0])

    @cached_property
    def num_tokens(self) -> int:
        return sum(self.clip_lengths)

    @cached_property
    def clip_lengths(self) -> tuple[int, ...]:
        """Tokens of each clip."""
        return tuple(sum(row) for row in self.lengths)

    @cached_property
    def block_ends(self) -> tuple[tuple[int, ...], ...]:
        """For clip b and block t: tokens of clip b in blocks <= t."""
        return tuple(tuple(itertools.accumulate(row)) for row in self.lengths)

    @cached_property
    def is_regular(self) -> bool:
        """True where all clips have the same assignment, so that the packed tokens are also a [B, L/B] rectangle."""
        return all(row == self.lengths[0] for row in self.lengths)

    @cached_property
    def length_BN(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.long)

    @cached_property
    def clip_L(self) -> Tensor:
        """int64 [L], the clip of each token."""
        return torch.repeat_interleave(torch.arange(self.num_clips), self.length_BN.sum(dim=1))

    @cached_property
    def block_L(self) -> Tensor:
        """int64 [L], the temporal block of each token."""
        block_BN = torch.arange(self.num_blocks).repeat(self.num_clips)
        return torch.repeat_interleave(block_BN, self.length_BN.flatten())

    @cached_property
    def first_BN(self) -> Tensor:
        """int64 [B, N], where the first token of each block stands in the packed batch."""
        length = self.length_BN.flatten()
        return (length.cumsum(0) - length).view(self.num_clips, self.num_blocks)

    @cached_property
    def index_L(self) -> Tensor:
        """int64 [L], the place of each token inside its own block, 0 .. length - 1."""
        first_L = torch.repeat_interleave(self.first_BN.flatten(), self.length_BN.flatten())
        return torch.arange(self.num_tokens) - first_L

    def unpack(self, packed_L: Tensor) -> list[list[Tensor]]:
        """Packed tokens [L, ...] -> for each clip, for each block, its own [length, ...]."""
        blocks = packed_L.split([length for row in self.lengths for length in row])
        return [list(blocks[b * self.num_blocks : (b + 1) * self.num_blocks]) for b in range(self.num_clips)]


def pack(length_BN: Tensor) -> Packing:
    """Lengths, int64 [B, N], each at least 1 -> the layout of the packed batch."""
    if length_BN.ndim != 2 or length_BN.numel() == 0 or int(length_BN.min()) < 1:
        raise UserError(f"lengths must be a [clips, blocks] table of numbers >= 1, got shape {list(length_BN.shape)}")
    return Packing(tuple(tuple(row) for row in length_BN.tolist()))


@lru_cache(maxsize=64)
def pack_uniform(num_clips: int, num_blocks: int, length: int) -> Packing:
    """The layout of a batch in which every block has `length` tokens; the 3D patches of a clip are packed so."""
    return Packing(((length,) * num_blocks,) * num_clips)
