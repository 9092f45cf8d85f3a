"""Keys and values of the clips that are being sampled: one fixed allocation, written in place, read where it lives.

Letters: Y layers, S slots, G streams of a slot (2 with guidance: with and without the class), h heads, Q places,
e width of a head, R = S * G rows of one step.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from autoregressive.attention import Live, attend_cached
from tokenizer.common.errors import UserError

_MEMINFO = Path("/proc/meminfo")  # Linux; elsewhere all memory counts as free


class KVCache:
    """Keys and values, [Y, S, G, h, Q, e] each. A slot's old contents need no erasing: nobody reads past `live`."""

    def __init__(
        self, layers: int, heads: int, head_width: int, slots: int, streams: int, places: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        shape = (layers, slots, streams, heads, places, head_width)
        self.k_YSGhQe = torch.zeros(shape, dtype=dtype, device=device)
        self.v_YSGhQe = torch.zeros(shape, dtype=dtype, device=device)
        self.slot_S = torch.arange(slots, device=device)

    @property
    def num_bytes(self) -> int:
        return 2 * self.k_YSGhQe.numel() * self.k_YSGhQe.element_size()

    def step(self, layer: int, q_Rhe: Tensor, k_Rhe: Tensor, v_Rhe: Tensor, position_S: Tensor, live: Live) -> Tensor:
        """Write one new token a row at its slot's position, then attend to all that lives -> [R, h, e]."""
        slots_streams = self.k_YSGhQe.shape[1:3]
        q_SGhe, k_SGhe, v_SGhe = (x.unflatten(0, slots_streams) for x in (q_Rhe, k_Rhe, v_Rhe))
        self.k_YSGhQe[layer][self.slot_S, :, :, position_S] = k_SGhe
        self.v_YSGhQe[layer][self.slot_S, :, :, position_S] = v_SGhe
        return attend_cached(q_SGhe, self.k_YSGhQe[layer], self.v_YSGhQe[layer], position_S, live).flatten(0, 1)

    def fill(self, layer: int, slot: int, k_Qhe: Tensor, v_Qhe: Tensor) -> None:
        """Write the first places of a slot at once, in all its streams."""
        num = len(k_Qhe)
        self.k_YSGhQe[layer, slot, :, :, :num] = rearrange(k_Qhe, "Q h e -> h Q e")
        self.v_YSGhQe[layer, slot, :, :, :num] = rearrange(v_Qhe, "Q h e -> h Q e")


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
    """Memory that can still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else []
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return available[0] if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
