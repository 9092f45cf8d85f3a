"""The head of a GPT and its cross-entropy in one: logits of all tokens at once are the largest tensor of a training.

Here they exist a few rows at a time. Their gradients are those of the sum of all losses but for a factor, so they are
computed along with the losses, and nothing is computed twice.

Letters: W predicted tokens, K of them at a time, D width, V ids of the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ENTRIES = 2**23, 2**25  # of a part of tokens times ids, CPU and GPU; a CPU is slower with fewer


def linear_cross_entropy(x_WD: Tensor, head_VD: Tensor, target_W: Tensor) -> tuple[Tensor, Tensor]:
    """-> sum of all losses, float32, with gradients; loss of each token, float32 [W], without.

    The products run in the precision of autocast, everything else in float32.
    """
    device = x_WD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_WD.dtype
    with torch.autocast(device, enabled=False):
        total, each_W = _LinearCrossEntropy.apply(x_WD, head_VD, target_W, dtype)
    return total, each_W


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_WD: Tensor, head_VD: Tensor, target_W: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        num_ids, on_gpu = len(head_VD), x_WD.is_cuda
        learns = any(ctx.needs_input_grad)
        head_VD = head_VD.to(dtype)
        if on_gpu:  # matrix units want rows by eights
            head_VD = F.pad(head_VD, (0, 0, 0, -num_ids % 8))
        rows = max(1, _ENTRIES[on_gpu] // len(head_VD))
        losses, grads_KD = [], []
        grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if learns else None
        for x_KD, target_K in zip(x_WD.split(rows), target_W.split(rows), strict=True):
            x_KD, target_K1 = x_KD.to(dtype), target_K[:, None]
            logit_KV = (x_KD @ head_VD.T).float()
            logit_KV[:, num_ids:] = -torch.inf
            best_K1, at_K1 = logit_KV.max(dim=1, keepdim=True)
            wanted_K1 = logit_KV.gather(1, target_K1)
            prob_KV = logit_KV.softmax(dim=1)
            # log of the sum = logit - log of the probability, of the likeliest id: no further pass
            losses.append((best_K1 - prob_KV.gather(1, at_K1).log() - wanted_K1)[:, 0])
            if grad_VD is not None:
                slope_KV = prob_KV.scatter_(1, target_K1, prob_KV.gather(1, target_K1) - 1).to(dtype)
                grads_KD.append(slope_KV @ head_VD)
                if dtype == torch.float32:
                    grad_VD.addmm_(slope_KV.T, x_KD)
                else:  # added up in float32
                    grad_VD += slope_KV.T @ x_KD
        each_W = torch.cat(losses)
        if grad_VD is not None:
            ctx.save_for_backward(torch.cat(grads_KD), grad_VD[:num_ids])
        ctx.mark_non_differentiable(each_W)
        return each_W.sum(), each_W

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_WD, grad_VD = ctx.saved_tensors
        return grad_WD * grad.to(grad_WD.dtype), grad_VD * grad, None, None
