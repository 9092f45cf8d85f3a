"""The idea of EVATok: how many tokens each temporal block of a clip gets. Read this file first.

A clip is cut into N temporal blocks, and each block gets one of m *levels* of tokens. An *assignment* is the row of N
lengths, for example (512, 64, 32, 32) for a clip that hardly moves after its first frames. All m^N assignments, in
lexicographic order, form the table (arXiv 2603.12267).

A batch of clips with unequal assignments is *packed*: the tokens of all clips follow one another, clip by clip,
block by block, without padding. "Blocks <= t of clip b" is then one contiguous range, so block-causal attention needs
no mask.

    lengths   clip 0: (4, 2)   clip 1: (1, 3)
    packed    0 0 0 0 | 0 0 || 1 | 1 1 1          10 tokens, L = 10

Everything here is a pure function of small integers. Lengths stay on the CPU, because they decide tensor shapes.

Letters: B clips, N temporal blocks, m levels, A assignments (m^N), L tokens of the whole batch, packed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tokenizer.common.errors import UserError

MOST_ROWS = 1 << 20  # rows of a table: 8 blocks of 5 levels fit, 9 do not
_INT64 = 1 << 63


@dataclass(frozen=True)
class AssignmentSpace:
    """All assignments of `num_blocks` blocks over `levels` (token counts, ascending).

    The *row* of an assignment is its index in lexicographic order: row 0 gives every block the smallest level,
    the last row gives every block the largest. The paper has levels (32, 64, 128, 256, 512) and 4 blocks: 625 rows.

    Rows are numbers in base m, so drawing rows and converting them to lengths and back need no table and work for any
    number of blocks. What scores every row uses `table_AN`, of up to 2^20 rows; a blockwise router and curation by a
    beam do not.
    """

    levels: tuple[int, ...]
    num_blocks: int

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in itertools.pairwise(self.levels))
        if not self.levels or self.levels[0] < 1 or not ascending:
            raise UserError(f"levels = {list(self.levels)}: give positive token counts in ascending order, each once")
        if self.num_blocks < 1:
            raise UserError(f"num_blocks = {self.num_blocks}: a clip has at least one temporal block")
        if self.num_rows >= _INT64:
            raise UserError(
                f"{len(self.levels)} levels over {self.num_blocks} blocks give more assignments than 64 bits can "
                "number; use fewer blocks (longer clips can be streamed) or fewer levels"
            )

    # --- counts -----------------------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """A = m^N."""
        return len(self.levels) ** self.num_blocks

    @property
    def min_tokens(self) -> int:
        """Tokens of row 0."""
        return self.levels[0] * self.num_blocks

    @property
    def max_tokens(self) -> int:
        """Tokens of the last row."""
        return self.levels[-1] * self.num_blocks

    @property
    def tokens_mean(self) -> float:
        """Of a row drawn uniformly: its blocks are drawn independently."""
        return self.num_blocks * sum(self.levels) / len(self.levels)

    @property
    def tokens_std(self) -> float:
        """Population standard deviation of the tokens of a row drawn uniformly."""
        mean = sum(self.levels) / len(self.levels)
        return math.sqrt(self.num_blocks * sum((level - mean) ** 2 for level in self.levels) / len(self.levels))

    # --- rows and lengths, by arithmetic ------------------------------------------------------------------------------

    def lengths_of(self, row_B: Tensor) -> Tensor:
        """Rows, int64 [...] -> lengths, int64 [..., N]. Raises IndexError for a row outside the table."""
        if row_B.numel() and not 0 <= int(row_B.min()) <= int(row_B.max()) < self.num_rows:
            raise IndexError(f"rows {int(row_B.min())} .. {int(row_B.max())} of {self.num_rows} assignments")
        return torch.tensor(self.levels)[self.places_of(row_B)]

    def places_of(self, row_B: Tensor) -> Tensor:
        """Rows, int64 [...] -> the place of each block's level among the levels, 0 .. m - 1, int64 [..., N]."""
        return row_B[..., None] // self._place_value_N % len(self.levels)

    def tokens_of(self, row_B: Tensor) -> Tensor:
        """Rows, int64 [...] -> tokens of their assignments, int64 [...]."""
        return self.lengths_of(row_B).sum(dim=-1)

    def rows_of(self, length_BN: Tensor) -> Tensor:
        """Lengths, int64 [..., N] -> rows, int64 [...]; the inverse of `lengths_of`.

        Raises UserError for a length that is none of the levels.
        """
        if length_BN.shape[-1] != self.num_blocks:
            raise UserError(f"an assignment has {self.num_blocks} lengths, one per block; got {length_BN.shape[-1]}")
        level_m = torch.tensor(self.levels)
        digit_BN = torch.searchsorted(level_m, length_BN.contiguous()).clamp(max=len(self.levels) - 1)  # [..., N]
        unknown = length_BN[level_m[digit_BN] != length_BN]
        if unknown.numel():
            raise UserError(f"length {int(unknown.flatten()[0])} is none of the levels {list(self.levels)}")
        return (digit_BN * self._place_value_N).sum(dim=-1)

    def uniform_row(self, level: int) -> int:
        """The row that gives every block `level` tokens."""
        return int(self.rows_of(torch.full((self.num_blocks,), level)))

    def draw_rows(self, num: int, generator: torch.Generator) -> Tensor:
        """`num` rows drawn uniformly and independently, int64 [num]: how the proxy tokenizer is trained."""
        return torch.randint(self.num_rows, (num,), generator=generator)

    def rows_with_prefix(self, prefix: Sequence[int]) -> Tensor:
        """Rows whose first blocks have exactly the lengths of `prefix`, int64 [m^(N - len(prefix))], ascending."""
        for length in prefix:
            if length not in self.levels:
                raise UserError(f"prefix length {length} is none of the levels {list(self.levels)}")
        free = self.num_blocks - len(prefix)
        if free < 0:
            raise UserError(f"a prefix of {len(prefix)} lengths does not fit into {self.num_blocks} blocks")
        num = len(self.levels) ** free
        self.check_table(num)
        first = int(self.rows_of(torch.tensor([*prefix, *[self.levels[0]] * free])))
        return torch.arange(first, first + num)  # lexicographic: a prefix is one contiguous range

    # --- the whole table, to score every assignment -------------------------------------------------------------------

    @cached_property
    def table_AN(self) -> Tensor:
        """int64 [A, N], lexicographic: the last block varies fastest. Raises UserError for more than 2^20 rows."""
        self.check_table(self.num_rows)
        return self.lengths_of(torch.arange(self.num_rows))

    @cached_property
    def tokens_A(self) -> Tensor:
        """int64 [A], tokens of each assignment, summed over its blocks."""
        return self.table_AN.sum(dim=1)

    def best_row(self, score_BA: Tensor, max_tokens: int | None = None) -> Tensor:
        """The row of the highest score, int64 [B], among rows of at most `max_tokens`; ties go to fewer tokens.

        Raises UserError if `max_tokens` is below the smallest assignment.
        """
        if max_tokens is not None and max_tokens < self.min_tokens:
            raise UserError(f"{max_tokens} tokens are below the smallest assignment: the minimum is {self.min_tokens}")
        order_A = self.tokens_A.sort(stable=True).indices  # cheapest first
        if max_tokens is not None:
            order_A = order_A[self.tokens_A[order_A] <= max_tokens]
        # argmax returns the first maximum: the cheapest of equal scores
        return order_A[score_BA.cpu()[..., order_A].argmax(dim=-1)]

    @cached_property
    def _place_value_N(self) -> Tensor:
        """int64 [N], m^(N-1) .. m, 1: the place value of each block in a row."""
        return torch.tensor([len(self.levels) ** power for power in range(self.num_blocks - 1, -1, -1)])

    def check_table(self, num_rows: int) -> None:
        """Raises UserError if a table of `num_rows` rows is too large to score."""
        if num_rows > MOST_ROWS:
            raise UserError(
                f"{len(self.levels)} levels over {self.num_blocks} blocks give {self.num_rows} assignments, too many "
                f"to score each (at most {MOST_ROWS}): give the lengths (fixed:.., uniform:K), use method=beam and "
                "model.kind=blockwise, or fewer levels or blocks"
            )


