"""Which clips a training step sees, packed: a pure function of (seed, step), and of the rank where there are several.

The clips stand in an endless row of shuffled epochs. A step takes either the next `clips` of them, shared out so that
all ranks have equally much to compute, or, with a budget, as many as fit into `most_ids` ids for each rank.

Letters: L packed ids.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from autoregressive.sequence import IGNORE, PackedSequences, SequenceLayout, pack_sequences
from autoregressive.token_archive import TokenArchive
from tokenizer.common.errors import UserError
from tokenizer.common.runtime import generator_for
from tokenizer.data.loader import epoch_order

_OPEN_BINS = 8  # batches that are filled at the same time; more of them waste less room and mix the order more


@dataclass(frozen=True)
class TokenBatch:
    """What one rank reads in one step. `num_targets`: ids to be said by all ranks of this step together."""

    packed: PackedSequences
    num_targets: int


@dataclass(frozen=True)
class BatchRule:
    """How steps are cut out of the endless row: `clips` a step, or where `most_ids` is not 0, so many ids a rank."""

    seed: int
    clips: int
    most_ids: int = 0
    class_dropout: float = 0.0  # part of the clips whose class is hidden, for guidance
    rank: int = 0
    num_ranks: int = 1


def token_batches(
    archive: TokenArchive, layout: SequenceLayout, width: int, rule: BatchRule, start_step: int = 0
) -> Iterator[TokenBatch]:
    """The batches of a rank from `start_step` on, without end. `width`: of the model, for its cost at a given length.

    Raises UserError where `most_ids` is less than the longest clip has, or a step has fewer clips than ranks.
    """
    num_inputs = [layout.num_inputs(tokens) for tokens in archive.length_SN.sum(dim=1).tolist()]
    for step, clips_of_ranks in enumerate(_plan(num_inputs, width, rule, start_step), start=start_step):
        everyone = [clip for clips in clips_of_ranks for clip in clips]
        draw_S = torch.rand(len(everyone), generator=generator_for(rule.seed, "class dropout", step))
        hidden = (draw_S < rule.class_dropout).tolist()
        first = sum(map(len, clips_of_ranks[: rule.rank]))
        mine = clips_of_ranks[rule.rank]
        chosen = ((archive.clip(clip), hidden[first + place]) for place, clip in enumerate(mine))
        clips = [replace(clip, label=None) if hide else clip for clip, hide in chosen]
        num_targets = sum(num_inputs[clip] - layout.condition_tokens for clip in everyone)
        yield TokenBatch(pack_sequences(layout, [layout.encode(clip) for clip in clips]), num_targets)


def count_targets(packed: PackedSequences) -> int:
    """Ids that a model is asked to say."""
    return int((packed.target_L != IGNORE).sum())


def share_out(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Indices of `costs` for each rank, so that the sums are nearly equal: the dearest first, to whom has least."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    least = [(0.0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        total, rank = heapq.heappop(least)
        shares[rank].append(index)
        heapq.heappush(least, (total + costs[index], rank))
    return shares


def fill_bins(clips: Iterable[int], size_of: Callable[[int], int], room: int) -> Iterator[list[int]]:
    """Clips in order -> bins of at most `room`: each clip goes into the first open bin that has room for it.

    Where none has, the fullest of the open bins is handed out and a new one is begun.
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


def _plan(num_inputs: Sequence[int], width: int, rule: BatchRule, start_step: int) -> Iterator[list[list[int]]]:
    """For each step from `start_step` on: the clips of each rank."""
    if not rule.most_ids:
        if rule.clips < rule.num_ranks:
            raise UserError(f"run.batch_size={rule.clips} clips for {rule.num_ranks} processes: give at least one each")
        clips = _endless_row(len(num_inputs), rule.seed, start_step * rule.clips)
        while True:
            step = list(itertools.islice(clips, rule.clips))
            # a clip of Q ids costs about Q * (12 width + Q) in each layer: matrices and attention
            shares = share_out([num_inputs[i] * (12.0 * width + num_inputs[i]) for i in step], rule.num_ranks)
            yield [[step[place] for place in share] for share in shares]
    if max(num_inputs) > rule.most_ids:
        raise UserError(f"batch_ids={rule.most_ids} is less than the {max(num_inputs)} ids of the longest clip")
    # which bin a step has depends on all before it: they are counted again, about a second for a million clips
    bins = fill_bins(_endless_row(len(num_inputs), rule.seed, 0), num_inputs.__getitem__, rule.most_ids)
    bins = itertools.islice(bins, start_step * rule.num_ranks, None)
    while True:
        yield list(itertools.islice(bins, rule.num_ranks))


def _endless_row(num_clips: int, seed: int, start: int) -> Iterator[int]:
    """Shuffled epochs, one after the other, from place `start` on."""
    first_epoch, skip = divmod(start, num_clips)
    for epoch in itertools.count(first_epoch):
        yield from epoch_order(num_clips, seed, epoch)[skip:]
        skip = 0
