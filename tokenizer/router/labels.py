"""What a router learns, made from the rewards of a stored table; no label is stored, so one table serves every w_q.

Letters: B clips, A assignments (rows).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.common.errors import UserError


def hard_labels(reward_BA: Tensor) -> Tensor:
    """row_B: the best row of each clip, the first of equals (the paper's classification target)."""
    return reward_BA.argmax(dim=1)


def threshold_labels(lpips_BA: Tensor, tokens_A: Tensor, threshold: float) -> Tensor:
    """row_B: the fewest tokens whose LPIPS is at most `threshold`, the best of equally many; else the longest row.

    The baseline that the reward is compared with (paper.md section 6). UserError where the threshold is not above 0.
    """
    if not threshold > 0:
        raise UserError(f"threshold is {threshold}; it must be above 0")
    fits_BA = lpips_BA <= threshold
    fewest_B1 = tokens_A.where(fits_BA, int(tokens_A.max()) + 1).amin(dim=1, keepdim=True)
    best_B = lpips_BA.where(fits_BA & (tokens_A == fewest_B1), torch.inf).argmin(dim=1)
    return best_B.where(fits_BA.any(dim=1), int(tokens_A.argmax()))


def soft_labels(reward_BA: Tensor, temperature: float) -> Tensor:
    """prob_BA = softmax(reward / temperature): rows nearly as good as the best share its label (paper.md section 8).

    Cross-entropy against it is least where the router's logits are reward / temperature plus a constant for each clip:
    every row of the table teaches, not only the best one. UserError where the temperature is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; it must be above 0")
    return (reward_BA / temperature).softmax(dim=1)
