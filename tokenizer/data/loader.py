"""Batches in a fixed order: what a training step sees depends on (seed, step) alone, however many workers load it and
however many processes share it.

The state of the loader is three integers: seed, step, global batch size. Nothing is stored for a resume.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from tokenizer.common import distributed
from tokenizer.common.clip_shape import sides
from tokenizer.common.device import endless_order, to_video
from tokenizer.common.distributed import BatchShard, balance_load
from tokenizer.common.errors import UserError
from tokenizer.data.clips import ClipDataset, ClipSample

_BATCHES_AHEAD = 2  # of each worker: the default of DataLoader
_GRACE_S = 60  # that a worker outlives a SIGTERM, so that the step ends and a checkpoint is written


@dataclass(frozen=True)
class ClipBatch:
    """B clips, uint8 [B, C, T, H, W], with name, label and kind of each (None if unknown).

    `unreadable`: damaged files (with reasons) that were met for this batch, or before the first one.
    """

    frames_BCTHW: torch.Tensor
    names: list[str]
    labels: list[str | None]
    kinds: list[str | None]
    unreadable: dict[str, str]
    shard: BatchShard

    def pin_memory(self) -> ClipBatch:
        """The same in memory that a GPU can fetch by itself while the last step still runs; called by DataLoader."""
        return replace(self, frames_BCTHW=self.frames_BCTHW.pin_memory())

    @property
    def video_BCTHW(self) -> torch.Tensor:
        """float32 in [0, 1], on the CPU."""
        return self.video("cpu")

    def video(self, device: torch.device | str) -> torch.Tensor:
        """float32 in [0, 1] on `device`."""
        return to_video(self.frames_BCTHW, device)

    def split(self, num_parts: int) -> list[ClipBatch]:
        """Parts of equally many clips, in order."""
        size = len(self.names) // num_parts
        cuts = [slice(part * size, (part + 1) * size) for part in range(num_parts)]
        return [
            ClipBatch(
                self.frames_BCTHW[cut],
                self.names[cut],
                self.labels[cut],
                self.kinds[cut],
                self.unreadable if cut.start == 0 else {},
                BatchShard(self.shard.rows[cut], self.shard.total),
            )
            for cut in cuts
        ]


Costs = Callable[[int], Sequence[float]]
"""step -> cost of each clip of its global batch, if that is known before the clips are read."""


def batches(
    dataset: ClipDataset,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    steps: int | None = None,
    accumulate: int = 1,
    costs: Costs | None = None,
    whole: bool = False,
    pinned: bool = False,
) -> Iterator[ClipBatch]:
    """Shuffled batches from `start_step` on, over as many epochs as needed; `steps` batches, or without end.

    Step s takes clips s * batch_size and following of the shuffled epochs, put end to end, so a batch may span two.
    `batch_size` is the global one: each process gets its share, in `accumulate` parts one after the other (see
    `split`), balanced by `costs`. With `whole`, every process gets everything. `pinned`: for a GPU, see
    `ClipBatch.pin_memory`. UserError if the batches do not fit into shared memory.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size={batch_size} must be at least 1 and num_workers={num_workers} at least 0")
    num_ranks, rank = (1, 0) if whole else (distributed.num_ranks(), distributed.rank())
    balance_load(batch_size, num_ranks * accumulate)  # a batch that cannot be shared is refused before anything is read

    def own_places(step: int) -> list[int]:
        parts = balance_load(batch_size, num_ranks * accumulate, None if costs is None else costs(step))
        return list(itertools.chain(*parts[rank * accumulate : (rank + 1) * accumulate]))

    if num_workers:
        clip_bytes = 3 * dataset.cfg.num_frames * math.prod(sides(dataset.cfg.size))
        check_shared_memory(batch_size // num_ranks * clip_bytes, num_workers)
    loader = DataLoader(
        _Keyed(dataset),
        batch_sampler=_StepSampler(len(dataset), batch_size, seed, start_step, steps, own_places),
        num_workers=num_workers,
        collate_fn=partial(_collate, batch_size),
        worker_init_fn=_begin_worker,
        pin_memory=pinned,
        generator=torch.Generator().manual_seed(seed),  # or each pass would draw from, and so shift, the global one
    )
    before = dict(dataset.quarantine)
    for batch in loader:
        if batch.unreadable:
            dataset.put_aside(batch.unreadable)
        yield replace(batch, unreadable=before | batch.unreadable) if before else batch
        before = {}


def check_shared_memory(batch_bytes: int, num_workers: int, folder: str = "/dev/shm") -> None:
    """UserError if the batches that data workers hand over may not fit into shared memory."""
    if not os.path.isdir(folder):  # macOS: no such limit
        return
    facts = os.statvfs(folder)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this machine share it
    needed, free = batch_bytes * (_BATCHES_AHEAD * num_workers + 1) * here, facts.f_bavail * facts.f_frsize
    if needed > free:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MiB free, and {num_workers} data workers may fill {needed / 2**20:.0f} "
            "MiB: enlarge it (docker run --shm-size=8g), or set run.num_workers=0 or a smaller run.batch_size"
        )


class _StepSampler:
    """Lists of (place in the global batch, index, epoch), one list per step."""

    def __init__(
        self,
        num_clips: int,
        batch_size: int,
        seed: int,
        start_step: int,
        steps: int | None,
        own_places: Callable[[int], list[int]],
    ) -> None:
        self.num_clips, self.batch_size, self.seed = num_clips, batch_size, seed
        self.start_step, self.steps, self.own_places = start_step, steps, own_places

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        keys = endless_order(self.num_clips, self.seed, self.start_step * self.batch_size)
        for number in itertools.count() if self.steps is None else range(self.steps):
            everything = list(itertools.islice(keys, self.batch_size))
            yield [(place, *everything[place]) for place in self.own_places(self.start_step + number)]


class _Keyed(Dataset[tuple[int, ClipSample]]):
    """ClipDataset as torch's DataLoader wants it: one key, here (place, index, epoch)."""

    def __init__(self, dataset: ClipDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[int, ClipSample]:
        place, index, epoch = key
        return place, self.dataset.get(index, epoch)


def _collate(batch_size: int, placed: list[tuple[int, ClipSample]]) -> ClipBatch:
    samples = [sample for _, sample in placed]
    return ClipBatch(
        frames_BCTHW=torch.stack([sample.frames_CTHW for sample in samples]),
        names=[sample.name for sample in samples],
        labels=[sample.label for sample in samples],
        kinds=[sample.kind for sample in samples],
        unreadable={name: reason for sample in samples for name, reason in sample.unreadable.items()},
        shard=BatchShard([place for place, _ in placed], batch_size),
    )


def _begin_worker(worker: int) -> None:
    """Leave signals to the main process, which ends its workers once a checkpoint is saved.

    Schedulers and Ctrl-C signal the whole process group. A worker that died of it would end the run before it saves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
