"""Which row each strategy picks, on a table small enough to check by eye."""

from __future__ import annotations

import torch

from evaluations.quality_cost.strategies import (
    budget_points,
    default_budgets,
    reward_points,
    threshold_points,
    uniform_points,
)
from tokenizer.assignment import AssignmentSpace
from tokenizer.router.reward import QualityTable, stats_of

SPACE = AssignmentSpace((2, 4), num_blocks=2)  # rows: 2 2, 2 4, 4 2, 4 4
LPIPS = torch.tensor([[0.50, 0.30, 0.20, 0.10], [0.12, 0.11, 0.11, 0.10], [0.90, 0.80, 0.85, 0.70]])
TABLE = QualityTable(LPIPS, 20 - LPIPS, LPIPS, ["busy", "still", "hopeless"], SPACE.levels, SPACE.num_blocks)


def test_uniform_gives_every_block_the_level() -> None:
    assert [(p.setting, p.row_S.tolist()) for p in uniform_points(SPACE, 3)] == [("2", [0] * 3), ("4", [3] * 3)]


def test_threshold_takes_the_shortest_that_is_good_enough_else_the_longest() -> None:
    good, none, every = (point.row_S.tolist() for point in threshold_points(TABLE, (0.35, 0.0, 1.0)))
    assert good == [2, 0, 3], "at equal tokens the better one; the longest where none is"
    assert (none, every) == ([3, 3, 3], [0, 0, 0])
    tokens = [SPACE.tokens_A[p.row_S].sum().item() for p in threshold_points(TABLE)]
    assert tokens == sorted(tokens, reverse=True), "a laxer threshold never takes more tokens"


def test_max_reward_spends_more_as_quality_weighs_more() -> None:
    points = reward_points(TABLE, stats_of(TABLE), (0.0, 0.4, 1.0, 2.0))
    assert points[0].row_S.tolist() == [0, 0, 0]
    assert points[-1].row_S.tolist() == [3, 3, 3]
    tokens = [SPACE.tokens_A[p.row_S].sum().item() for p in points]
    assert tokens == sorted(tokens)


def test_budgets_of_a_router() -> None:
    limit, average = budget_points(-LPIPS, SPACE, ["tokens:6", "average:6"])
    assert (limit.strategy, limit.setting, limit.row_S.tolist()) == ("tokens", "6", [2, 1, 1])
    assert SPACE.tokens_A[average.row_S].double().mean() <= 6
    assert default_budgets(SPACE, "tokens") == ["tokens:4"] and default_budgets(SPACE, "average") == [
        "average:4",
        "average:8",
    ]
