"""The reward: its sign, its weights, its percentile, and the labels made from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.errors import UserError
from tokenizer.router.reward import (
    QualityTable,
    RewardStats,
    best_uniform,
    hard_labels,
    reward,
    reward_percentile,
    soft_labels,
    stats_of,
    threshold_labels,
)

SPACE = AssignmentSpace((8, 16, 32), 2)
STATS = RewardStats(lpips_mean=0.3, lpips_std=0.1, tokens_mean=37.0, tokens_std=14.0)


def toy_table(lpips_BA: torch.Tensor) -> QualityTable:
    names = [f"clip{i}" for i in range(len(lpips_BA))]
    return QualityTable(lpips_BA, lpips_BA, lpips_BA, names, SPACE.levels, SPACE.num_blocks)


@given(
    st.floats(0, 2),
    st.lists(st.floats(0, 1, width=32), min_size=9, max_size=9),
    st.integers(0, 8),
    st.floats(0, 1, width=32),
)
def test_better_lpips_never_lowers_the_reward(weight: float, lpips: list[float], row: int, gain: float) -> None:
    worse_BA = torch.tensor([lpips])
    better_BA = worse_BA.clone()
    better_BA[0, row] -= gain
    before, after = (reward(each, SPACE.tokens_A, weight, STATS)[0] for each in (worse_BA, better_BA))
    assert after[row] >= before[row]
    others = torch.arange(9) != row
    assert torch.equal(after[others], before[others])


def test_more_tokens_at_equal_lpips_cost_and_the_two_weights_sum_to_two() -> None:
    flat_BA = torch.full((1, SPACE.num_rows), 0.3)
    cost_A = reward(flat_BA, SPACE.tokens_A, 1.2, STATS)[0]
    assert torch.allclose(cost_A, -0.8 * (SPACE.tokens_A.double() - 37) / 14)
    assert reward(flat_BA, SPACE.tokens_A, 2.0, STATS).abs().max() < 1e-6
    with pytest.raises(UserError, match="2.5"):
        reward(flat_BA, SPACE.tokens_A, 2.5, STATS)


def test_statistics_are_those_of_random_clips_and_assignments() -> None:
    paper = AssignmentSpace((32, 64, 128, 256, 512), 4)
    lpips_BA = torch.rand(3, paper.num_rows, generator=torch.Generator().manual_seed(0))
    stats = stats_of(QualityTable(lpips_BA, lpips_BA, lpips_BA, ["a", "b", "c"], paper.levels, 4))
    assert stats.tokens_mean == pytest.approx(793.6)
    assert stats.tokens_std == pytest.approx(349.14, abs=0.005)
    assert stats.lpips_mean == pytest.approx(lpips_BA.mean().item(), abs=1e-6)
    with pytest.raises(UserError, match="above 0"):
        stats_of(toy_table(torch.full((2, SPACE.num_rows), 0.5)))


def test_percentile_runs_from_the_worst_row_to_the_best() -> None:
    reward_BA = torch.tensor([[0.0, 1.0, 4.0], [2.0, 0.0, 1.0]]).double()
    assert reward_percentile(reward_BA, reward_BA.argmax(dim=1)) == 1.0
    assert reward_percentile(reward_BA, reward_BA.argmin(dim=1)) == 0.0
    assert reward_percentile(reward_BA, torch.tensor([1, 2])) == pytest.approx((1.0 - 0.0) / (3.0 - 0.0))
    assert reward_percentile(torch.ones(2, 3), torch.tensor([0, 1])) == 1.0


def test_best_uniform_tries_every_level() -> None:
    reward_BA = torch.zeros(2, SPACE.num_rows).double()
    reward_BA[:, SPACE.uniform_row(16)] = 1.0
    reward_BA[:, 1] = 2.0
    assert best_uniform(reward_BA, SPACE) == (16, 0.5)


def test_soft_labels_tend_to_hard_ones_and_keep_the_order() -> None:
    reward_BA = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).double()
    cold, warm = soft_labels(reward_BA, 1e-3), soft_labels(reward_BA, 1.0)
    assert torch.equal(cold.argmax(dim=1), hard_labels(reward_BA)) and cold.amax(dim=1).min() > 0.9
    assert torch.equal(warm.argsort(dim=1), reward_BA.argsort(dim=1))
    assert torch.allclose(warm.sum(dim=1), torch.ones(4).double())
    with pytest.raises(UserError, match="temperature"):
        soft_labels(reward_BA, 0.0)


def test_threshold_labels_are_the_shortest_below_it_else_the_longest() -> None:
    tokens_A = torch.tensor([4, 6, 6, 8])
    lpips_BA = torch.tensor([[0.9, 0.3, 0.2, 0.1], [0.2, 0.1, 0.1, 0.1], [0.9, 0.8, 0.7, 0.6], [0.9, 0.31, 0.9, 0.3]])
    assert threshold_labels(lpips_BA, tokens_A, 0.3).tolist() == [2, 0, 3, 3]  # of two rows of 6 tokens the better one
    assert threshold_labels(lpips_BA, tokens_A, 0.0).tolist() == [3, 3, 3, 3]
