"""Device, copies to it, precision, compilation, random numbers; speed of a device, cost of a step."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tokenizer.common.distributed import local_rank
from tokenizer.common.errors import UserError

PRECISIONS: dict[str, torch.dtype] = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SLOW = 1.5  # times as long as float32


def pick_device(name: str) -> torch.device:
    """`auto` (the GPU if there is one), `cpu`, `cuda` or `cuda:N`. UserError for a device that does not exist.

    Every entry calls it, so it also sets what float32 means on a GPU, see `set_float32`. Of several processes on a
    machine each takes the GPU of its local rank, unless the name holds a number; where there
    are more processes than visible GPUs they share them in turn. A GPU becomes the current one: kernels start there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank() % max(1, torch.cuda.device_count())}"
    set_float32()
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdigit() or name == "cpu"):
        raise UserError(f"device={name!r}: must be auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        if int(index) >= torch.cuda.device_count():
            raise UserError(f"device={name!r}: torch sees {torch.cuda.device_count()} GPUs here; use auto or cpu")
        torch.cuda.set_device(int(index))
    return torch.device(name)


def set_float32() -> None:
    """float32 products and convolutions on a GPU in full float32: TF32 would change tokens and metrics silently."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def float32_mode() -> str:
    """What float32 means in this process, for protocol cards: "matmul ieee, conv ieee", or tf32 in place of ieee."""
    switches = {"matmul": torch.backends.cuda.matmul.allow_tf32, "conv": torch.backends.cudnn.allow_tf32}
    return ", ".join(f"{name} {'tf32' if on else 'ieee'}" for name, on in switches.items())


def pick_dtype(precision: str) -> torch.dtype:
    """`none` -> float32, `bf16` -> bfloat16, `fp16` -> float16."""
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which matrix products run in `precision`; with `none` it does nothing."""
    dtype = pick_dtype(precision)
    if precision == "none":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def slow_precision(device: torch.device, precision: str, size: int = 256) -> str | None:
    """A warning if `precision` is slower than float32: a CPU without instructions for it emulates them.

    Measured on a matrix product, in less than a tenth of a second; None on a GPU.
    """
    if device.type != "cpu" or precision == "none":
        return None

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(2, size, size, dtype=dtype)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        return min(times)

    ratio = seconds(pick_dtype(precision)) / seconds(torch.float32)
    if ratio < _SLOW:
        return None
    return (
        f"on this CPU a matrix product in {precision} takes {ratio:.0f} times as long as in float32: "
        "run.precision=none is faster here"
    )


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on `device`; a GPU fetches it out of pinned memory by itself.

    An ordinary copy waits until the GPU has done all that was asked of it before, and then the GPU waits for the host.
    """
    device = torch.device(device)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.is_cpu else x.to(device)


def to_video(frames: Tensor, device: torch.device | str) -> Tensor:
    """uint8 of any shape -> float32 in [0, 1] on `device`; bytes travel there, a quarter of the numbers."""
    frames = send(frames, device)
    # 255 as a tensor: CUDA would multiply by a rounded 1/255, and values would differ from those of the CPU
    return frames.to(torch.float32).div_(torch.full((), 255.0, device=frames.device))


def batches_at_once(device: torch.device) -> int:
    """Threads that compute batches. Two on a GPU: the host's part of one runs while the GPU computes another."""
    return 1 if device.type == "cpu" else 2


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator that depends on `seed` and `keys` alone, say `generator_for(run.seed, "lengths", step)`.

    Steps draw from such generators, so a resume is exact without stored generator states.
    """
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def rng_for(seed: int, *keys: int | str) -> np.random.Generator:
    """A numpy generator that depends on the arguments and on nothing else, the same in every process and machine."""
    return np.random.default_rng(derive_seed(seed, *keys))


def epoch_order(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, int64 [num_clips]: each index once, shuffled by (seed, epoch)."""
    return rng_for(seed, "order", epoch).permutation(num_clips)


def endless_order(num_clips: int, seed: int, start: int) -> Iterator[tuple[int, int]]:
    """(index, epoch) of shuffled epochs put end to end, from place `start` on."""
    first_epoch, skip = divmod(start, num_clips)
    orders = ((epoch_order(num_clips, seed, epoch), epoch) for epoch in itertools.count(first_epoch))
    keys = itertools.chain.from_iterable(zip(map(int, order), itertools.repeat(epoch)) for order, epoch in orders)
    return itertools.islice(keys, skip, None)


def set_deterministic(seed: int) -> None:
    """Seed the global generators and prefer deterministic kernels (all of them on CPU; a warning elsewhere)."""
    random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs time
    torch.use_deterministic_algorithms(True, warn_only=True)


def compile_layers(model: nn.Module, device: torch.device, asked_by: str, instead: str) -> None:
    """torch.compile every layer whose class has `compiles`, once for all batch sizes, when it first runs.

    Inside `torch.compiler.set_stance("force_eager")` layers run as written. Raises UserError if no kernels can be
    built here: `asked_by` names the setting, `instead` the way out.
    """
    if missing := missing_compiler(device):
        raise UserError(f"{asked_by} for {device} needs {missing}, or {instead}")
    for module in model.modules():
        if getattr(module, "compiles", False):
            module.compile(dynamic=True)


def has_triton() -> bool:
    """Whether GPU kernels can be built; torch installs Triton on Linux with CUDA."""
    return importlib.util.find_spec("triton") is not None


def missing_compiler(device: torch.device) -> str | None:
    """The compiler that this machine lacks for kernels, and the way out: Triton for a GPU, C++ for a CPU; else None."""
    if device.type == "cuda":
        return None if has_triton() else "the package triton: install it"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is not None:
        return None
    return f"a C++ compiler, and there is no {compiler!r}: install it, name another in CXX"


_SIDE = {"cpu": 512, "cuda": 8192}  # of the matrices that measure the roof


class FlopCount(TorchDispatchMode):
    """Inside the `with`, adds up the multiplications and additions of matrix products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._around = ExitStack()

    def __enter__(self) -> FlopCount:
        self._around.enter_context(torch.compiler.set_stance("force_eager"))  # it sees single operations only
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._around.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # in inference mode linear and matmul arrive whole; their parts are what the registry knows
        if torch.is_inference_mode_enabled():
            super().__enter__()  # counts in here too
            try:
                parts = func.decompose(*args, **(kwargs or {}))
            finally:
                super().__exit__(None, None, None)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **(kwargs or {}))
        name, count = func._overloadpacket.__name__, flop_registry.get(func._overloadpacket)
        if name == "_varlen_attn":
            self.total += _varlen_flops(*args[:5])
        elif name == "_varlen_attn_backward":  # (gradient, q, k, v, output, logsumexp, ends of q, of k, ..)
            self.total += _varlen_flops(*args[1:4], *args[6:8]) * 5 // 2  # five products where the forward has two
        elif name == "_scaled_dot_product_flash_attention_for_cpu":  # the registry knows the kernels of GPUs only
            self.total += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            self.total += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def _varlen_flops(q_Lhe: Tensor, k_She: Tensor, v_She: Tensor, ends_q: Tensor, ends_k: Tensor) -> int:
    """Two products of queries and keys for each sequence; like the registry's kernels, a causal one counts in full."""
    return int(4 * (ends_q.diff().long() * ends_k.diff()).sum()) * q_Lhe.shape[1] * q_Lhe.shape[2]


def gemm_roof(device: torch.device, dtype: torch.dtype, clock: Any = time.perf_counter) -> float:
    """Floating-point operations a second of a large square matrix product, the best of three: the practical peak."""
    side = _SIDE.get(device.type, 1024)
    square = torch.linspace(-1, 1, side * side, device=device).view(side, side).to(dtype)  # draws nothing at random
    return max(2 * side**3 / _seconds(square, square, clock) for _ in range(4))  # the first one also warms up


def _seconds(left: Tensor, right: Tensor, clock: Any) -> float:
    start = clock()
    float((left @ right)[0, 0])  # reading a number waits for the device
    return clock() - start


def peak_memory(device: torch.device) -> int:
    """Bytes: what torch held on a GPU at most, or the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
