"""Ids, their order and the grammar of the GPT's sequences. The only file that knows them.

    ids         codes 0 .. E-1, then one length token for each level: the head predicts these V = E + m
                then one condition for each class and the open condition: inputs only
    sequence    [condition tokens]  condition  then for each temporal block: its length token, exactly that many codes

Class-to-video: the condition is the class, or the open one for the unconditional stream of guidance. Frame prediction:
the codes of the given frames come first, and the open condition separates them from the clip. There is no end token:
the grammar knows when a clip is complete.

Letters: E codes, m levels, V ids of the head, N temporal blocks, L packed tokens, W predicted ones among them, Q ids of
one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.errors import UserError


@dataclass(frozen=True)
class ClipCodes:
    """One clip as tokens: `code_L` int64, block after block; `lengths` how many each block has.

    `label`: number of its class, or None. `condition_L`: the codes of the frames that are given to
    frame prediction, int64, empty otherwise.
    """

    code_L: Tensor
    lengths: tuple[int, ...]
    label: int | None = None
    condition_L: Tensor = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class SequenceLayout:
    """The vocabulary and the order of a model's sequences.

    condition_lengths: tokens of each temporal block of the given frames (frame prediction; the paper: (512, 128)); the
    clip itself then begins with blocks of these lengths, because the given frames are generated again. Empty otherwise.
    """

    codebook_size: int
    levels: tuple[int, ...]
    num_blocks: int
    num_classes: int = 0
    condition_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.codebook_size < 1 or self.num_classes < 0:
            raise UserError(f"codebook_size = {self.codebook_size} must be >= 1, num_classes = {self.num_classes} >= 0")
        _check_prefix(self, self.condition_lengths)

    @cached_property
    def space(self) -> AssignmentSpace:
        return AssignmentSpace(tuple(self.levels), self.num_blocks)

    @property
    def num_ids(self) -> int:
        """V, the ids that the head predicts: codes and length tokens."""
        return self.codebook_size + len(self.levels)

    @property
    def num_input_ids(self) -> int:
        """All ids that the model reads: V, the classes, the open condition."""
        return self.num_ids + self.num_classes + 1

    @property
    def open_id(self) -> int:
        """No class; in frame prediction the separator."""
        return self.num_input_ids - 1

    @property
    def condition_tokens(self) -> int:
        return sum(self.condition_lengths)

    @property
    def max_length(self) -> int:
        """Ids of the longest sequence: the rows of a table of positions (2053 and 2309 at the paper's size)."""
        free_blocks = self.num_blocks - len(self.condition_lengths)
        clip = self.condition_tokens + free_blocks * self.levels[-1] + self.num_blocks
        return self.condition_tokens + 1 + clip

    @property
    def num_block_positions(self) -> int:
        """Rows of a table of `BlockPositions`."""
        return 1 + sum(self.levels)

    def num_inputs(self, tokens: int) -> int:
        """Ids that a model reads of a clip of `tokens` codes in training: its whole sequence but the last."""
        return self.condition_tokens + self.num_blocks + tokens

    def condition_id(self, label: int | None) -> int:
        """Class number, or None for the open condition -> id. UserError for a class that there is not."""
        if label is None:
            return self.open_id
        if not 0 <= label < self.num_classes:
            raise UserError(f"class {label} does not exist: this model has classes 0 .. {self.num_classes - 1}")
        return self.num_ids + label

    def length_id(self, length: int) -> int:
        return self.codebook_size + self.levels.index(length)

    def encode(self, clip: ClipCodes) -> Tensor:
        """Clip -> its sequence, int64 [Q]. Raises UserError if lengths, codes and layout do not fit together."""
        self._check(clip)
        parts = [clip.condition_L, torch.tensor([self.condition_id(clip.label)])]
        for length, code_K in zip(clip.lengths, clip.code_L.split(list(clip.lengths)), strict=True):
            parts += [torch.tensor([self.length_id(length)]), code_K]
        return torch.cat(parts)

    def decode(self, id_Q: Tensor) -> ClipCodes:
        """The inverse of `encode`. Raises UserError, naming the place, for anything that `encode` does not write."""
        ids, start = id_Q.tolist(), self.condition_tokens
        if len(ids) <= start or not self.num_ids <= ids[start] <= self.open_id:
            raise UserError(f"place {start} of a sequence must hold its condition; the sequence has {len(ids)} ids")
        if any(not 0 <= code < self.codebook_size for code in ids[:start]):
            raise UserError(f"the first {start} ids of a sequence must be the codes of the condition")
        grammar = Grammar(self)
        for place, token in enumerate(ids[start + 1 :], start=start + 1):
            if not grammar.allows(token):
                raise UserError(f"place {place} of a sequence holds {token}, but the grammar wants {grammar.wanted}")
            grammar.advance(token)
        if not grammar.finished:
            raise UserError(f"a sequence ends after {len(ids)} ids, but the grammar wants {grammar.wanted}")
        body_L = id_Q[start + 1 :]
        label = None if ids[start] == self.open_id else ids[start] - self.num_ids
        return ClipCodes(body_L[body_L < self.codebook_size], grammar.lengths, label, id_Q[:start])

    def _check(self, clip: ClipCodes) -> None:
        self.space.rows_of(torch.tensor(clip.lengths))
        if clip.lengths[: len(self.condition_lengths)] != self.condition_lengths:
            raise UserError(f"a clip of lengths {clip.lengths} does not begin with {self.condition_lengths}")
        if len(clip.condition_L) != self.condition_tokens:
            raise UserError(f"{len(clip.condition_L)} condition codes, but this layout has {self.condition_tokens}")
        if len(clip.code_L) != sum(clip.lengths):
            raise UserError(f"{len(clip.code_L)} codes do not fit lengths that add up to {sum(clip.lengths)}")
        all_L = torch.cat([clip.condition_L, clip.code_L])
        if not 0 <= int(all_L.min()) <= int(all_L.max()) < self.codebook_size:
            raise UserError(f"codes must lie in 0 .. {self.codebook_size - 1}; the clip was made by another tokenizer")


@dataclass(frozen=True)
class LengthRule:
    """Which lengths a sampler may choose: some blocks forced, or all of them together at most `max_tokens`.

    forced[t] is the length of block t; blocks behind its end are free. Made by `length_rule`, which checks it.
    """

    forced: tuple[int, ...] = ()
    max_tokens: int | None = None

    def allowed(self, space: AssignmentSpace, lengths: tuple[int, ...]) -> tuple[bool, ...]:
        """For each level: may the block after `lengths` have it, so that the rest can still be completed?"""
        block = len(lengths)
        if block < len(self.forced):
            return tuple(level == self.forced[block] for level in space.levels)
        if self.max_tokens is None:
            return (True,) * len(space.levels)
        left = self.max_tokens - sum(lengths) - self._least_after(space, block + 1)
        return tuple(level <= left for level in space.levels)

    def _least_after(self, space: AssignmentSpace, block: int) -> int:
        free_blocks = space.num_blocks - max(block, len(self.forced))
        return sum(self.forced[block:]) + free_blocks * space.levels[0]


def length_rule(layout: SequenceLayout, forced: Sequence[int] = (), max_tokens: int | None = None) -> LengthRule:
    """The rule for a layout: in frame prediction the blocks of the condition are forced in any case.

    Raises UserError for a length that is no level, for more lengths than blocks, if `forced` contradicts the
    condition, and for a limit that the smallest possible assignment exceeds.
    """
    forced = tuple(forced)
    _check_prefix(layout, forced)
    shared = min(len(forced), len(layout.condition_lengths))
    if forced[:shared] != layout.condition_lengths[:shared]:
        raise UserError(
            f"lengths {list(forced)} are forced, but this model's clips begin with {list(layout.condition_lengths)}"
        )
    rule = LengthRule(max(forced, layout.condition_lengths, key=len), max_tokens)
    least = rule._least_after(layout.space, 0)
    if max_tokens is not None and max_tokens < least:
        raise UserError(f"{max_tokens} tokens are below the smallest clip that is allowed here: {least}")
    return rule


def longest_sequence(layout: SequenceLayout, rule: LengthRule) -> int:
    """Ids of the longest sequence that `rule` allows: the places that a cache needs."""
    free = layout.num_blocks - len(rule.forced)
    tokens = sum(rule.forced) + free * layout.levels[-1]
    return layout.condition_tokens + 1 + min(tokens, rule.max_tokens or tokens) + layout.num_blocks


def _check_prefix(layout: SequenceLayout, lengths: Sequence[int]) -> None:
    """Plain numbers only: a layout is also made on the meta device."""
    strange = [length for length in lengths if length not in layout.levels]
    if strange:
        raise UserError(f"length {strange[0]} is none of the levels {list(layout.levels)}")
    if len(lengths) > layout.num_blocks:
        raise UserError(f"{len(lengths)} lengths {list(lengths)}, but a clip has {layout.num_blocks} blocks")


@dataclass
class Grammar:
    """The state of one row that is being written: which ids may come next, and when the clip is complete.

    A length token opens a block, then exactly that many codes follow; after the last block nothing does.
    """

    layout: SequenceLayout
    rule: LengthRule = LengthRule()
    lengths: tuple[int, ...] = ()
    codes_left: int = 0

    @property
    def finished(self) -> bool:
        return self.codes_left == 0 and len(self.lengths) == self.layout.num_blocks

    @property
    def wants_length(self) -> bool:
        return self.codes_left == 0 and not self.finished

    @property
    def wanted(self) -> str:
        return "nothing more" if self.finished else "a length token" if self.wants_length else "a code"

    def allowed_levels(self) -> tuple[bool, ...]:
        """For each level, whether its length token may come next."""
        if not self.wants_length:
            return (False,) * len(self.layout.levels)
        return self.rule.allowed(self.layout.space, self.lengths)

    def allowed_ids(self) -> Tensor:
        """bool [V], True for every id that may come next."""
        codes = torch.full((self.layout.codebook_size,), self.codes_left > 0)
        return torch.cat([codes, torch.tensor(self.allowed_levels())])

    def allows(self, token: int) -> bool:
        if 0 <= token < self.layout.codebook_size:
            return self.codes_left > 0
        return token < self.layout.num_ids and token >= 0 and self.allowed_levels()[token - self.layout.codebook_size]

    def advance(self, token: int) -> None:
        """Take in the next id, which must be allowed."""
        assert self.allows(token), f"id {token}, but the grammar wants {self.wanted}"
        if self.wants_length:
            length = self.layout.levels[token - self.layout.codebook_size]
            self.lengths, self.codes_left = (*self.lengths, length), length
        else:
            self.codes_left -= 1

    def skip_codes(self, num: int) -> None:
        """Take in `num` codes at once, whichever they are: how a sampler avoids asking a device for each of them."""
        assert num <= self.codes_left
        self.codes_left -= num


class BlockPositions:
    """The place of the next id in its temporal block: rows of a table that a GPT may learn.

    Row 0: it opens a block or begins the clip. Then a row for each code of each level, "the 5th of 32": the same one
    whatever precedes the block, whereas the absolute position moves with the lengths of the blocks before.
    """

    def __init__(self, layout: SequenceLayout, device: torch.device) -> None:
        self._layout = layout
        level_K = torch.tensor(layout.levels)
        first_K = 1 + level_K.cumsum(0) - level_K
        next_P = torch.arange(1, layout.num_block_positions + 1)
        next_P[first_K + level_K - 1] = next_P[0] = 0  # after the last code, and before a length token
        given = [first_K[layout.levels.index(n)] + torch.arange(n) for n in layout.condition_lengths]
        given_Q = torch.cat([*given, torch.zeros(1, dtype=torch.long)])[1:]  # empty if no frames are given
        self._level_K, self._first_K, self._next_P, self._given_Q = (
            x.to(device) for x in (level_K, first_K, next_P, given_Q)
        )

    def of(self, id_L: Tensor, position_L: Tensor) -> Tensor:
        """Packed sequences from their first ids on, and each id's position in its own -> int64 [L]."""
        layout, row_L = self._layout, torch.arange(len(id_L), device=id_L.device)
        marks_L = id_L >= layout.codebook_size  # length tokens and conditions
        mark_L = torch.where(marks_L, row_L, -1).cummax(dim=0).values  # the last one so far, of whichever sequence
        since_L, opener_L = row_L - mark_L, id_L[mark_L.clamp(min=0)]
        level_L = (opener_L - layout.codebook_size).clamp(0, len(layout.levels) - 1)
        in_block_L = (opener_L < layout.num_ids) & (since_L < self._level_K[level_L])
        inner_L = torch.where(in_block_L, self._first_K[level_L] + since_L, 0)
        if not len(self._given_Q):
            return inner_L
        return torch.where(since_L > position_L, self._given_Q[position_L.clamp(max=len(self._given_Q) - 1)], inner_L)

    def after(self, inner_S: Tensor, id_S: Tensor) -> Tensor:
        """Row of the next id, int64 [S], and the id drawn for it -> row of the id after it."""
        level_S = id_S - self._layout.codebook_size
        return torch.where(level_S >= 0, self._first_K[level_S.clamp(min=0)], self._next_P[inner_S])


@lru_cache(maxsize=8)
def block_positions(layout: SequenceLayout, device: torch.device) -> BlockPositions:
    """Made once, not in every step: its tables are copied to the device, which a GPU would be waited for."""
    return BlockPositions(layout, device)


@dataclass(frozen=True)
class PackedSequences:
    """Sequences one after the other, as training reads them: `id_L` goes in, `target_W` is what should come out.

    `lengths`: ids of each sequence. The first `given` ids of each (codes of the given frames; 640 in the paper)
    have no targets, and no logits are computed for them.
    """

    id_L: Tensor
    target_W: Tensor
    lengths: tuple[int, ...]
    given: int


def pack_sequences(layout: SequenceLayout, sequences: Sequence[Tensor]) -> PackedSequences:
    """Sequences of `encode` -> inputs and targets, shifted by one. Equal lengths become neighbours."""
    ordered, given = sorted(sequences, key=len), layout.condition_tokens
    inputs, targets = [id_Q[:-1] for id_Q in ordered], [id_Q[1 + given :] for id_Q in ordered]
    return PackedSequences(torch.cat(inputs), torch.cat(targets), tuple(map(len, inputs)), given)
