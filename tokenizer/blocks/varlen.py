"""One kernel call for sequences of unequal lengths on a GPU, and keys that several queries' blocks read.

Letters: L queries, S keys, G gathered keys (all packed), Z sequences, B clips, h heads, e width of a head, N copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_TOP_LEFT = 1  # torch's number for a causal mask whose first query sees the first key


def varlen_kernel(
    q_Lhe: Tensor, k_Ghe: Tensor, v_Ghe: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """Query i of a sequence sees all its keys, or with `causal` the first i + 1 -> [L, h, e]. CUDA only.

    `ends_q`, `ends_k`: int32 [Z + 1] on the device, 0 and then where each sequence ends. Flash attention in half
    precision, where the GPU has it (compute capability 8); else torch's memory-efficient kernel, which takes float32.
    """
    if q_Lhe.dtype != torch.float32 and torch.cuda.get_device_capability(q_Lhe.device)[0] >= 8:
        window = (-1, 0) if causal else (-1, -1)
        mixed_Lhe = varlen_attn(q_Lhe, k_Ghe, v_Ghe, ends_q, ends_k, max_q, max_k, window_size=window)
        return cast("Tensor", mixed_Lhe)
    mask = _TOP_LEFT if causal else 0
    # torch has no public name for this one; nested tensors call it too
    attend: Any = torch.ops.aten._efficient_attention_forward
    inputs = (x.unsqueeze(0) for x in (q_Lhe, k_Ghe, v_Ghe))
    return attend(*inputs, None, ends_q, ends_k, max_q, max_k, 0.0, mask, compute_log_sumexp=True)[0][0]


class GatherKeys(torch.autograd.Function):
    """`x_She[row_G]` with a backward that also only reads: each row adds up its copies in their order.

    Indexing's own backward adds with atomics, or sorts where deterministic results are asked for.
    """

    @staticmethod
    def forward(ctx: Any, x_She: Tensor, row_G: Tensor, copy_NS: Tensor) -> Tensor:
        """`row_G`: the key that each gathered one is a copy of. `copy_NS`: where a key's copies stand; -1 for none."""
        ctx.save_for_backward(copy_NS)
        return x_She[row_G]

    @staticmethod
    def backward(ctx: Any, grad_Ghe: Tensor) -> tuple[Tensor, None, None]:
        (copy_NS,) = ctx.saved_tensors
        total_She = grad_Ghe[copy_NS[0]]  # every key has a first copy
        for copy_S in copy_NS[1:]:
            there_S11 = (copy_S >= 0)[:, None, None]
            total_She = total_She + grad_Ghe[copy_S.clamp(min=0)] * there_S11
        return total_She, None, None


class Prefixes(torch.autograd.Function):
    """`x_BShe[:, :end]` for every end, ascending; the last is the whole.

    A slice's own backward fills a tensor of full length for each of them, and adds them up.
    """

    @staticmethod
    def forward(ctx: Any, x_BShe: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.ends = ends
        return tuple(x_BShe[:, :end] for end in ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total_BShe = grads[-1].clone()
        for grad, end in zip(grads[:-1], ctx.ends[:-1], strict=True):
            total_BShe[:, :end] += grad
        return total_BShe, None
