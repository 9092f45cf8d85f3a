"""Block-causal attention over packed sequences: no padding, no mask.

A query of block t sees the keys of blocks <= t of its own clip, all of them. Packed clip by clip, block by block, those
keys are one contiguous range, so attention is a few plain calls of scaled dot-product attention:

    equal assignments    N batched calls, one for each block
    any, on a CPU        one call for each clip and block; the reference for the others
    trained on a CPU     the same calls, and a backward of five matrix products for each clip
    any, on a GPU        one variable-length kernel over gathered keys

Letters: L queries, S keys, G gathered keys (all packed), Z sequences, B clips, K queries of a block or clip, h heads,
e head width, N blocks, or copies of a key, w extra columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.assignment import Packing
from tokenizer.common.device import send

_TOP_LEFT = 1  # torch's number for a causal mask whose first query sees the first key


def varlen_kernel(
    q_Lhe: Tensor, k_Ghe: Tensor, v_Ghe: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """Query i of a sequence sees all its keys, or with `causal` the first i + 1 -> [L, h, e]. CUDA only.

    `ends_q`, `ends_k`: int32 [Z + 1] on the device, 0 and then the end of each sequence. Flash attention in half
    precision on compute capability 8 and above; else torch's memory-efficient kernel, which takes float32.
    """
    if q_Lhe.dtype != torch.float32 and torch.cuda.get_device_capability(q_Lhe.device)[0] >= 8:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if causal else (-1, -1)  # (left, right): -1 is unlimited
        mixed_Lhe = varlen_attn(q_Lhe, k_Ghe, v_Ghe, ends_q, ends_k, max_q, max_k, window_size=window)
        return cast("Tensor", mixed_Lhe)
    mask = _TOP_LEFT if causal else 0
    # torch has no public name for this one; nested tensors call it too
    attend: Any = torch.ops.aten._efficient_attention_forward
    inputs = (x.unsqueeze(0) for x in (q_Lhe, k_Ghe, v_Ghe))  # [1, L, h, e], [1, G, h, e]
    return attend(*inputs, None, ends_q, ends_k, max_q, max_k, 0.0, mask, compute_log_sumexp=True)[0][0]


class GatherKeys(torch.autograd.Function):
    """`x_She[row_G]` with a backward that also only reads: each row adds up its copies in their order.

    The backward of indexing adds with atomics, or sorts if deterministic results are asked for.
    """

    @staticmethod
    def forward(ctx: Any, x_She: Tensor, row_G: Tensor, copy_NS: Tensor) -> Tensor:
        """`row_G`: the key that each gathered one is a copy of. `copy_NS`: index of each copy of a key; -1 for none."""
        ctx.save_for_backward(copy_NS)
        return x_She[row_G]  # [G, h, e]

    @staticmethod
    def backward(ctx: Any, grad_Ghe: Tensor) -> tuple[Tensor, None, None]:
        (copy_NS,) = ctx.saved_tensors
        total_She = grad_Ghe[copy_NS[0]]  # [S, h, e]; every key has a first copy
        for copy_S in copy_NS[1:]:
            there_S11 = (copy_S >= 0)[:, None, None]
            total_She = total_She + grad_Ghe[copy_S.clamp(min=0)] * there_S11
        return total_She, None, None


class Prefixes(torch.autograd.Function):
    """`x_BShe[:, :end]` for every end, ascending; the last is the whole.

    The backward of slices would fill a tensor of full length for each end and add them up.
    """

    @staticmethod
    def forward(ctx: Any, x_BShe: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.ends = ends
        return tuple(x_BShe[:, :end] for end in ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total_BShe = grads[-1].clone()  # of the whole, [B, S, h, e]
        for grad, end in zip(grads[:-1], ctx.ends[:-1], strict=True):
            total_BShe[:, :end] += grad
        return total_BShe, None


class Attention(nn.Module):
    """Multi-head attention whose queries and keys carry positions and whose values do not.

    "Placed" inputs have their positions added by the caller: one sum serves queries and keys, or all layers.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)

    def queries(self, placed: Tensor) -> Tensor:
        """[..., D] -> [..., h, e]"""
        return rearrange(self.to_q(placed), "... (h e) -> ... h e", h=self.heads)

    def keys_values(self, ref: Tensor, placed: Tensor) -> tuple[Tensor, Tensor]:
        """[..., D] without and with positions -> two of [..., h, e]"""
        k, v = self.to_k(placed), self.to_v(ref)
        return rearrange(k, "... (h e) -> ... h e", h=self.heads), rearrange(v, "... (h e) -> ... h e", h=self.heads)

    def output(self, mixed: Tensor) -> Tensor:
        """[..., h, e] -> [..., D]"""
        return self.to_out(rearrange(mixed, "... h e -> ... (h e)"))


