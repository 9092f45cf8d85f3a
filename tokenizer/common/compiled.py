"""torch.compile for the plain stretches of a layer, where the time between its matrix products goes.

Attention over packed sequences is one kernel whose plan changes with every batch, so it stays outside. What stands
between two attentions (norms, positions, projections, the feed-forward) is plain arithmetic over however many rows:
compiled once for any number of them, and once for all layers of a kind.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from tokenizer.common.errors import UserError

_held_off = False


class Layer(nn.Module):
    """A layer that hands its plain stretches to `stretch`."""

    compiled = False

    def stretch(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function(self, *inputs)`, compiled where that was asked for."""
        return (_compiled(function) if self.compiled and not _held_off else function)(self, *inputs)


def compile_layers(model: nn.Module, device: torch.device, asked_by: str, instead: str) -> None:
    """Have all layers of `model` compiled when they first run.

    Raises UserError where nothing can be compiled: `asked_by` names the setting, `instead` what the user may do.
    """
    if missing := missing_compiler(device):
        raise UserError(f"{asked_by} for {device} needs {missing}, or {instead}")
    for module in model.modules():
        if isinstance(module, Layer):
            module.compiled = True


def has_triton() -> bool:
    """Whether kernels can be written for a GPU; torch brings Triton along on Linux with CUDA."""
    return importlib.util.find_spec("triton") is not None


@contextmanager
def not_compiled() -> Iterator[None]:
    """Inside the `with` every layer runs as it is written: to count its operations, or for a few batches only."""
    global _held_off
    before, _held_off = _held_off, True
    try:
        yield
    finally:
        _held_off = before


def missing_compiler(device: torch.device) -> str | None:
    """What is not there to write the kernels, and what to do: Triton for a GPU, a C++ compiler for a CPU; else None."""
    if device.type == "cuda":
        return None if has_triton() else "the package triton: install it"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is not None:
        return None
    return f"a C++ compiler, and there is no {compiler!r}: install it, name another in CXX"


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo.exc import TorchDynamoException

    call = torch.compile(function, dynamic=True)

    def run(*inputs: Any) -> Any:
        try:
            return call(*inputs)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = str(cause).strip().partition("\n")[0]
            raise UserError(
                f"{function.__qualname__} cannot be compiled here ({type(cause).__name__}: {reason}); go on without "
                "run.compile or --compile"
            ) from error

    return run
