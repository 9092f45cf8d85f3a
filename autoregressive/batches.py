"""The clips of a training step, packed: a pure function of (seed, step, rank).

Clips come from an endless row of shuffled epochs. A step takes the next `clips` of them, shared out so that all ranks
compute equally much, or with a budget as many as fit into `most_ids` ids on each rank.

Letters: L packed ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from autoregressive.sequence import PackedSequences, SequenceLayout, pack_sequences
from autoregressive.token_archive import TokenArchive
from tokenizer.common.device import endless_order, generator_for
from tokenizer.common.distributed import balanced_partition
from tokenizer.common.errors import UserError

_OPEN_BINS = 8  # filled at the same time; more of them waste less room and change the order more


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of one rank in one step, as `SequenceLayout.encode` writes them."""

    layout: SequenceLayout
    sequences: list[Tensor]
    width: int  # of the model that reads them
    num_in_step: int = 0  # over all ranks
    part_sizes: tuple[int, ...] = ()  # how many sequences each part has, in order; (): they are shared out by `split`

    @cached_property
    def packed(self) -> PackedSequences:
        return pack_sequences(self.layout, self.sequences)

    @property
    def num_targets(self) -> int:
        return len(self.packed.target_W)

    def split(self, num_parts: int) -> list[TokenBatch]:
        """Parts of nearly equal cost, for gradients that are added up (run.accumulate)."""
        if len(self.part_sizes) == num_parts:
            rest = iter(self.sequences)
            parts = [list(itertools.islice(rest, size)) for size in self.part_sizes]
            return [TokenBatch(self.layout, part, self.width) for part in parts]
        if num_parts > len(self.sequences):
            raise UserError(f"run.accumulate={num_parts} parts, but a process has {len(self.sequences)} clips a step")
        shares = balanced_partition([cost(len(id_Q), self.width) for id_Q in self.sequences], num_parts)
        return [TokenBatch(self.layout, [self.sequences[i] for i in share], self.width) for share in shares]


@dataclass(frozen=True)
class BatchRule:
    """How the endless row is cut into steps: `clips` a step, or up to `most_ids` ids a rank if that is not 0."""

    seed: int
    clips: int
    most_ids: int = 0
    class_dropout: float = 0.0  # part of the clips whose class is hidden, for guidance
    rank: int = 0
    num_ranks: int = 1
    num_parts: int = 1  # run.accumulate: into which each rank's share of `clips` is cut


def token_batches(
    archive: TokenArchive, layout: SequenceLayout, width: int, rule: BatchRule, start_step: int = 0
) -> Iterator[TokenBatch]:
    """The batches of a rank from `start_step` on, without end. `width`: of the model, see `cost`.

    Raises UserError if `most_ids` is below the longest clip, or a step has fewer clips than ranks.
    """
    num_inputs = [layout.num_inputs(tokens) for tokens in archive.length_SN.sum(dim=1).tolist()]
    for step, (clips, shares) in enumerate(_plan(num_inputs, width, rule, start_step), start=start_step):
        # drawn for the whole step, so that the number of ranks does not change which classes are hidden
        generator = generator_for(rule.seed, "class dropout", step)
        hidden = (torch.rand(len(clips), generator=generator) < rule.class_dropout).tolist()
        parts = shares[rule.rank :: rule.num_ranks]
        mine = [(archive.clip(clips[place]), hidden[place]) for part in parts for place in part]
        shown = [replace(clip, label=None) if hide else clip for clip, hide in mine]
        sequences = [layout.encode(clip) for clip in shown]
        yield TokenBatch(layout, sequences, width, len(clips), tuple(map(len, parts)))


def cost(num_ids: int, width: int) -> float:
    """Cost of a sequence in each layer, in some unit: matrices grow with its ids, attention with their square."""
    return num_ids * (12.0 * width + num_ids)


def fill_bins(clips: Iterable[int], size_of: Callable[[int], int], room: int) -> Iterator[list[int]]:
    """Clips in order -> bins of at most `room`: each clip goes into the first open bin that has room for it.

    If none has room, the fullest open bin is handed out and a new one opened.
    """
    bins: list[tuple[list[int], int]] = []
    for clip in clips:
        size = size_of(clip)
        place = next((i for i, (_, used) in enumerate(bins) if used + size <= room), None)
        if place is None:
            if len(bins) == _OPEN_BINS:
                yield bins.pop(max(range(_OPEN_BINS), key=lambda i: bins[i][1]))[0]
            bins.append(([], 0))
            place = len(bins) - 1
        held, used = bins[place]
        held.append(clip)
        bins[place] = (held, used + size)


def _plan(
    num_inputs: Sequence[int], width: int, rule: BatchRule, start_step: int
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """For each step from `start_step` on: its clips, and for each part the places of its own among them.

    Part p of rank r is number p x num_ranks + r: the most expensive clip goes to part 0 of rank 0, the next to rank 1.
    """
    num_shares = rule.num_ranks * rule.num_parts
    if not rule.most_ids:
        if rule.clips < num_shares:
            raise UserError(
                f"run.batch_size={rule.clips} clips for {rule.num_ranks} processes x run.accumulate={rule.num_parts}: "
                "give each part at least one"
            )
        row = (clip for clip, _ in endless_order(len(num_inputs), rule.seed, start_step * rule.clips))
        while True:
            clips = list(itertools.islice(row, rule.clips))
            yield clips, balanced_partition([cost(num_inputs[clip], width) for clip in clips], num_shares)
    if max(num_inputs) > rule.most_ids:
        raise UserError(f"batch_ids={rule.most_ids} is less than the {max(num_inputs)} ids of the longest clip")
    # what a bin holds depends on all before it: they are counted again, about a second for a million clips
    row = (clip for clip, _ in endless_order(len(num_inputs), rule.seed, 0))
    bins = fill_bins(row, num_inputs.__getitem__, rule.most_ids)
    bins = itertools.islice(bins, start_step * rule.num_ranks, None)
    while True:
        filled = list(itertools.islice(bins, rule.num_ranks))
        places = iter(range(sum(map(len, filled))))
        yield [clip for clips in filled for clip in clips], [list(itertools.islice(places, len(c))) for c in filled]
