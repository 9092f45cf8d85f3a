"""Speed of a run and of its device: operations of a step, measured roof of a matrix product, peak memory."""

from __future__ import annotations

import resource
import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

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
