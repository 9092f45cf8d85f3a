"""Attention of the GPT: causal over packed sequences in training, over a KV cache in sampling.

Training. Sequences are packed one after the other, without padding or a mask. On a CPU each run of equal lengths is one
call of scaled dot-product attention; on a GPU one variable-length kernel takes them all.

Sampling. Keys and values of the clips in progress are allocated once and written in place. A CPU reads them by its own
kernel (cpu_kernel.py), a GPU by Triton (decode_kernel.py); plain torch is the reference for both.

Letters: L packed tokens, S slots, G streams of a slot (2 with guidance: with and without the class), R = S G rows of a
step, h heads, e head width, Q places of the cache.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from autoregressive import cpu_kernel
from autoregressive.decode_kernel import attend_decode
from tokenizer.blocks.attention import varlen_kernel
from tokenizer.common.device import send
from tokenizer.common.errors import UserError


def attend_causal(q_Lhe: Tensor, k_Lhe: Tensor, v_Lhe: Tensor, lengths: Sequence[int]) -> Tensor:
    """Every token attends to those of its own sequence up to itself -> [L, h, e]."""
    if q_Lhe.is_cuda:
        return attend_varlen(q_Lhe, k_Lhe, v_Lhe, lengths)
    return attend_by_length(q_Lhe, k_Lhe, v_Lhe, lengths)


def attend_by_length(q_Lhe: Tensor, k_Lhe: Tensor, v_Lhe: Tensor, lengths: Sequence[int]) -> Tensor:
    """One call for each run of neighbours of equal length. The reference that every faster path is tested against."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    mixed = []
    parts = (x_Lhe.split([length * num for length, num in runs]) for x_Lhe in (q_Lhe, k_Lhe, v_Lhe))
    for (_, num), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (rearrange(x, "(B Q) h e -> B h Q e", B=num) for x in qkv)  # a rectangle: equal lengths
        mixed.append(rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "B h Q e -> (B Q) h e"))
    return torch.cat(mixed)


def attend_varlen(
    q_Lhe: Tensor,
    k_Lhe: Tensor,
    v_Lhe: Tensor,
    lengths: Sequence[int],
    kernel: Callable[..., Tensor] = varlen_kernel,
) -> Tensor:
    """One variable-length kernel call over all sequences. `kernel`: called as `varlen_kernel`."""
    ends = _cumulative(tuple(lengths), q_Lhe.device)
    longest = max(lengths)
    return kernel(q_Lhe, k_Lhe, v_Lhe, ends, ends, longest, longest, causal=True)


@lru_cache(maxsize=4)
def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [B + 1], the start of each sequence, and the end; the same in every layer."""
    return send(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)


Live = Sequence[int] | int | None
"""Which cached keys a step reads.

[n, ..]  the first n of each slot (0: idle): on a CPU, and as the reference
n        the first n of every slot, those after its position masked: on a GPU without Triton
None     those up to each slot's position, which the kernel reads on the device: on a GPU
"""


def attend_cached(
    q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, position_S: Tensor, live: Sequence[int] | int
) -> Tensor:
    """One new query a row against the cached keys of its slot up to its own place -> [S, G, h, e]."""
    if isinstance(live, int):
        return attend_to_longest(q_SGhe, k_SGhQe, v_SGhQe, position_S, live)
    return attend_by_slot(q_SGhe, k_SGhQe, v_SGhQe, live)


def attend_by_slot(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, live: Sequence[int]) -> Tensor:
    """The first `live[s]` keys of each slot, one call a slot: a row depends on itself alone. Idle slots give 0."""
    mixed_SGhe = torch.zeros_like(q_SGhe)
    attend = F.scaled_dot_product_attention if q_SGhe.dtype == torch.float32 else attend_one
    for s, num in enumerate(live):
        if num:
            q_Gh1e, k, v = q_SGhe[s].unsqueeze(2), k_SGhQe[s, :, :, :num].to(q_SGhe.dtype), v_SGhQe[s, :, :, :num]
            mixed_SGhe[s] = attend(q_Gh1e, k, v.to(q_SGhe.dtype)).squeeze(2)
    return mixed_SGhe


def attend_one(q_Gh1e: Tensor, k_GhQe: Tensor, v_GhQe: Tensor) -> Tensor:
    """One query in half precision, as matrix-vector products: on a CPU 3 to 4 times faster than SDPA."""
    score_GhQ1 = k_GhQe @ (q_Gh1e * q_Gh1e.shape[-1] ** -0.5).transpose(-1, -2)
    # softmax in fp32: 8 bits of mantissa would round away small shares of long rows
    share_Gh1Q = score_GhQ1.float().softmax(dim=-2).to(v_GhQe.dtype).transpose(-1, -2)
    return share_Gh1Q @ v_GhQe


def attend_to_longest(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, position_S: Tensor, longest: int) -> Tensor:
    """All slots in one call over their first `longest` places, of which a slot sees those up to its position."""
    there_S11Q = (torch.arange(longest, device=q_SGhe.device) <= position_S[:, None])[:, None, None]
    cached = (x_SGhQe[:, :, :, :longest].to(q_SGhe.dtype) for x_SGhQe in (k_SGhQe, v_SGhQe))
    q, k, v = (x.flatten(0, 1) for x in (q_SGhe.unsqueeze(3), *cached))
    mask = there_S11Q.repeat_interleave(q_SGhe.shape[1], dim=0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(2).unflatten(0, q_SGhe.shape[:2])


FP8 = torch.float8_e4m3fn  # of a cache in 8 bits: 4 of exponent, 3 of mantissa, up to 448
FP8_MOST = 448.0


def _to_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As the cache keeps it; torch would make what exceeds the range of 8 bits a nan."""
    return x.clamp(-FP8_MOST, FP8_MOST).to(FP8).view(torch.uint8) if dtype == FP8 else x


