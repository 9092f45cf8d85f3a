"""Causal attention of packed sequences, and of single new rows against a cache: no padding, no dense mask.

Packed sequence by sequence, every query sees the keys of its own sequence up to itself. On a CPU that is one plain call
for each run of equal lengths; on a GPU one variable-length kernel (performance.md).

Letters: L packed tokens, S slots, G streams of a slot (2 with guidance), h heads, e width of a head, Q cached tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizer.blocks.varlen import varlen_kernel


def attend_causal(q_Lhe: Tensor, k_Lhe: Tensor, v_Lhe: Tensor, lengths: Sequence[int]) -> Tensor:
    """Every token attends to those of its own sequence up to itself -> [L, h, e]."""
    if q_Lhe.is_cuda:
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
    """int32 [B + 1], where each sequence begins, and the end; the same in every layer."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


Live = Sequence[int] | int | None
"""Which cached keys a step reads.

[n, ..]  the first n of each slot (0: idle), slot by slot, so that a row's result is a function of the row: the way of a
         CPU, and the reference
n        the first n of every slot, those after its position masked: for a GPU without Triton
None     those up to each slot's position, which the kernel finds itself (live_kernel.py): the way of a GPU
"""


def attend_cached(
    q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, position_S: Tensor, live: Sequence[int] | int
) -> Tensor:
    """One new query a row against the cached keys of its slot up to its own place -> [S, G, h, e]."""
    if isinstance(live, int):
        return attend_to_longest(q_SGhe, k_SGhQe, v_SGhQe, position_S, live)
    return attend_by_slot(q_SGhe, k_SGhQe, v_SGhQe, live)


def attend_by_slot(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, live: Sequence[int]) -> Tensor:
    """The first `live[s]` keys of each slot, slot by slot; idle slots give 0."""
    mixed_SGhe = torch.zeros_like(q_SGhe)
    attend = F.scaled_dot_product_attention if q_SGhe.dtype == torch.float32 else attend_one
    for s, num in enumerate(live):
        if num:
            q_Gh1e, k, v = q_SGhe[s].unsqueeze(2), k_SGhQe[s, :, :, :num], v_SGhQe[s, :, :, :num]
            mixed_SGhe[s] = attend(q_Gh1e, k, v).squeeze(2)
    return mixed_SGhe


def attend_one(q_Gh1e: Tensor, k_GhQe: Tensor, v_GhQe: Tensor) -> Tensor:
    """One query in half precision, as matrix-vector products: on a CPU 3 to 4 times faster than SDPA."""
    score_GhQ1 = k_GhQe @ (q_Gh1e * q_Gh1e.shape[-1] ** -0.5).transpose(-1, -2)
    share_Gh1Q = score_GhQ1.float().softmax(dim=-2).to(v_GhQe.dtype).transpose(-1, -2)
    return share_Gh1Q @ v_GhQe


def attend_to_longest(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, position_S: Tensor, longest: int) -> Tensor:
    """All slots in one call over their first `longest` places, of which a slot sees those up to its position."""
    there_S11Q = (torch.arange(longest, device=q_SGhe.device) <= position_S[:, None])[:, None, None]
    q, k, v = (x.flatten(0, 1) for x in (q_SGhe.unsqueeze(3), k_SGhQe[:, :, :, :longest], v_SGhQe[:, :, :, :longest]))
    mask = there_S11Q.repeat_interleave(q_SGhe.shape[1], dim=0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(2).unflatten(0, q_SGhe.shape[:2])
