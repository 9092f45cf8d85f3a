"""The device's part of a sampling step, compiled, and on a GPU recorded as CUDA graphs that are replayed.

A step takes one number, how many cached keys it reads ("live"), and returns nothing: all that it reads and writes
stays where it is, and its noise comes from keys, not from a generator. So nothing has to be copied into a graph or out
of it, and replaying one is the whole step: a launch, without any look at the device.

    compile   the first number of keys is compiled as a constant, the second as a symbol, the later ones not at all
    record    on a GPU, one graph for each number of keys, when it first occurs; they share their memory, because no two
              run at once and none leaves anything there for another

Generated kernels round differently from the plain step, which can tip a draw, above all in half precision. The tests
run the step as torch.compile traces and lowers it, but operation by operation, and record it with a stand-in; the
generated kernels and the CUDA graphs were not run where this was written.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenizer.common.errors import UserError

Run = Callable[[], None]
Record = Callable[[Run, Run], Run]
"""(rehearsal, step) -> what replays the step. The rehearsal is a step that leaves no trace; the step is recorded, not
run."""

_REHEARSALS = 2  # before recording: the first compiles, and kernels set themselves up when they first run


class CompiledStep:
    """`advance(live)`, compiled. `moving`: the tensors that take a step from one place to the next.

    A step from the same `moving` does the same again, so putting them back undoes it: whatever else was written is
    written once more.
    """

    def __init__(
        self,
        advance: Callable[[int], None],
        moving: Sequence[Tensor],
        device: torch.device,
        backend: str = "inductor",
        record: Record | None = None,
    ) -> None:
        """Raises UserError where nothing can be compiled for `device`."""
        if backend == "inductor":
            check_can_compile(device)
        if record is None and device.type == "cuda":
            record = CudaGraphs(device)
        self._advance = torch.compile(advance, fullgraph=True, backend=backend)
        self._moving, self._device, self._record = moving, device, record
        self._replay_of: dict[int, Run] = {}

    def __call__(self, live: int) -> None:
        if self._record is None:
            self._run(live)
            return
        if live not in self._replay_of:
            self._replay_of[live] = self._record(lambda: self._rehearse(live), lambda: self._run(live))
        self._replay_of[live]()

    def _rehearse(self, live: int) -> None:
        before = [tensor.clone() for tensor in self._moving]
        self._run(live)
        for tensor, value in zip(self._moving, before, strict=True):
            tensor.copy_(value)

    def _run(self, live: int) -> None:
        from torch._dynamo.exc import TorchDynamoException  # what nobody needs who does not compile

        try:
            self._advance(live)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = str(cause).strip().partition("\n")[0]
            raise UserError(
                f"--compile: the step cannot be compiled for {self._device} ({type(cause).__name__}: {reason}); "
                "sample without it"
            ) from error


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
            with torch.cuda.graph(graph, pool=self._pool):
                step()
        return graph.replay


def check_can_compile(device: torch.device) -> None:
    """Raises UserError where what writes the kernels is missing: Triton for a GPU, a C++ compiler for a CPU."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError(f"--compile for {device} needs the package triton: install it, or sample without --compile")
        return
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"--compile for {device} needs a C++ compiler, and there is no {compiler!r}: install it, name another in "
            "CXX, or sample without --compile"
        )
