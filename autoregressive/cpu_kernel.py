"""Decoding kernels for a CPU (cpu_kernel.cpp): compiled with g++ on first use, kept in the user's cache folder.

torch copies the live part of a bf16 cache in every layer and step, and multiplies 2 to 16 rows at a third of the speed
of memory. The kernels read every byte once, where it lies. Without a compiler, or for shapes that they do not take,
callers use torch; results are equal up to rounding.

Letters: R rows of a step, S slots, G streams of a slot (R = S G), h heads, e head width, Q places of the cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

MOST_ROWS = 16  # of a product; with more, the matrix-matrix product of torch is as fast
_HEAD_WIDTHS = (16, 32, 64, 128)
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
_LINEAR = {torch.float32: "linear_float32", torch.bfloat16: "linear_bfloat16"}
_ATTEND = {torch.float32: "attend_float32", torch.bfloat16: "attend_bfloat16"}


def takes_cache(k_SGhQe: Tensor) -> bool:
    """Whether `attend` reads a cache of this device, precision and head width."""
    fits = k_SGhQe.device.type == "cpu" and k_SGhQe.dtype in _ATTEND and k_SGhQe.shape[-1] in _HEAD_WIDTHS
    return fits and library() is not None


def attend(q_Rhe: Tensor, k_Rhe: Tensor, v_Rhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, num_S: Tensor) -> Tensor:
    """Write the new keys and values at place num - 1 of each slot and attend to the first `num` -> [R, h, e].

    num_S: int64 on the CPU; 0 for an idle slot, whose rows are 0 and whose cache is left alone.
    """
    slots, streams, heads, places, width = k_SGhQe.shape
    assert k_SGhQe.is_contiguous() and v_SGhQe.is_contiguous() and q_Rhe.dtype == k_SGhQe.dtype
    # parts of one projection are read where they lie
    q_Rhe, k_Rhe, v_Rhe = (x if x.stride()[1:] == (width, 1) else x.contiguous() for x in (q_Rhe, k_Rhe, v_Rhe))
    mixed_Rhe = torch.empty(slots * streams, heads, width, dtype=q_Rhe.dtype)
    call = getattr(library(), _ATTEND[q_Rhe.dtype])
    call(
        *_pointers(q_Rhe, k_Rhe, v_Rhe, k_SGhQe, v_SGhQe, num_S),
        *_integers(slots, streams, heads, width, places, q_Rhe.stride(0), k_Rhe.stride(0), v_Rhe.stride(0)),
        *_pointers(mixed_Rhe),
    )
    return mixed_Rhe


def linear(layer: nn.Linear, x_RD: Tensor) -> Tensor:
    """`layer(x_RD)`, by a kernel for 2 to 16 rows on a CPU: float32, or bf16 if the processor multiplies tiles of it.

    With gradients, autocast, a bias, or while torch.compile looks on, it is the layer itself.
    """
    weight = layer.weight
    few = x_RD.device.type == "cpu" and 1 < len(x_RD) <= MOST_ROWS and x_RD.dtype == weight.dtype
    if (
        not few
        or x_RD.dtype not in _LINEAR
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return layer(x_RD)
    if layer.bias is not None or weight.shape[1] % 32 or len(weight) < 16 or not weight.is_contiguous():
        return layer(x_RD)
    if library() is None or (x_RD.dtype == torch.bfloat16 and not _has_tiles()):
        return layer(x_RD)
    x_RD = x_RD.contiguous()
    y_RN = torch.empty(len(x_RD), len(weight), dtype=x_RD.dtype)
    call = getattr(library(), _LINEAR[x_RD.dtype])
    call(*_pointers(x_RD, weight), *_integers(len(x_RD), *reversed(weight.shape)), *_pointers(y_RN))
    return y_RN


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _integers(*numbers: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(number) for number in numbers]


@cache
def _has_tiles() -> bool:
    found = library()
    return found is not None and bool(found.has_tiles())


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if there is no compiler, or not the OpenMP that torch runs on."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    openmp = sorted(Path(torch.__file__).with_name("lib").glob("libgomp*.so*"))
    if compiler is None or not openmp:
        return None
    key = repr((_SOURCE.read_bytes(), compiler, _FLAGS, str(openmp[0]), _cpu())).encode()
    name = f"cpu_kernel-{hashlib.sha256(key).hexdigest()[:16]}.so"
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evatok"
    for folder in (kept, Path(tempfile.gettempdir()) / f"evatok-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():  # a library that somebody else could have put there is not loaded
                continue
            path = folder / name
            if not path.is_file():
                _compile(compiler, path, openmp[0])
            return ctypes.CDLL(str(path))
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or error
            log.info("cpu_kernel.cpp cannot be compiled into %s (%s)", folder, reason)
    return None


def _compile(compiler: str, path: Path, openmp: Path) -> None:
    """Compile and link with torch's own OpenMP, so that both share one pool of threads."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built, aside = Path(folder) / "kernel.o", Path(folder) / path.name
        for command in (
            [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(built)],
            [compiler, "-shared", str(built), str(openmp), "-o", str(aside)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(aside, path)


def _cpu() -> str:
    """What -march=native depends on: another machine may share the cache folder."""
    info = Path("/proc/cpuinfo")
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")] if info.is_file() else []
    return f"{platform.machine()} {platform.processor()} {flags[:1]}"