@torch.compiler.disable  # its calls depend on the lengths of the batch: compiled, each batch would compile anew
def block_causal_attention(q_Lhe: Tensor, k_She: Tensor, v_She: Tensor, query: Packing, key: Packing) -> Tensor:
    """Every query attends to the keys of its own clip in blocks up to its own -> [L, h, e]."""
    if q_Lhe.device.type == "cpu" and torch.is_grad_enabled():
        mixed_Lhe: Tensor = ClipAttention.apply(q_Lhe, k_She, v_She, query, key)
        return mixed_Lhe
    if query.is_regular and key.is_regular:
        return _attend_rectangle(q_Lhe, k_She, v_She, query, key)
    if q_Lhe.is_cuda:
        return attend_varlen(q_Lhe, k_She, v_She, query, key)
    return attend_by_clip(q_Lhe, k_She, v_She, query, key)


def attend_prefix(q_BKhe: Tensor, k_BShe: Tensor, v_BShe: Tensor) -> Tensor:
    """All queries see all keys: one temporal block against the prefix it may see -> [B, K, h, e]."""
    mixed = F.scaled_dot_product_attention(q_BKhe.transpose(1, 2), k_BShe.transpose(1, 2), v_BShe.transpose(1, 2))
    return mixed.transpose(1, 2)


def _attend_rectangle(q_Lhe: Tensor, k_She: Tensor, v_She: Tensor, query: Packing, key: Packing) -> Tensor:
    """Equal assignments: N batched calls, one per block."""
    q_blocks = q_Lhe.unflatten(0, (query.num_clips, -1)).split(query.lengths[0], dim=1)  # N of [B, K, h, e]
    ends = [*accumulate(key.lengths[0])]  # keys in blocks <= t
    k_blocks, v_blocks = (Prefixes.apply(x.unflatten(0, (key.num_clips, -1)), ends) for x in (k_She, v_She))
    mixed = [attend_prefix(*qkv) for qkv in zip(q_blocks, k_blocks, v_blocks, strict=True)]
    mixed_BKhe = torch.cat(mixed, dim=1)  # [B, L / B, h, e]
    # flatten(0, 1), but no view: torch.compile would look at what it is a view of, and compile anew for other batches
    return torch.ops.aten._unsafe_view(mixed_BKhe, (-1, *mixed_BKhe.shape[2:]))


def attend_by_clip(q_Lhe: Tensor, k_She: Tensor, v_She: Tensor, query: Packing, key: Packing) -> Tensor:
    """Any assignments: a call per clip and block. The reference that every faster path is tested against."""
    return torch.cat([attend_prefix(*qkv)[0] for qkv in _prefixes(q_Lhe, k_She, v_She, query, key)])


