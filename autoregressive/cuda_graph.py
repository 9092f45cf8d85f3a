"""A sampling step on a GPU as a CUDA graph: one launch a step, and the host never waits.

A step gets the number of cached keys it reads and returns nothing: its inputs and outputs stay in place, and its noise
comes from keys, not from a generator, so nothing is copied into or out of a graph. With Triton the kernel reads that
number on the device (decode_kernel.py) and one graph is enough. Without it there is one graph for each number of keys,
captured when it first occurs; they share one memory pool, because no two run at once. The captured kernels are those of
the plain step, so the clips are equal to the bit.
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
Capture = Callable[[Run, Run], Run]
"""(warm-up, step) -> a function that replays the step. The warm-up is a step without effect; the step is captured, not
run."""

_WARM_UPS = 2  # before a capture: kernels are compiled and allocate when they first run


class GraphedStep:
    """`advance(live)` as CUDA graphs. `state`: the tensors that a step reads and changes.

    A step from the same `state` writes the same again, so restoring `state` undoes a step.
    """

    def __init__(self, advance: Callable[[Live], None], state: Sequence[Tensor], capture: Capture) -> None:
        self._advance, self._state, self._capture = advance, state, capture
        self._replay_of: dict[Live, Run] = {}

    @property
    def num_graphs(self) -> int:
        return len(self._replay_of)

    def __call__(self, live: Live) -> None:
        if live not in self._replay_of:
            with _any_kernels():
                self._replay_of[live] = self._capture(lambda: self._warm_up(live), lambda: self._advance(live))
        self._replay_of[live]()

    def _warm_up(self, live: Live) -> None:
        before = [tensor.clone() for tensor in self._state]
        self._advance(live)
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)


class CudaGraphs:
    """Captures on one GPU; all graphs share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, warm_up: Run, step: Run) -> Run:
        with torch.cuda.device(self._device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    warm_up()
            here.wait_stream(aside)
            graph: Any = torch.cuda.CUDAGraph()
            # thread_local: other threads (a checkpoint's writer, NCCL's watchdog) may talk to the GPU meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
        return graph.replay


@contextmanager
def _any_kernels() -> Iterator[None]:
    """Inside a training that asks for deterministic kernels: a step writes each place once, so all of its kernels are.

    The ones that torch would choose instead sort first.
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


def weak_method(advance: Callable[[Live], None]) -> Callable[[Live], None]:
    """A method that does not keep its sampler alive, so that cache and graphs are freed with it."""
    reference = weakref.WeakMethod(advance)

    def call(live: Live) -> None:
        method = reference()
        assert method is not None, "a sampler runs its own steps"
        method(live)

    return call
