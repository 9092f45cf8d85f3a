"""How much cheaper one quality-cost curve is than another at equal quality (Bjontegaard's measure). Pure functions.

The logarithm of the cost is a monotone piecewise cubic of the quality (PCHIP, as in the JVET sheets); its mean
difference over the qualities that both curves reach, turned back into a ratio, is the result: -0.25 means a quarter
fewer tokens at equal quality. A curve of one point is compared at that point's quality. Nothing is extrapolated:
curves that share no quality have no result (None).

Letters: P points of a curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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

    Either side may be a single point, which the other side's curve is read at. None if they share no quality.
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
