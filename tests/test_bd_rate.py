"""Bjontegaard's measure: answers known in closed form, and what has no answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluations.metrics.bootstrap import bootstrap, jackknife_intervals
from evaluations.quality_cost.points import Curve, bd_rate, frontier
from tokenizer.common.errors import UserError


def curve(*points: tuple[float, float]) -> Curve:
    cost_P, quality_P = np.array(points, float).T
    return Curve(cost_P, quality_P)


UNIFORM = curve((128, 27.1), (256, 28.0), (512, 29.4), (1024, 30.1))


def test_a_curve_costs_nothing_more_than_itself() -> None:
    assert bd_rate(UNIFORM, UNIFORM) == 0


@pytest.mark.parametrize("factor", [0.44, 0.5, 1.0, 3.0])
def test_a_scaled_cost_is_found_exactly(factor: float) -> None:
    scaled = Curve(UNIFORM.cost_P * factor, UNIFORM.quality_P)
    assert bd_rate(UNIFORM, scaled) == pytest.approx(factor - 1, abs=1e-12)


def test_straight_lines_in_the_logarithm_have_a_closed_form() -> None:
    """log cost = a + b q on both sides: the mean difference over the shared [1, 3] is taken at its middle, 2."""
    quality_P = np.array([0.0, 1.0, 2.0, 3.0])
    reference = Curve(np.exp(5 + 0.3 * quality_P), quality_P)
    test = Curve(np.exp(4 + 0.5 * (quality_P + 1)), quality_P + 1)
    assert bd_rate(reference, test) == pytest.approx(np.exp((4 + 0.5 * 2) - (5 + 0.3 * 2)) - 1, abs=1e-12)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.lists(st.floats(0.01, 1), min_size=2, max_size=5))
def test_the_other_way_round_is_the_inverse(up: list[float], right: list[float]) -> None:
    a = Curve(100 * np.exp(np.cumsum(up)), np.cumsum(up))
    b = Curve(90 * np.exp(np.cumsum(right)), np.cumsum(right))
    there, back = bd_rate(a, b), bd_rate(b, a)
    if there is None or back is None:
        assert there is back
    else:
        assert (1 + there) * (1 + back) == pytest.approx(1, abs=1e-9)


def test_one_point_is_met_at_its_own_quality() -> None:
    assert bd_rate(UNIFORM, curve((1024 * 0.44, 30.1))) == pytest.approx(-0.56)
    dearer, cheaper = (bd_rate(UNIFORM, curve((cost, 28.7))) for cost in (512, 256))  # UNIFORM pays between the two
    assert cheaper is not None and dearer is not None and cheaper < 0 < dearer


def test_nothing_is_extrapolated() -> None:
    assert bd_rate(UNIFORM, curve((64, 20.0), (128, 21.0))) is None
    assert bd_rate(UNIFORM, curve((2048, 31.0))) is None
    assert bd_rate(UNIFORM, curve((64, 31.0))) is None
    with pytest.raises(UserError, match="finite"):
        curve((0, 27.0))


def test_points_that_a_cheaper_one_beats_do_not_count() -> None:
    bumpy = curve((100, 1.0), (200, 0.5), (300, 2.0), (300, 1.5), (400, 2.0))
    kept = frontier(bumpy)
    assert kept.cost_P.tolist() == [100, 300] and kept.quality_P.tolist() == [1, 2]


def test_bootstrap() -> None:
    value_S = np.arange(40.0)

    def statistics(index_S: np.ndarray) -> list[float | None]:
        return [value_S[index_S].mean(), 1.0 if 0 in index_S else None, value_S[index_S].mean()]

    mean, often_undefined, _ = bootstrap(statistics, 40, 0, 500)
    standard_error = value_S.std() / np.sqrt(40)
    assert mean.low == pytest.approx(19.5 - 1.96 * standard_error, abs=0.5)
    assert mean.high == pytest.approx(19.5 + 1.96 * standard_error, abs=0.5)
    assert often_undefined.low is None and often_undefined.high is None and 0.57 < often_undefined.defined < 0.7

    again, undefined, same = jackknife_intervals(statistics, 40)
    assert again == same and again.low == pytest.approx(mean.low, abs=0.6)
    assert again.low + again.high == pytest.approx(2 * 19.5), "spread around the value itself"
    assert undefined.low is None, "a jackknife needs every group"
    assert bootstrap(lambda index_S: [1.0], 1)[0].low is None, "one clip has no interval"
