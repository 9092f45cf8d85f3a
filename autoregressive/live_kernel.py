"""Attention of one new query a row against the part of the KV cache that lives, as one Triton kernel.

Each program takes one head of one row and reads the keys up to its slot's position, which it finds on the device: a
slot at place 100 costs 101 keys, whatever the others hold, and no number has to come from the host. A row's result
therefore depends on the row alone, and one recorded graph serves every step (device_step.py).

Letters: S slots, G streams of a slot (2 with guidance), h heads, e width of a head, Q cached tokens, R = S G h.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

KEYS_AT_ONCE = 64


def has_triton() -> bool:
    """Whether kernels can be written here; torch brings Triton along on Linux with CUDA."""
    return importlib.util.find_spec("triton") is not None


if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _attend(  # type: ignore[no-untyped-def]
        q, k, v, position, mixed,
        places, rows_per_slot, scale,
        width: tl.constexpr, padded_width: tl.constexpr, keys_at_once: tl.constexpr,
    ):  # fmt: skip
        """One row of q [R, e] against the first position + 1 of k, v [R, Q, e]; the softmax runs along in float32."""
        row = tl.program_id(0).to(tl.int64)
        live = tl.load(position + row // rows_per_slot).to(tl.int32) + 1
        e = tl.arange(0, padded_width)
        inside = e < width
        q_e = tl.load(q + row * width + e, mask=inside, other=0.0).to(tl.float32) * scale
        top = float("-inf")
        total = 0.0
        mixed_e = tl.zeros([padded_width], tl.float32)
        for start in range(0, live, keys_at_once):
            at = start + tl.arange(0, keys_at_once)
            there = at < live
            where = row * places * width + at[:, None] * width + e[None, :]
            both = there[:, None] & inside[None, :]
            k_Ke = tl.load(k + where, mask=both, other=0.0).to(tl.float32)
            v_Ke = tl.load(v + where, mask=both, other=0.0).to(tl.float32)
            score_K = tl.where(there, tl.sum(k_Ke * q_e[None, :], axis=1), float("-inf"))
            new_top = tl.maximum(top, tl.max(score_K, axis=0))
            fade = tl.exp(top - new_top)
            weight_K = tl.exp(score_K - new_top)
            total = total * fade + tl.sum(weight_K, axis=0)
            mixed_e = mixed_e * fade + tl.sum(weight_K[:, None] * v_Ke, axis=0)
            top = new_top
        tl.store(mixed + row * width + e, (mixed_e / total).to(mixed.dtype.element_ty), mask=inside)


@torch.library.custom_op("evatok::attend_live", mutates_args=())
def _traced(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, position_S: Tensor) -> Tensor:
    """The kernel as torch.compile sees it: from outside, so that it never takes the cache for something written."""
    return _launch(q_SGhe, k_SGhQe, v_SGhQe, position_S)


@_traced.register_fake
def _(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, position_S: Tensor) -> Tensor:
    return q_SGhe.new_empty(q_SGhe.shape)


def attend_live(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, position_S: Tensor) -> Tensor:
    """Queries [S, G, h, e] against the keys of their slot up to and with its position, int64 [S] -> [S, G, h, e]."""
    if torch.compiler.is_compiling():
        return _traced(q_SGhe, k_SGhQe, v_SGhQe, position_S)
    return _launch(q_SGhe, k_SGhQe, v_SGhQe, position_S)  # straight: the detour costs more than the kernel


def _launch(q_SGhe: Tensor, k_SGhQe: Tensor, v_SGhQe: Tensor, position_S: Tensor) -> Tensor:
    assert k_SGhQe.is_contiguous() and v_SGhQe.is_contiguous()
    slots, streams, heads, width = q_SGhe.shape
    q_SGhe = q_SGhe.contiguous()
    mixed_SGhe = torch.empty_like(q_SGhe)
    _attend[(slots * streams * heads,)](
        q_SGhe, k_SGhQe, v_SGhQe, position_S, mixed_SGhe,
        k_SGhQe.shape[3], streams * heads, width**-0.5, width, triton.next_power_of_2(width), KEYS_AT_ONCE,
    )  # fmt: skip
    return mixed_SGhe
