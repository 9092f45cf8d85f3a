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


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Have all layers of `model` compiled when they first run. Raises UserError where nothing can be compiled."""
    check_can_compile(device, "run.compile=true", "train without it")
    for module in model.modules():
        if isinstance(module, Layer):
            module.compiled = True


@contextmanager
def not_compiled() -> Iterator[None]:
    """Inside the `with` every layer runs as it is written: to count its operations, or for a few batches only."""
    global _held_off
    before, _held_off = _held_off, True
    try:
        yield
    finally:
        _held_off = before


def check_can_compile(device: torch.device, what: str, instead: str) -> None:
    """Raises UserError where what writes the kernels is missing: Triton for a GPU, a C++ compiler for a CPU.

    `what` was asked for by the user, who may do `instead`.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError(f"{what} for {device} needs the package triton: install it, or {instead}")
        return
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{what} for {device} needs a C++ compiler, and there is no {compiler!r}: install it, name another in CXX, "
            f"or {instead}"
        )


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