def _prefixes(
    q_Lhe: Tensor, k_She: Tensor, v_She: Tensor, query: Packing, key: Packing
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each clip and block its queries [1, K, h, e], and the keys and values that they see.

    `split` rather than slices: its backward is one concatenation; that of a slice fills a tensor of length S.
    """
    k_clips, v_clips = (x.split(key.clip_lengths) for x in (k_She, v_She))
    clips = zip(q_Lhe.split(query.clip_lengths), k_clips, v_clips, query.lengths, key.block_ends, strict=True)
    for q_clip, k, v, lengths, ends in clips:
        for q, end in zip(q_clip.split(lengths), ends, strict=True):
            yield q[None], k[None, :end], v[None, :end]


class ClipAttention(torch.autograd.Function):
    """`attend_by_clip` for training on a CPU, where torch's own backward takes 2 to 5 times as long.

    The backward computes each clip at once, all queries against all keys; later blocks get probability 0. For the
    probabilities exp(q k / sqrt(e) - log sum) queries and keys have extra columns, whose products subtract the
    logarithm and hide later blocks. So bf16 rounds the logarithm of a probability, which is small where it matters.
    """

    @staticmethod
    def forward(ctx: Any, q_Lhe: Tensor, k_She: Tensor, v_She: Tensor, query: Packing, key: Packing) -> Tensor:
        attend: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what attend_prefix calls, but
        found = [  # this one returns the logarithms too: of [1, h, K, e] and [1, h, K]
            attend(*(x.transpose(1, 2) for x in qkv)) for qkv in _prefixes(q_Lhe, k_She, v_She, query, key)
        ]
        mixed_Lhe = torch.cat([mixed[0].transpose(0, 1) for mixed, _ in found])
        ctx.save_for_backward(q_Lhe, k_She, v_She, torch.cat([log[0] for _, log in found], dim=1))
        ctx.packings = query, key
        return mixed_Lhe

    @staticmethod
    def backward(ctx: Any, grad_Lhe: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_Lhe, k_She, v_She, log_hL = ctx.saved_tensors
        query, key = ctx.packings
        scale = q_Lhe.shape[2] ** -0.5
        hides_Lw, hidden_Sw = _extra_columns(query, key, q_Lhe.shape[2], q_Lhe.dtype)
        high_hL = -log_hL.to(q_Lhe.dtype)  # two columns, because bf16 would round the logarithm
        logs_hL2 = torch.stack([high_hL, (-log_hL - high_hL).to(q_Lhe.dtype)], dim=2)
        grads: list[list[Tensor]] = [[], [], []]
        heads_first = [(x * scale if x is q_Lhe else x).transpose(0, 1) for x in (q_Lhe, grad_Lhe, k_She, v_She)]
        sizes = [query.clip_lengths] * 2 + [key.clip_lengths] * 2
        clips = zip(
            *(x.split(size, dim=1) for x, size in zip(heads_first, sizes, strict=True)),
            logs_hL2.split(query.clip_lengths, dim=1),
            hides_Lw.split(query.clip_lengths),
            hidden_Sw.split(key.clip_lengths),
            strict=True,
        )
        for q, grad, k, v, logs, hides, hidden in clips:  # [h, K, e], [h, K, e], [h, S, e], [h, S, e], ..
            wide_q = torch.cat([q, logs, hides.expand(len(q), -1, -1)], dim=2)
            wide_k = torch.cat([k, hidden.expand(len(k), -1, -1)], dim=2)
            prob = _exp_of_product(wide_q, wide_k.transpose(1, 2))  # [h, K, S]
            grads[2].append(torch.bmm(prob.transpose(1, 2), grad))
            slope = torch.bmm(grad.contiguous(), v.contiguous().transpose(1, 2))  # of the probabilities
            slope = torch._softmax_backward_data(slope, prob, -1, prob.dtype)
            # rounded probabilities do not sum to 1, so this does not sum to 0, which is most of the error
            slope.addcmul_(prob, slope.sum(dim=-1, keepdim=True), value=-1)
            grads[0].append(torch.bmm(slope, k))
            grads[1].append(torch.bmm(slope.transpose(1, 2), q))
        of_q, of_k, of_v = (torch.cat(parts, dim=1).transpose(0, 1) for parts in grads)
        return of_q * scale, of_k, of_v, None, None


_FAR = -30000.0  # exp(_FAR) is 0


def _exp_of_product(left: Tensor, right: Tensor) -> Tensor:
    """In float32 as a power of 2: there torch's exp takes 15 times as long for a number that it makes 0."""
    if left.dtype != torch.float32:
        return torch.bmm(left, right).exp_()
    return torch.baddbmm(left.new_zeros(1, 1, 1), left, right, beta=0, alpha=math.log2(math.e)).exp2_()


@lru_cache(maxsize=8)
def _extra_columns(query: Packing, key: Packing, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[L, w - 2] and [S, w], the same in every layer; the products of the last w - 2 are 0, or _FAR for later blocks.

    Two columns of ones for the logarithms; then one for each block but the first, in which queries of blocks before it
    hold _FAR and its keys hold 1; then zeros up to a multiple of 32, which bf16 products need to be fast.
    """
    later = torch.arange(1, query.num_blocks)
    hides, hidden = (query.block_L[:, None] < later) * _FAR, (key.block_L[:, None] == later).float()
    pad = -(width + 2 + len(later)) % 32
    return F.pad(hides, (0, pad)).to(dtype), F.pad(F.pad(hidden, (2, 0), value=1.0), (0, pad)).to(dtype)


def attend_varlen(
    q_Lhe: Tensor,
    k_She: Tensor,
    v_She: Tensor,
    query: Packing,
    key: Packing,
    kernel: Callable[..., Tensor] = varlen_kernel,
) -> Tensor:
    """Any assignments on a GPU: one variable-length kernel call, in which every block of every clip is a sequence.

    The queries are in that order already. The keys are gathered: block t brings its own copy of blocks <= t, because
    the sequences of such a kernel must not overlap. `kernel`: called as `varlen_kernel`.
    """
    key_row, copies, ends_q, ends_k = _varlen_plan(query, key, q_Lhe.device)
    max_q, max_k = max(map(max, query.lengths)), max(key.clip_lengths)
    k_Ghe, v_Ghe = (GatherKeys.apply(x, key_row, copies) for x in (k_She, v_She))  # up to 2.5 copies of each key
    return kernel(q_Lhe, k_Ghe, v_Ghe, ends_q, ends_k, max_q, max_k, causal=False)


@lru_cache(maxsize=4)
def _varlen_plan(query: Packing, key: Packing, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in every layer: row of each gathered key [G], copies of each key [N, S], ends of sequences [BN + 1].

    Block t of a clip gathers its first `block_ends[t]` keys, so copy t of a key is its place in the clip after the
    start of sequence t; keys of later blocks are not in it. The last sequence of a clip holds all its keys.
    """
    starts, end_BN = key.first_BN[:, 0].tolist(), torch.tensor(key.block_ends)
    rows = [torch.arange(s, s + end) for s, ends in zip(starts, key.block_ends, strict=True) for end in ends]
    ends_q, ends_k = (F.pad(length.cumsum(0), (1, 0)) for length in (query.length_BN.flatten(), end_BN.flatten()))
    place_S = torch.arange(key.num_tokens) - key.first_BN[key.clip_L, 0]  # of each key in its clip
    first_NS = ends_k[:-1].view(key.num_clips, -1)[key.clip_L].T.flip(0)  # last block first: it holds all keys
    there_NS = place_S < end_BN[key.clip_L].T.flip(0)
    copies = torch.where(there_NS, first_NS + place_S, -1)
    plan = (torch.cat(rows), copies, ends_q.int(), ends_k.int())
    return tuple(send(x, device) for x in plan)  # type: ignore[return-value]
