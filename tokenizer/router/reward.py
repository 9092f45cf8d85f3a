"""The reward of an assignment (paper.md section 1; eq. 6 with the sign that rewards good quality). Pure functions.

    R(x, a) = w_q * Q(x, a) - w_l * L(a),      w_l = 2 - w_q
    Q = (mean LPIPS - LPIPS(x, a)) / std LPIPS,      L = (tokens(a) - mean tokens) / std tokens

Letters: B clips, A assignments (rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.errors import UserError
from tokenizer.router.table import QualityTable

TOTAL_WEIGHT = 2.0  # w_q + w_l


@dataclass(frozen=True)
class RewardStats:
    """Means and (population) standard deviations over random clips and uniformly random assignments."""

    lpips_mean: float
    lpips_std: float
    tokens_mean: float
    tokens_std: float


def stats_of(table: QualityTable) -> RewardStats:
    """The statistics of a table, each (clip, assignment) counting once. Raises UserError where LPIPS has no spread."""
    lpips_BA = table.lpips_BA.double()
    tokens_A = table.space.tokens_A.double()
    stats = RewardStats(
        lpips_mean=lpips_BA.mean().item(),
        lpips_std=lpips_BA.std(correction=0).item(),
        tokens_mean=tokens_A.mean().item(),
        tokens_std=tokens_A.std(correction=0).item(),
    )
    if not (stats.lpips_std > 0 and stats.tokens_std > 0):
        raise UserError(
            f"a quality table of {len(lpips_BA)} clips x {len(tokens_A)} assignments has an LPIPS deviation of "
            f"{stats.lpips_std:g} and a token deviation of {stats.tokens_std:g}; a reward needs both above 0"
        )
    return stats


def reward(lpips_BA: Tensor, tokens_A: Tensor, quality_weight: float, stats: RewardStats) -> Tensor:
    """reward_BA, float64. A lower LPIPS never lowers it, a longer assignment never raises it.

    quality_weight: w_q within [0, 2]; UserError otherwise.
    """
    if not 0.0 <= quality_weight <= TOTAL_WEIGHT:
        raise UserError(f"quality_weight is {quality_weight}; it must lie within [0, {TOTAL_WEIGHT:g}]")
    quality_BA = (stats.lpips_mean - lpips_BA.double()) / stats.lpips_std
    length_A = (tokens_A.double() - stats.tokens_mean) / stats.tokens_std
    return quality_weight * quality_BA - (TOTAL_WEIGHT - quality_weight) * length_A


def reward_percentile(reward_BA: Tensor, chosen_row_B: Tensor) -> float:
    """How far the chosen rows are on the way from each clip's worst row (0) to its best (1), on the mean over clips.

    (E R(chosen) - E R(worst)) / (E R(best) - E R(worst)), the paper's table 8; 1 where best and worst are the same.
    """
    chosen = reward_BA.gather(1, chosen_row_B[:, None]).mean()
    worst, best = reward_BA.amin(dim=1).mean(), reward_BA.amax(dim=1).mean()
    if best == worst:
        return 1.0
    return ((chosen - worst) / (best - worst)).item()


def best_uniform(reward_BA: Tensor, space: AssignmentSpace) -> tuple[int, float]:
    """The level that does best when all blocks of all clips get it, and its reward percentile."""
    num_clips = len(reward_BA)
    percentiles = {
        level: reward_percentile(reward_BA, torch.full((num_clips,), space.uniform_row(level), device=reward_BA.device))
        for level in space.levels
    }
    level = max(percentiles, key=percentiles.__getitem__)
    return level, percentiles[level]
