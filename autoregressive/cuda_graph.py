"""A sampling step on a GPU, recorded as a CUDA graph: replaying it is one launch, without any look at the device.

A step is told how many cached keys it reads ("live") and returns nothing: all that it reads and writes stays where it
is, and its noise comes from keys, not from a generator. So nothing has to be copied into a graph or out of it. There is
one graph for each number of keys, recorded when it first occurs; they share their memory, because no two run at once
and none leaves anything there for another. With Triton the kernel finds the number itself (decode_kernel.py), and there
is one graph. The recorded kernels are those of the plain step, so its clips are the same to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from autoregressive.attention import Live

Run = Callable[[], None]
Record = Callable[[Run, Run], Run]
"""(rehearsal, step) -> what replays the step. The rehearsal is a step that leaves no trace; the step is recorded, not
run."""

_REHEARSALS = 2  # before recording: kernels are compiled, and set themselves up, when they first run


class GraphedStep:
    """`advance(live)`, recorded. `moving`: the tensors that take a step from one place to the next.

    A step from the same `moving` does the same again, so putting them back undoes it: whatever else was written is
    written once more.
    """

    def __init__(self, advance: Callable[[Live], None], moving: Sequence[Tensor], record: Record) -> None:
        self._advance, self._moving, self._record = advance, moving, record
        self._replay_of: dict[Live, Run] = {}

    @property
    def num_graphs(self) -> int:
        """Graphs that were recorded so far."""
        return len(self._replay_of)

    def __call__(self, live: Live) -> None:
        if live not in self._replay_of:
            with _any_kernels():
                self._replay_of[live] = self._record(lambda: self._rehearse(live), lambda: self._advance(live))
        self._replay_of[live]()

    def _rehearse(self, live: Live) -> None:
        before = [tensor.clone() for tensor in self._moving]
        self._advance(live)
        for tensor, value in zip(self._moving, before, strict=True):
            tensor.copy_(value)


class CudaGraphs:
    """Records on one GPU; all its graphs share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, rehearse: Run, step: Run) -> Run:
        with torch.cuda.device(self._device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(_REHEARSALS):
                    rehearse()
            here.wait_stream(aside)
            graph: Any = torch.cuda.CUDAGraph()
            # thread_local: other threads (a checkpoint's writer, NCCL's watchdog) may talk to the GPU meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
        return graph.replay


@contextmanager
def _any_kernels() -> Iterator[None]:
    """Inside a training, whose kernels are to be deterministic: a step writes each place once, so all of them are.

    Those that torch takes for deterministic ones sort first.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)


def weakly(advance: Callable[[Live], None]) -> Callable[[Live], None]:
    """A method that does not keep its sampler alive: cache and graphs are given back when nobody needs them."""
    reference = weakref.WeakMethod(advance)

    def call(live: Live) -> None:
        method = reference()
        assert method is not None, "a sampler runs its own steps"
        method(live)

    return call
