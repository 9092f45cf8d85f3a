"""Causal attention of packed sequences, and of single new rows against a cache: no padding, no dense mask.

Packed sequence by sequence, every query sees the keys of its own sequence up to itself. On a CPU that is one plain call
for each run of equal lengths; on a GPU one variable-length kernel (performance.md).

Letters: L packed tokens, S slots, G streams of a slot (2 with guidance), h heads, e width of a head, Q cached tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def attend_causal(q_Lhe: Tensor, k_Lhe: Tensor, v_Lhe: Tensor, lengths: Sequence[int]) -> Tensor:
    """Every token attends to those of its own sequence up to itself -> [L, h, e]."""
    if q_Lhe.is_cuda and q_Lhe.dtype in (torch.bfloat16, torch.float16):
        return attend_varlen(q_Lhe, k_Lhe, v_Lhe, lengths)
    return attend_by_length(q_Lhe, k_Lhe, v_Lhe, lengths)


def attend_by_length(q_Lhe: Tensor, k_Lhe: Tensor, v_Lhe: Tensor, lengths: Sequence[int]) -> Tensor:
    """A call for each run of neighbours of equal length. The reference that every faster path is tested against."""
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    mixed = []
    parts = (x_Lhe.split([length * num for length, num in runs]) for x_Lhe in (q_Lhe, k_Lhe, v_Lhe))
    for (_, num), *qkv in zip(runs, *parts, strict=True):
        q, k, v = (rearrange(x, "(B Q) h e -> B h Q e", B=num) for x in qkv)
        mixed.append(rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "B h Q e -> (B Q) h e"))
    return torch.cat(mixed)


def attend_varlen(
    q_Lhe: Tensor, k_Lhe: Tensor, v_Lhe: Tensor, lengths: Sequence[int], kernel: Callable[..., Any] = varlen_attn
) -> Tensor:
    """One variable-length kernel call over all sequences. `kernel`: called as torch's own, which runs on CUDA only."""
    ends = _cumulative(tuple(lengths), q_Lhe.device)
    longest = max(lengths)
    return kernel(q_Lhe, k_Lhe, v_Lhe, ends, ends, longest, longest, window_size=(-1, 0))  # (-1, 0): causal


@lru_cache(maxsize=4)
def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [B + 1], where each sequence begins, and the end; the same in every layer."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def attend_cached(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, live: Sequence[int]) -> Tensor:
    """One new query a row against the first `live[s]` cached keys of its slot -> [S, G, h, e]; idle slots (0) give 0.

    On a CPU each slot is a call of its own that reads only what lives, so a row's result is a function of the row. On a
    GPU one call reads all slots up to the longest.
    """
    attend = attend_to_longest if q_SGhe.is_cuda else attend_by_slot
    return attend(q_SGhe, k_SGhQe, v_SGhQe, live)


def attend_by_slot(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, live: Sequence[int]) -> Tensor:
    """The reference of `attend_cached`."""
    mixed_SGhe = torch.zeros_like(q_SGhe)
    for s, num in enumerate(live):
        if num:
            q_Gh1e, k, v = q_SGhe[s].unsqueeze(2), k_SGhQe[s, :, :, :num], v_SGhQe[s, :, :, :num]
            mixed_SGhe[s] = F.scaled_dot_product_attention(q_Gh1e, k, v).squeeze(2)
    return mixed_SGhe


def attend_to_longest(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, live: Sequence[int], step: int = 128) -> Tensor:
    """All slots in one call, over as many keys as the longest has, rounded up to `step` so that few shapes occur."""
    longest = min(k_SGhQe.shape[3], -(-max(live) // step) * step)
    live_S = torch.tensor(live, device=q_SGhe.device)
    there_S11Q = (torch.arange(longest, device=q_SGhe.device) < live_S.clamp(min=1)[:, None])[:, None, None]
    q, k, v = (x.flatten(0, 1) for x in (q_SGhe.unsqueeze(3), k_SGhQe[:, :, :, :longest], v_SGhQe[:, :, :, :longest]))
    mask = there_S11Q.repeat_interleave(q_SGhe.shape[1], dim=0)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(2).unflatten(0, q_SGhe.shape[:2])
    return mixed * (live_S > 0)[:, None, None, None]