def _bytes(cached: Tensor) -> Tensor:
    """The same memory as a type that can be written by index."""
    return cached.view(torch.uint8) if cached.dtype == FP8 else cached


_MEMINFO = Path("/proc/meminfo")  # Linux; elsewhere all memory counts as free


class KVCache:
    """Keys and values of each layer, [S, G, h, Q, e]. Old contents of a slot need no erasing: they are not read."""

    def __init__(
        self, layers: int, heads: int, head_width: int, slots: int, streams: int, places: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        shape = (slots, streams, heads, places, head_width)
        self.k_SGhQe = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.v_SGhQe = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.slot_S = torch.arange(slots, device=device)

    @property
    def num_bytes(self) -> int:
        return sum(x_SGhQe.nbytes for x_SGhQe in (*self.k_SGhQe, *self.v_SGhQe))

    def step(self, layer: int, q_Rhe: Tensor, k_Rhe: Tensor, v_Rhe: Tensor, position_S: Tensor, live: Live) -> Tensor:
        """Write one new token a row at its slot's position, then attend to the keys up to it -> [R, h, e]."""
        k_SGhQe, v_SGhQe = self.k_SGhQe[layer], self.v_SGhQe[layer]
        if live is None:
            return attend_decode(q_Rhe, k_Rhe, v_Rhe, k_SGhQe, v_SGhQe, position_S)
        if not isinstance(live, int) and cpu_kernel.takes_cache(k_SGhQe):
            return cpu_kernel.attend(q_Rhe, k_Rhe, v_Rhe, k_SGhQe, v_SGhQe, torch.tensor(live))
        q_SGhe, k_SGhe, v_SGhe = (x.unflatten(0, k_SGhQe.shape[:2]) for x in (q_Rhe, k_Rhe, v_Rhe))
        for cached, new in ((k_SGhQe, k_SGhe), (v_SGhQe, v_SGhe)):
            _bytes(cached)[self.slot_S, :, :, position_S] = _to_cache(new, cached.dtype)
        return attend_cached(q_SGhe, k_SGhQe, v_SGhQe, position_S, live).flatten(0, 1)

    def fill(self, layer: int, slot: int, k_Qhe: Tensor, v_Qhe: Tensor) -> None:
        """Write the first places of a slot at once, in all its streams."""
        for cached, x_Qhe in ((self.k_SGhQe[layer], k_Qhe), (self.v_SGhQe[layer], v_Qhe)):
            _bytes(cached)[slot, :, :, : len(x_Qhe)] = rearrange(_to_cache(x_Qhe, cached.dtype), "Q h e -> h Q e")


def bytes_per_slot(layers: int, width: int, streams: int, places: int, dtype: torch.dtype) -> int:
    """Bytes of one slot of a KVCache."""
    return 2 * layers * width * streams * places * dtype.itemsize


def check_memory(slots: int, slot_bytes: int, device: torch.device) -> None:
    """Raises UserError, with the number of slots that would fit, if the cache is larger than the free memory."""
    free = free_bytes(device)
    if slots * slot_bytes > free:
        raise UserError(
            f"{slots} slots need {slots * slot_bytes / 2**30:.2f} GiB for keys and values, and {device} has "
            f"{free / 2**30:.2f} GiB free: {free // slot_bytes} slots would fit"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`, what torch keeps of a GPU for later included."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    lines = _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return available[0] if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
