"""From logits to the next id: guidance, temperature, grammar, top-k, top-p, and the draw. Small verbs on plain tensors.

Letters: S slots, G streams of a slot (2 with guidance: with the class, without it), V ids that the head can say.
"""

from __future__ import annotations

import torch
from torch import Tensor


def guide(logits_SGV: Tensor, scale_S: Tensor) -> Tensor:
    """Classifier-free guidance u + s (c - u), float32 [S, V]; s = 1 is c to the bit, and so is a single stream."""
    logits_SGV = logits_SGV.float()
    if logits_SGV.shape[1] == 1:
        return logits_SGV[:, 0]
    with_class, without = logits_SGV.unbind(dim=1)
    scale_S1 = scale_S[:, None]
    return torch.where(scale_S1 == 1, with_class, without + scale_S1 * (with_class - without))


def keep_top_k(logits_SV: Tensor, k: int) -> Tensor:
    """All but the k likeliest ids become -inf (ties with the last of them stay); 0 keeps all."""
    if k == 0 or k >= logits_SV.shape[1]:
        return logits_SV
    least_S1 = logits_SV.topk(k, dim=1).values[:, -1:]
    return logits_SV.masked_fill(logits_SV < least_S1, -torch.inf)


def keep_top_p(logits_SV: Tensor, p: float) -> Tensor:
    """Keeps the likeliest ids that together reach probability p, at least one; 1.0 keeps all."""
    if p >= 1:
        return logits_SV
    sorted_SV, id_SV = logits_SV.sort(dim=1, descending=True, stable=True)
    share_SV = sorted_SV.softmax(dim=1)
    before_SV = share_SV.cumsum(dim=1) - share_SV  # of the likelier ones
    drop_SV = torch.zeros_like(logits_SV, dtype=torch.bool).scatter_(1, id_SV, before_SV >= p)
    return logits_SV.masked_fill(drop_SV, -torch.inf)


def pick(
    logits_SV: Tensor, bias_SV: Tensor, noise_SV: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Draw an id for every slot, int64 [S]. `bias_SV`: 0 where the grammar allows an id, -inf elsewhere.

    `noise_SV`: standard Gumbel noise; the largest of (logit + noise) is a draw from softmax(logits).
    """
    logits_SV = logits_SV / temperature + bias_SV
    return (keep_top_p(keep_top_k(logits_SV, top_k), top_p) + noise_SV).argmax(dim=1)
