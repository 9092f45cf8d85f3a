"""A new token against the part of the KV cache that lives, and into it: one Triton kernel for all rows.

Each program takes one head of one row: it writes the new key and value at its slot's position, which it finds on the
device, and reads those before it. A slot at place 100 costs 101 keys, whatever the others hold, and no number has to
come from the host. A row's result therefore depends on the row alone, and one recorded graph serves every step
(recorded_step.py).

Letters: S slots, G streams of a slot (2 with guidance), R = S G rows, h heads, e width of a head, Q cached tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.common.device import has_triton

KEYS_AT_ONCE, WARPS = 64, 2  # the fastest of 32 pairs on an H200, rows of 10 to 900 keys: 0.6 of the speed of a copy

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _attend(  # type: ignore[no-untyped-def]
        q, k, v, cached_k, cached_v, position, mixed,
        heads, streams, places, q_stride, k_stride, v_stride, scale,
        width: tl.constexpr, padded_width: tl.constexpr, keys_at_once: tl.constexpr,
    ):  # fmt: skip
        """One head of one row; the softmax runs along in float32, from the new token on."""
        program = tl.program_id(0).to(tl.int64)
        row, head = program // heads, program % heads
        place = tl.load(position + row // streams).to(tl.int32)
        e = tl.arange(0, padded_width)
        inside = e < width
        q_e = tl.load(q + row * q_stride + head * width + e, mask=inside, other=0.0).to(tl.float32) * scale
        new_k_e = tl.load(k + row * k_stride + head * width + e, mask=inside, other=0.0)
        new_v_e = tl.load(v + row * v_stride + head * width + e, mask=inside, other=0.0)
        first = program * places * width  # of this row and head in the cache
        tl.store(cached_k + first + place * width + e, new_k_e, mask=inside)
        tl.store(cached_v + first + place * width + e, new_v_e, mask=inside)

        top = tl.sum(new_k_e.to(tl.float32) * q_e, axis=0)
        total = 1.0
        mixed_e = new_v_e.to(tl.float32)
        for start in range(0, place, keys_at_once):
            at = start + tl.arange(0, keys_at_once)
            there = at < place
            where = first + at[:, None] * width + e[None, :]
            both = there[:, None] & inside[None, :]
            k_Ke = tl.load(cached_k + where, mask=both, other=0.0).to(tl.float32)
            v_Ke = tl.load(cached_v + where, mask=both, other=0.0).to(tl.float32)
            score_K = tl.where(there, tl.sum(k_Ke * q_e[None, :], axis=1), float("-inf"))
            new_top = tl.maximum(top, tl.max(score_K, axis=0))
            fade = tl.exp(top - new_top)
            weight_K = tl.exp(score_K - new_top)
            total = total * fade + tl.sum(weight_K, axis=0)
            mixed_e = mixed_e * fade + tl.sum(weight_K[:, None] * v_Ke, axis=0)
            top = new_top
        tl.store(mixed + program * width + e, (mixed_e / total).to(mixed.dtype.element_ty), mask=inside)


def attend_live(
    q_Rhe: Tensor, k_Rhe: Tensor, v_Rhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, position_S: Tensor
) -> Tensor:
    """Write keys and values of new tokens into the cache at their slots' positions, int64 [S], and attend up to there.

    -> [R, h, e]. All in one precision; the cache is contiguous.
    """
    assert k_SGhQe.is_contiguous() and v_SGhQe.is_contiguous() and q_Rhe.dtype == k_SGhQe.dtype
    rows, heads, width = q_Rhe.shape
    # parts of one projection are read where they lie
    q_Rhe, k_Rhe, v_Rhe = (x if x.stride()[1:] == (width, 1) else x.contiguous() for x in (q_Rhe, k_Rhe, v_Rhe))
    mixed_Rhe = torch.empty(rows, heads, width, dtype=q_Rhe.dtype, device=q_Rhe.device)
    _attend[(rows * heads,)](
        q_Rhe, k_Rhe, v_Rhe, k_SGhQe, v_SGhQe, position_S, mixed_Rhe,
        heads, k_SGhQe.shape[1], k_SGhQe.shape[3], q_Rhe.stride(0), k_Rhe.stride(0), v_Rhe.stride(0), width**-0.5,
        width, triton.next_power_of_2(width), KEYS_AT_ONCE, num_warps=WARPS,
    )  # fmt: skip
    return mixed_Rhe
