"""Flash decoding on a GPU: a new token against the KV cache, and into it, with two Triton kernels for all rows.

Split K: program (row and head, split) reads one stretch of KEYS_PER_SPLIT cached keys, so a long row is shared by many
processors. Programs beyond a slot's position, which they read on the device, end at once. A second kernel combines the
splits of a row in their order, so results are deterministic and a row's result depends on the row alone. No number
comes from the host: one CUDA graph serves every step (cuda_graph.py).

Letters: S slots, G streams of a slot (2 with guidance), R = S G rows, h heads, e head width, Q places of the cache,
K keys read together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.common.device import has_triton

KEYS_PER_SPLIT = 256  # shorter balances better, longer combines less
KEYS_AT_ONCE, WARPS = 64, 2  # the fastest of 32 pairs on an H200 for the unsplit kernel, rows of 10 to 900 keys

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _kept(new_e, cache):
        """A new key or value as the cache keeps it."""
        if cache.dtype.element_ty == tl.float8e4nv:
            new_e = tl.clamp(new_e.to(tl.float32), -448.0, 448.0)
        return new_e.to(cache.dtype.element_ty)

    @triton.jit
    def _attend_split(  # type: ignore[no-untyped-def]
        q, k, v, cached_k, cached_v, position, part_mixed, part_top, part_total,
        heads, streams, places, q_stride, k_stride, v_stride, scale,
        width: tl.constexpr, padded_width: tl.constexpr, keys_at_once: tl.constexpr, keys_per_split: tl.constexpr,
    ):  # fmt: skip
        """The softmax over one stretch of keys, not yet divided: weighted values, largest score, sum of weights."""
        program = tl.program_id(0).to(tl.int64)
        split = tl.program_id(1)
        row, head = program // heads, program % heads
        place = tl.load(position + row // streams).to(tl.int32)  # of the new token
        begin = split * keys_per_split
        if begin <= place:
            e = tl.arange(0, padded_width)
            inside = e < width
            q_e = tl.load(q + row * q_stride + head * width + e, mask=inside, other=0.0).to(tl.float32) * scale
            first = program * places * width  # of this row and head in the cache

            top = float("-inf")
            total = 0.0
            mixed_e = tl.zeros([padded_width], dtype=tl.float32)
            if place < begin + keys_per_split:  # the new token belongs to this stretch: it is written and counted here
                new_k_e = _kept(tl.load(k + row * k_stride + head * width + e, mask=inside, other=0.0), cached_k)
                new_v_e = _kept(tl.load(v + row * v_stride + head * width + e, mask=inside, other=0.0), cached_v)
                tl.store(cached_k + first + place * width + e, new_k_e, mask=inside)
                tl.store(cached_v + first + place * width + e, new_v_e, mask=inside)
                top = tl.sum(new_k_e.to(tl.float32) * q_e, axis=0)
                total = 1.0
                mixed_e = new_v_e.to(tl.float32)
            end = tl.minimum(place, begin + keys_per_split)
            for start in range(begin, end, keys_at_once):
                at = start + tl.arange(0, keys_at_once)
                there = at < end
                where = first + at[:, None] * width + e[None, :]  # [K, e]
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
            part = program * tl.num_programs(1) + split
            tl.store(part_mixed + part * width + e, mixed_e, mask=inside)
            tl.store(part_top + part, top)
            tl.store(part_total + part, total)

    @triton.jit
    def _combine(  # type: ignore[no-untyped-def]
        part_mixed, part_top, part_total, position, mixed, heads, streams, splits,
        width: tl.constexpr, padded_width: tl.constexpr, keys_per_split: tl.constexpr,
    ):  # fmt: skip
        """The stretches of one row and head, first to last, in float32."""
        program = tl.program_id(0).to(tl.int64)
        place = tl.load(position + program // heads // streams).to(tl.int32)
        e = tl.arange(0, padded_width)
        inside = e < width
        part = program * splits
        top = tl.load(part_top + part)
        total = tl.load(part_total + part)
        mixed_e = tl.load(part_mixed + part * width + e, mask=inside, other=0.0)
        for split in range(1, place // keys_per_split + 1):
            other_top = tl.load(part_top + part + split)
            new_top = tl.maximum(top, other_top)
            fade, other_fade = tl.exp(top - new_top), tl.exp(other_top - new_top)
            other_e = tl.load(part_mixed + (part + split) * width + e, mask=inside, other=0.0)
            total = total * fade + tl.load(part_total + part + split) * other_fade
            mixed_e = mixed_e * fade + other_e * other_fade
            top = new_top
        tl.store(mixed + program * width + e, (mixed_e / total).to(mixed.dtype.element_ty), mask=inside)


def attend_decode(
    q_Rhe: Tensor, k_Rhe: Tensor, v_Rhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, position_S: Tensor
) -> Tensor:
    """Write keys and values of new tokens into the cache at their slots' positions, int64 [S], and attend up to there.

    -> [R, h, e]. All in one precision, but for a cache in 8 bits; the cache is contiguous.
    """
    assert k_SGhQe.is_contiguous() and v_SGhQe.is_contiguous() and k_SGhQe.dtype in (q_Rhe.dtype, torch.float8_e4m3fn)
    rows, heads, width = q_Rhe.shape
    streams, places = k_SGhQe.shape[1], k_SGhQe.shape[3]
    splits, padded_width = triton.cdiv(places, KEYS_PER_SPLIT), triton.next_power_of_2(width)
    # parts of one projection are read where they lie
    q_Rhe, k_Rhe, v_Rhe = (x if x.stride()[1:] == (width, 1) else x.contiguous() for x in (q_Rhe, k_Rhe, v_Rhe))
    mixed_Rhe = torch.empty(rows, heads, width, dtype=q_Rhe.dtype, device=q_Rhe.device)
    part_mixed = torch.empty(rows, heads, splits, width, device=q_Rhe.device)  # float32, and past the end of a
    part_top, part_total = torch.empty(2, rows, heads, splits, device=q_Rhe.device)  # position nothing is read
    _attend_split[(rows * heads, splits)](
        q_Rhe, k_Rhe, v_Rhe, k_SGhQe, v_SGhQe, position_S, part_mixed, part_top, part_total,
        heads, streams, places, q_Rhe.stride(0), k_Rhe.stride(0), v_Rhe.stride(0), width**-0.5,
        width, padded_width, KEYS_AT_ONCE, KEYS_PER_SPLIT, num_warps=WARPS,
    )  # fmt: skip
    _combine[(rows * heads,)](
        part_mixed, part_top, part_total, position_S, mixed_Rhe, heads, streams, splits,
        width, padded_width, KEYS_PER_SPLIT, num_warps=1,
    )  # fmt: skip
    return mixed_Rhe
