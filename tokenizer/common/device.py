"""Device, precision and random numbers: decided once, from names that a YAML can hold."""

from __future__ import annotations

import hashlib
import os
import random
import time

import torch

from tokenizer.common.distributed import local_rank
from tokenizer.common.errors import UserError

PRECISIONS: dict[str, torch.dtype] = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SLOW = 1.5  # times as long as float32


def pick_device(name: str) -> torch.device:
    """`auto` (the GPU if there is one), `cpu`, `cuda` or `cuda:N`. UserError for a device that is not there.

    Of several processes on a machine each takes the GPU of its local rank, unless the name holds a number; where there
    are more processes than visible GPUs they are dealt round. A GPU becomes the current one: kernels start there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank() % max(1, torch.cuda.device_count())}"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdigit() or name == "cpu"):
        raise UserError(f"device={name!r}: must be auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        if int(index) >= torch.cuda.device_count():
            raise UserError(f"device={name!r}: torch sees {torch.cuda.device_count()} GPUs here; use auto or cpu")
        torch.cuda.set_device(int(index))
    return torch.device(name)


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
    """What to say where `precision` is slower than float32: a CPU without instructions for it computes in software.

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


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine."""
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator that depends on `seed` and `keys` alone, say `generator_for(run.seed, "lengths", step)`.

    Drawing everything of a step from such generators is what makes resume exact without storing generator states.
    """
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def set_deterministic(seed: int) -> None:
    """Seed the global generators and prefer deterministic kernels (all of them on CPU; a warning elsewhere)."""
    random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs time
    torch.use_deterministic_algorithms(True, warn_only=True)
