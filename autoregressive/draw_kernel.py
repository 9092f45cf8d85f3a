"""The draw of an id on a GPU as one Triton kernel in place of about 45 passes over [S, V]; logits.py is the reference.

Guidance, temperature, grammar, top-k, top-p, keyed noise and arg max of one slot are one program, which holds the row
in registers. Thresholds of top-k and top-p are found by bisection over the 32 bits of a logit, so nothing is sorted.
The noise has the reference's integers, and products are not fused into sums. Sums over a row are added in another
order, so a draw differs only if an id lies at the very border of top-p, or two ids tie but for the last bits of a
logarithm.

Letters: S slots, G streams of a slot (2 with guidance: with and without the class), V ids of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.common.device import has_triton

WARPS = 16  # 16384 places of a row of 8197 ids: 32 for each thread

if has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def _mix(word):
        """`logits.mix` in uint32, whose products wrap."""
        word = ((word >> 16) ^ word) * 0x21F0AAAD
        word = ((word >> 15) ^ word) * 0x735A2D97
        return (word >> 15) ^ word

    @triton.jit
    def _ordered(value):
        """float32 -> uint32 in the same order."""
        bits = value.to(tl.uint32, bitcast=True)
        return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)

    @triton.jit
    def _draw(  # type: ignore[no-untyped-def]
        logits, scale, bias, key, position, drawn, row_stride, num_ids, temperature, top_k, top_p,
        streams: tl.constexpr, block: tl.constexpr, cuts_k: tl.constexpr, cuts_p: tl.constexpr,
    ):  # fmt: skip
        slot = tl.program_id(0).to(tl.int64)
        v = tl.arange(0, block)
        inside = v < num_ids
        row = logits + slot * streams * row_stride
        logit_V = tl.load(row + v, mask=inside, other=0.0).to(tl.float32)
        if streams == 2:
            without_V = tl.load(row + row_stride + v, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(scale + slot)
            logit_V = tl.where(s == 1.0, logit_V, without_V + s * (logit_V - without_V))
        logit_V = tl.div_rn(logit_V, temperature + tl.zeros([block], tl.float32))
        logit_V += tl.load(bias + slot * num_ids + v, mask=inside, other=float("-inf"))

        if cuts_k:  # the largest threshold that at least k ids reach
            ordered_V = tl.where(inside, _ordered(logit_V), 0)
            least = tl.zeros([], tl.uint32)
            for i in tl.static_range(32):
                higher = least | (1 << (31 - i))
                least = tl.where(tl.sum((ordered_V >= higher).to(tl.int32), axis=0) >= top_k, higher, least)
            logit_V = tl.where(ordered_V >= least, logit_V, float("-inf"))
        if cuts_p:  # the largest value that likelier ids of probability p or more precede; the one above it is the last
            ordered_V = tl.where(inside, _ordered(logit_V), 0)
            share_V = tl.exp(logit_V - tl.max(logit_V, axis=0))
            share_V = share_V / tl.sum(share_V, axis=0)
            out = tl.zeros([], tl.uint32)
            for i in tl.static_range(32):
                higher = out | (1 << (31 - i))
                out = tl.where(tl.sum(tl.where(ordered_V > higher, share_V, 0.0), axis=0) >= top_p, higher, out)
            last = out + 1
            tied_V = ordered_V == last
            before = tl.sum(tl.where(ordered_V > last, share_V, 0.0), axis=0)
            before_V = before + (tl.cumsum(tied_V.to(tl.int32), axis=0) - 1).to(tl.float32) * share_V
            keeps_V = (ordered_V > last) | (tied_V & (before_V < top_p))
            logit_V = tl.where(keeps_V, logit_V, float("-inf"))

        place = tl.load(position + slot).to(tl.uint32)
        state = _mix(_mix(place ^ tl.load(key + 2 * slot).to(tl.uint32)) ^ tl.load(key + 2 * slot + 1).to(tl.uint32))
        word_V = _mix(state ^ _mix((v + 1).to(tl.uint32)))
        uniform_V = ((word_V >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
        noise_V = -tl.log(-tl.log(uniform_V))  # libdevice's logf, as torch's: near 1 a fast one would be coarse
        tl.store(drawn + slot, tl.argmax(logit_V + noise_V, axis=0).to(tl.int64))


def draw_fused(
    logits_SGV: Tensor, scale_S: Tensor, bias_SV: Tensor, key_S2: Tensor, position_S: Tensor,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
) -> Tensor:  # fmt: skip
    """`draw_ids` of `guide`d logits and `gumbel` noise, int64 [S]. Rows of the logits may lie apart."""
    slots, streams, num_ids = logits_SGV.shape
    assert logits_SGV.stride(2) == 1 and logits_SGV.stride(0) == streams * logits_SGV.stride(1)
    assert bias_SV.is_contiguous() and key_S2.is_contiguous()
    drawn_S = torch.empty(slots, dtype=torch.long, device=logits_SGV.device)
    _draw[(slots,)](
        logits_SGV, scale_S, bias_SV, key_S2, position_S, drawn_S, logits_SGV.stride(1), num_ids, temperature, top_k,
        top_p, streams, triton.next_power_of_2(num_ids), 0 < top_k < num_ids, top_p < 1,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return drawn_S
