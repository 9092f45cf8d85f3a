"""What a router learns, made from the rewards of a stored table; no label is stored, so one table serves every w_q.

Letters: B clips, A assignments (rows).
"""

from __future__ import annotations

from torch import Tensor

from tokenizer.common.errors import UserError


def hard_labels(reward_BA: Tensor) -> Tensor:
    """row_B: the best row of each clip, the first of equals (the paper's classification target)."""
    return reward_BA.argmax(dim=1)


def soft_labels(reward_BA: Tensor, temperature: float) -> Tensor:
    """prob_BA = softmax(reward / temperature): rows nearly as good as the best share its label (paper.md section 8).

    Cross-entropy against it is least where the router's logits are reward / temperature plus a constant for each clip:
    every row of the table teaches, not only the best one. UserError where the temperature is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; it must be above 0")
    return (reward_BA / temperature).softmax(dim=1)
