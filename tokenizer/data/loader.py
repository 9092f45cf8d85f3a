"""Batches in a fixed order: what a training step sees depends on (seed, step) alone, however many workers load it.

The state of the loader is three integers: seed, step, batch size. Nothing is stored for a resume.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from tokenizer.common.errors import UserError
from tokenizer.data.clips import ClipDataset, ClipSample
from tokenizer.data.transforms import rng_for


@dataclass(frozen=True)
class ClipBatch:
    """B clips, float32 [B, C, T, H, W] in [0, 1], with name, label and kind of each (None where unknown)."""

    video_BCTHW: torch.Tensor
    names: list[str]
    labels: list[str | None]
    kinds: list[str | None]
    unreadable: dict[str, str]


def batches(
    dataset: ClipDataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    steps: int | None = None,
) -> Iterator[ClipBatch]:
    """Shuffled batches from `start_step` on, over as many epochs as needed; `steps` batches, or without end.

    The clips of step s are places s * batch_size .. of the endless row of shuffled epochs, so a batch may span two.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size={batch_size} must be at least 1 and num_workers={num_workers} at least 0")
    loader = DataLoader(
        _Keyed(dataset),
        batch_sampler=_StepSampler(len(dataset), batch_size, seed, start_step, steps),
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_begin_worker,
        generator=torch.Generator().manual_seed(seed),  # or each pass would draw from, and so shift, the global one
    )
    for batch in loader:
        dataset.put_aside(batch.unreadable)
        yield batch


def epoch_order(num_clips: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch: each index once, shuffled by (seed, epoch)."""
    return rng_for(seed, "order", epoch).permutation(num_clips).tolist()


class _StepSampler:
    """Lists of (index, epoch), one list per step."""

    def __init__(self, num_clips: int, batch_size: int, seed: int, start_step: int, steps: int | None) -> None:
        self.num_clips, self.batch_size, self.seed = num_clips, batch_size, seed
        self.start_step, self.steps = start_step, steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        places = self._places()
        for _ in itertools.count() if self.steps is None else range(self.steps):
            yield list(itertools.islice(places, self.batch_size))

    def _places(self) -> Iterator[tuple[int, int]]:
        first_epoch, skip = divmod(self.start_step * self.batch_size, self.num_clips)
        for epoch in itertools.count(first_epoch):
            for index in epoch_order(self.num_clips, self.seed, epoch)[skip:]:
                yield index, epoch
            skip = 0


class _Keyed(Dataset[ClipSample]):
    """ClipDataset as torch's DataLoader wants it: one key, here (index, epoch)."""

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> ClipSample:
        return self.dataset.get(*key)


def _collate(samples: list[ClipSample]) -> ClipBatch:
    return ClipBatch(
        video_BCTHW=torch.stack([sample.video_CTHW for sample in samples]),
        names=[sample.name for sample in samples],
        labels=[sample.label for sample in samples],
        kinds=[sample.kind for sample in samples],
        unreadable={name: reason for sample in samples for name, reason in sample.unreadable.items()},
    )


def _begin_worker(worker: int) -> None:
    """The main process answers Ctrl-C and SIGTERM and then ends its workers; they must not answer on their own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
