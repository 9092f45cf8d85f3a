"""How much cheaper one quality-cost curve is than another at equal quality (Bjontegaard's measure). Pure functions.

The logarithm of the cost is a monotone piecewise cubic of the quality (PCHIP, as in the JVET sheets); its mean
difference over the qualities that both curves reach, turned back into a ratio, is the answer: -0.25 says "a quarter
fewer tokens at equal quality". A curve of one point is compared at that point's quality. Nothing is extrapolated:
curves that share no quality have no answer (None).

Letters: P points of a curve, S clips, D draws of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from tokenizer.common.errors import UserError


@dataclass(frozen=True, eq=False)
class Curve:
    """Points in any order, float64 [P] each: cost above 0, quality with higher meaning better."""

    cost_P: np.ndarray
    quality_P: np.ndarray

    def __post_init__(self) -> None:
        if self.cost_P.shape != self.quality_P.shape or self.cost_P.ndim != 1 or len(self.cost_P) == 0:
            raise ValueError(f"a curve of {self.cost_P.shape} costs and {self.quality_P.shape} qualities")
        if not (np.isfinite(self.cost_P).all() and np.isfinite(self.quality_P).all() and (self.cost_P > 0).all()):
            raise UserError("a quality-cost curve needs finite qualities and costs above 0")


def frontier(curve: Curve) -> Curve:
    """The points that no cheaper or equally cheap point equals in quality; cost and quality then both ascend."""
    order = np.lexsort((-curve.quality_P, curve.cost_P))
    best_P = np.maximum.accumulate(curve.quality_P[order])
    better = np.concatenate([[True], best_P[1:] > best_P[:-1]])
    return Curve(curve.cost_P[order][better], curve.quality_P[order][better])


def bd_rate(reference: Curve, test: Curve) -> float | None:
    """Relative difference in cost of `test` at equal quality, averaged over the qualities both reach; negative saves.

    Either side may be a single point, which is then met by the other side's curve. None where they share no quality.
    """
    reference, test = frontier(reference), frontier(test)
    low = max(reference.quality_P[0], test.quality_P[0])
    high = min(reference.quality_P[-1], test.quality_P[-1])
    if low > high:
        return None
    if low == high:
        return float(np.exp(_log_cost(test, low) - _log_cost(reference, low)) - 1)
    means = [PchipInterpolator(c.quality_P, np.log(c.cost_P)).integrate(low, high) / (high - low)
             for c in (reference, test)]  # fmt: skip
    return float(np.exp(means[1] - means[0]) - 1)


def cost_at(curve: Curve, quality: float) -> float | None:
    """What the curve pays for `quality`; None outside of the qualities it reaches."""
    curve = frontier(curve)
    if not curve.quality_P[0] <= quality <= curve.quality_P[-1]:
        return None
    return float(np.exp(_log_cost(curve, quality)))


def _log_cost(curve: Curve, quality: float) -> float:
    if len(curve.cost_P) == 1:
        return float(np.log(curve.cost_P[0]))
    return float(PchipInterpolator(curve.quality_P, np.log(curve.cost_P))(quality))


@dataclass(frozen=True)
class Interval:
    """`low` to `high` at `level`. `defined`: share of the draws that had an answer; below 0.95 there is no interval."""

    low: float | None
    high: float | None
    level: float
    draws: int
    defined: float


LEAST_DEFINED = 0.95


def bootstrap(
    statistics: Callable[[np.ndarray], Sequence[float | None]],
    num_clips: int,
    generator: torch.Generator,
    draws: int = 1000,
    percentile: bool = True,
    level: float = 0.95,
) -> list[Interval]:
    """Intervals of all of `statistics(index_S)` when the clips are drawn anew with replacement, for all alike.

    Unlike those of metrics/bootstrap.py, these statistics are redrawn together and may have no answer. The same clips
    go into every curve of a draw, so what clips have in common cancels. percentile: quantiles of the redrawn values;
    otherwise the value plus and minus their spread, as for a normal distribution, for distances between distributions:
    a redrawn set repeats clips, which shifts them all.
    """
    index_DS = torch.randint(num_clips, (draws, num_clips), generator=generator).numpy()
    columns = zip(*(statistics(index_S) for index_S in index_DS), strict=True)
    here = statistics(np.arange(num_clips))
    return [_interval(value, column, percentile, level) for value, column in zip(here, columns, strict=True)]


def _interval(value: float | None, redrawn: Sequence[float | None], percentile: bool, level: float) -> Interval:
    found = [each for each in redrawn if each is not None]
    defined = len(found) / len(redrawn)
    if value is None or defined < LEAST_DEFINED:
        return Interval(None, None, level, len(redrawn), defined)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    if not percentile:
        reach = NormalDist().inv_cdf((1 + level) / 2) * float(np.std(found, ddof=1))
        low, high = value - reach, value + reach
    return Interval(float(low), float(high), level, len(redrawn), defined)