@dataclass(frozen=True, eq=False)
class Packing:
    """The layout of a packed batch: which clip, block and place each token belongs to. Made by `pack`.

    `lengths`: the [B, N] lengths as plain Python numbers, so that loops over blocks never wait for a device.
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
        """L."""
        return sum(self.clip_lengths)

    @cached_property
    def clip_lengths(self) -> tuple[int, ...]:
        """Tokens of each clip."""
        return tuple(sum(row) for row in self.lengths)

    @cached_property
    def block_ends(self) -> tuple[tuple[int, ...], ...]:
        """For clip b and block t: tokens of clip b in blocks <= t, the keys that block t attends to."""
        return tuple(tuple(itertools.accumulate(row)) for row in self.lengths)

    @cached_property
    def is_regular(self) -> bool:
        """True if all clips have the same assignment, so that the packed tokens are also a [B, L/B] rectangle."""
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
        block_BN = torch.arange(self.num_blocks).repeat(self.num_clips)  # [B * N]
        return torch.repeat_interleave(block_BN, self.length_BN.flatten())

    @cached_property
    def first_BN(self) -> Tensor:
        """int64 [B, N], index of the first token of each block in the packed batch."""
        length = self.length_BN.flatten()  # [B * N]
        return (length.cumsum(0) - length).view(self.num_clips, self.num_blocks)

    def unpack(self, packed_L: Tensor) -> list[list[Tensor]]:
        """Packed tokens [L, ...] -> the tokens [length, ...] of every block, clip by clip."""
        blocks = packed_L.split([length for row in self.lengths for length in row])
        return [list(blocks[b * self.num_blocks : (b + 1) * self.num_blocks]) for b in range(self.num_clips)]


def pack(length_BN: Tensor) -> Packing:
    """Lengths, int64 [B, N], each at least 1 -> the layout of the packed batch."""
    if length_BN.ndim != 2 or length_BN.numel() == 0 or int(length_BN.min()) < 1:
        raise UserError(f"lengths must be a [clips, blocks] table of numbers >= 1, got shape {list(length_BN.shape)}")
    return Packing(tuple(tuple(row) for row in length_BN.tolist()))


@lru_cache(maxsize=64)
def pack_uniform(num_clips: int, num_blocks: int, length: int) -> Packing:
    """The layout of a batch in which every block has `length` tokens. The 3D patches of clips are packed this way."""
    return Packing(((length,) * num_blocks,) * num_clips)
