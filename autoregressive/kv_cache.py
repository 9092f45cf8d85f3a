"""Keys and values of the clips that are being sampled: allocated once, written in place, read where they live.

Letters: S slots, G streams of a slot (2 with guidance: with and without the class), h heads, Q places,
e width of a head, R = S * G rows of one step.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from autoregressive.attention import Live, attend_cached
from autoregressive.live_kernel import attend_live
from tokenizer.common.errors import UserError

_MEMINFO = Path("/proc/meminfo")  # Linux; elsewhere all memory counts as free


class KVCache:
    """Keys and values of each layer, [S, G, h, Q, e]. A slot's old contents need no erasing: nobody reads that far."""

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
        """Write one new token a row at its slot's position, then attend to all that lives -> [R, h, e]."""
        k_SGhQe, v_SGhQe = self.k_SGhQe[layer], self.v_SGhQe[layer]
        if live is None:
            return attend_live(q_Rhe, k_Rhe, v_Rhe, k_SGhQe, v_SGhQe, position_S)
        q_SGhe, k_SGhe, v_SGhe = (x.unflatten(0, k_SGhQe.shape[:2]) for x in (q_Rhe, k_Rhe, v_Rhe))
        k_SGhQe[self.slot_S, :, :, position_S] = k_SGhe
        v_SGhQe[self.slot_S, :, :, position_S] = v_SGhe
        return attend_cached(q_SGhe, k_SGhQe, v_SGhQe, position_S, live).flatten(0, 1)

    def fill(self, layer: int, slot: int, k_Qhe: Tensor, v_Qhe: Tensor) -> None:
        """Write the first places of a slot at once, in all its streams."""
        num = len(k_Qhe)
        self.k_SGhQe[layer][slot, :, :, :num] = rearrange(k_Qhe, "Q h e -> h Q e")
        self.v_SGhQe[layer][slot, :, :, :num] = rearrange(v_Qhe, "Q h e -> h Q e")


def bytes_per_slot(layers: int, width: int, streams: int, places: int, dtype: torch.dtype) -> int:
    """What one slot of a KVCache takes."""
    return 2 * layers * width * streams * places * dtype.itemsize


def check_memory(slots: int, slot_bytes: int, device: torch.device) -> None:
    """Raises UserError, with the number of slots that would fit, where the cache is larger than the free memory."""
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
