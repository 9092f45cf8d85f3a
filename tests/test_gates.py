"""Gates of a release: figures with known answers, and a verdict that never passes without data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gates import GATES, Gate, Measured, Rated, measure_gates, only_block_moves


def rated(row_B: list[int]) -> Rated:
    """Three clips, three rows: row 0 is worth 0 everywhere, the best row of a clip 1, any other -1."""
    reward_BA = torch.tensor([[0.0, 1.0, -1.0], [0.0, -1.0, 1.0], [0.0, 1.0, -1.0]])
    rows, tokens = torch.tensor(row_B), torch.tensor([8, 16, 32])
    return Rated(torch.zeros(3, 3, 4, 2, 2), rows, tokens[rows], reward_BA, tokens[reward_BA.argmax(1)], [0.0] * 3, 0)


def test_the_share_of_the_possible_gain() -> None:
    everyone = np.arange(3)
    assert rated([1, 2, 1]).gain(everyone) == 1 and rated([0, 0, 0]).gain(everyone) == 0
    assert rated([1, 0, 0]).gain(everyone) == pytest.approx(1 / 3)
    assert rated([2, 1, 2]).gain(everyone) == -1


def test_only_one_block_moves() -> None:
    video = torch.arange(8.0).view(1, 1, 8, 1, 1)
    assert only_block_moves(video, 2, 4).flatten().tolist() == [0, 0, 0, 0, 4, 5, 5, 5]
    assert only_block_moves(video, 3, 4).flatten().tolist() == [0, 0, 0, 0, 0, 0, 6, 7]


def test_what_is_not_measured_does_not_hold(tmp_path: Path) -> None:
    gates = measure_gates(tmp_path)
    assert len(gates) == len(GATES) and not any(each.holds for each in gates)
    assert {each.cells[2] for each in gates} == {"not measured"}
    good = Measured(Gate("name", "goal", lambda _: None, lambda f: f["x"] > 1), {"x": 2.0})
    assert good.holds and good.cells == ("name", "goal", "x 2", "yes")
