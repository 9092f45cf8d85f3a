"""The strategies of token assignment whose quality-cost curves are drawn (arXiv 2603.12267, section 3 and appendix).

    uniform      the same level for every block of every clip
    threshold    the shortest assignment whose LPIPS in a proxy's table is under a threshold, else the longest
    max-reward   the assignment of the highest reward in that table, one point for each w_q (what routers learn)
    router       the argmax of a router's scores, one point for each router
    tokens, average, price, quality
                 a router under a budget (tokenizer/budget.py), one point for each budget

A point gives every clip a row. `threshold` and `max-reward` choose after seeing the proxy's reconstructions: an upper
bound that costs all assignments of a clip. Letters: S clips of the set, A rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluations.quality_cost.flags import QUALITY_WEIGHTS
from tokenizer.assignment import AssignmentSpace
from tokenizer.budget import choose_rows, find_price, parse_budget
from tokenizer.router.reward import QualityTable, RewardStats, reward

NUM_THRESHOLDS = 9


@dataclass(frozen=True, eq=False)
class Point:
    """One setting of one strategy, and the row it gives to each clip, int64 [S]."""

    strategy: str
    setting: str
    row_S: Tensor


def uniform_points(space: AssignmentSpace, num_clips: int) -> list[Point]:
    """One point for each level."""
    return [Point("uniform", str(k), torch.full((num_clips,), space.uniform_row(k))) for k in space.levels]


def threshold_rows(table: QualityTable, threshold: float) -> Tensor:
    """row_S: fewest tokens with LPIPS at most `threshold`, at equal tokens the better one, else the longest row."""
    space, lpips_SA = table.space, table.lpips_BA.double()
    good_SA = lpips_SA <= threshold
    tokens_SA = space.tokens_A.double().expand_as(lpips_SA).masked_fill(~good_SA, torch.inf)
    shortest_SA = tokens_SA == tokens_SA.amin(dim=1, keepdim=True)
    row_S = lpips_SA.masked_fill(~shortest_SA, torch.inf).argmin(dim=1)
    return torch.where(good_SA.any(dim=1), row_S, space.num_rows - 1)


def threshold_points(table: QualityTable, thresholds: Sequence[float] = ()) -> list[Point]:
    """One point for each threshold; by default the deciles of all LPIPS values in the table."""
    if not thresholds:
        deciles = torch.linspace(0, 1, NUM_THRESHOLDS + 2)[1:-1].double()
        thresholds = table.lpips_BA.flatten().double().quantile(deciles).tolist()
    return [Point("threshold", f"{value:.4g}", threshold_rows(table, value)) for value in thresholds]


def reward_points(table: QualityTable, stats: RewardStats, weights: Sequence[float] = QUALITY_WEIGHTS) -> list[Point]:
    """The best row of the table for each weight of quality."""
    points = []
    for weight in weights:
        reward_SA = reward(table.lpips_BA, table.space.tokens_A, weight, stats)
        points.append(Point("max-reward", f"w_q={weight:g}", table.space.best_row(reward_SA)))
    return points


def default_budgets(space: AssignmentSpace, kind: str) -> list[str]:
    """Budgets at the tokens of each uniform level; as a limit the largest would not bind, so it is left out."""
    totals = [level * space.num_blocks for level in space.levels]
    return [f"{kind}:{total}" for total in (totals[:-1] if kind == "tokens" else totals)]


def budget_points(score_SA: Tensor, space: AssignmentSpace, budgets: Iterable[str]) -> list[Point]:
    """A router's choice under each budget; its strategy is the budget's form, its setting the number.

    score_SA: the router's scores, or under quality:Q its negative distances.
    """
    points = []
    for text in budgets:
        budget = parse_budget(text, space)
        form, _, value = text.partition(":")
        average = budget.average_tokens
        price = None if average is None else find_price(score_SA, space, average)
        points.append(Point(form, value, choose_rows(budget, score_SA, space, price)))
    return points
