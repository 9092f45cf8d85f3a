"""From measurements to curves: the mean of every point, and the saving of each curve at equal quality.

Savings are Bjontegaard's measure: the logarithm of the cost is a monotone piecewise cubic of the quality (PCHIP, as in
the JVET sheets); its mean difference over the qualities that both curves reach, turned back into a ratio, is the
result. -0.25 means a quarter fewer tokens at equal quality. A curve of one point is compared at that point's quality.
Nothing is extrapolated: curves that share no quality have no result (None).

Letters: S clips of the set, P points of a curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from evaluations.metrics.bootstrap import bootstrap, jackknife_intervals
from evaluations.metrics.frechet import fit_gaussian, frechet_distance
from evaluations.quality_cost.strategies import Point
from evaluations.quality_cost.sweep import REAL, Figures, Measured, clip_bytes, codec_key, row_key
from tokenizer.assignment import AssignmentSpace
from tokenizer.common.errors import UserError

REFERENCE = "uniform"
_SIZES = ("tokens", "bytes", "reached")
ENTROPY_CODED = ", entropy-coded"


@dataclass(frozen=True)
class CurvePoint:
    """A setting of a strategy or a codec: for each clip the key of its measurement, and which figure is its size."""

    strategy: str
    setting: str
    keys: tuple[str, ...]
    bytes_figure: str = "bytes"


def of_rows(points: Iterable[Point], entropy_coded: bool) -> list[CurvePoint]:
    """The strategies' points; with a GPT each of them again at its entropy-coded size."""
    made = []
    for point in points:
        keys = tuple(row_key(row) for row in point.row_S.tolist())
        made.append(CurvePoint(point.strategy, point.setting, keys))
        if entropy_coded:
            made.append(CurvePoint(point.strategy + ENTROPY_CODED, point.setting, keys, "entropy_bytes"))
    return made


def of_codecs(
    names: Iterable[str], points: Sequence[Point], space: AssignmentSpace, codebook_size: int
) -> list[CurvePoint]:
    """Each codec at the bytes that the tokens of each of these points take, clip by clip."""
    made = []
    for point in points:
        bytes_S = clip_bytes(space.lengths_of(point.row_S), codebook_size, len(space.levels)).tolist()
        for name in names:
            setting = f"bytes of {point.strategy} {point.setting}"
            made.append(CurvePoint(name, setting, tuple(codec_key(name, size) for size in bytes_S)))
    return made


def wanted_keys(points: Sequence[CurvePoint], names: Sequence[str], also: Sequence[str] = ()) -> dict[str, list[str]]:
    """For each clip by name, every key that some point needs, each once, in a fixed order."""
    return {name: sorted({point.keys[s] for point in points} | set(also)) for s, name in enumerate(names)}


def clip_figures(point: CurvePoint, measured: Measured, names: Sequence[str]) -> list[Figures]:
    """What each clip has in this point, with `bytes` as the point counts them."""
    rows = []
    for name, key in zip(names, point.keys, strict=True):
        found = measured.figures[name][key]
        rows.append(found | {"bytes": found[point.bytes_figure]})
    return rows


Statistic = Callable[[np.ndarray], np.ndarray]
"""index_S of some clips -> a number for each point, [P]."""


def mean_over_clips(rows: Sequence[Sequence[Figures]], name: str) -> Statistic:
    """The mean of a figure; NaN if a point has none."""
    value_PS = np.array([[figures.get(name, np.nan) for figures in row] for row in rows], dtype=np.float64)
    return lambda index_S: value_PS[:, index_S].mean(axis=1)


def frechet_over_clips(
    points: Sequence[CurvePoint], measured: Measured, names: Sequence[str], covariance: str = "n"
) -> Statistic:
    """The Frechet distance of the reconstructions of some clips to these clips."""
    real_SF = torch.stack([measured.features[name][REAL] for name in names])
    ours_PSF = [torch.stack([measured.features[n][key] for n, key in zip(names, p.keys, strict=True)]) for p in points]

    def distances(index_S: np.ndarray) -> np.ndarray:
        chosen = torch.from_numpy(index_S)
        real = fit_gaussian(real_SF[chosen], covariance)
        ours_P = (fit_gaussian(ours_SF[chosen], covariance) for ours_SF in ours_PSF)
        return np.array([frechet_distance(ours, real) for ours in ours_P])

    return distances


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


def _log_cost(curve: Curve, quality: float) -> float:
    if len(curve.cost_P) == 1:
        return float(np.log(curve.cost_P[0]))
    return float(PchipInterpolator(curve.quality_P, np.log(curve.cost_P))(quality))


@dataclass(frozen=True)
class Quality:
    """A metric of a point. `of_sets`: a distance between sets, whose interval comes from a jackknife.

    draws: of the bootstrap of any other metric.
    """

    name: str
    of_points: Statistic
    higher_is_better: bool
    draws: int
    of_sets: bool = False


def summaries(
    points: Sequence[CurvePoint], rows: Sequence[Sequence[Figures]], qualities: Sequence[Quality]
) -> list[dict[str, Any]]:
    """Each point over all clips: mean sizes and every quality. `reached`: share of the clips that kept to the bytes."""
    everyone = np.arange(len(rows[0]))
    values = {quality.name: quality.of_points(everyone) for quality in qualities}
    made = []
    for p, (point, row) in enumerate(zip(points, rows, strict=True)):
        sizes = {name: float(np.mean([f[name] for f in row])) for name in _SIZES if name in row[0]}
        found = {name: float(value_P[p]) for name, value_P in values.items()}
        made.append({"strategy": point.strategy, "setting": point.setting, "clips": len(row), **sizes, **found})
    return made


def savings(
    points: Sequence[CurvePoint], rows: Sequence[Sequence[Figures]], qualities: Sequence[Quality], seed: int
) -> list[dict[str, Any]]:
    """For every curve but the reference and every metric: relative cost at equal quality, with its interval.

    Tokens are compared with tokens; codecs and entropy-coded tokens by bytes. Negative numbers save. All curves of a
    draw see the same clips.
    """
    costs = {name: mean_over_clips(rows, name) for name in ("tokens", "bytes")}
    strategies = np.array([point.strategy for point in points])
    others = [name for name in dict.fromkeys(strategies.tolist()) if name != REFERENCE]
    num_clips, found = len(rows[0]), []
    for quality in qualities:
        sign = 1.0 if quality.higher_is_better else -1.0

        def answers(index_S: np.ndarray, quality: Quality = quality, sign: float = sign) -> list[float | None]:
            value_P = sign * quality.of_points(index_S)
            cost_P = {name: of_points(index_S) for name, of_points in costs.items()}

            def curve(strategy: str, cost: str) -> Curve:
                mine = strategies == strategy
                return Curve(cost_P[cost][mine], value_P[mine])

            return [bd_rate(curve(REFERENCE, _cost_of(points, rows, name)), curve(name, _cost_of(points, rows, name)))
                    for name in others]  # fmt: skip

        if quality.of_sets:
            intervals = jackknife_intervals(answers, num_clips, seed)
        else:
            intervals = bootstrap(answers, num_clips, seed, quality.draws)
        for name, saving, interval in zip(others, answers(np.arange(num_clips)), intervals, strict=True):
            entry = {"strategy": name, "reference": REFERENCE, "cost": _cost_of(points, rows, name)}
            found.append(entry | {"metric": quality.name, "saving": saving, "interval": asdict(interval)})
    return found


def _cost_of(points: Sequence[CurvePoint], rows: Sequence[Sequence[Figures]], strategy: str) -> str:
    """Tokens if the strategy counts in them, bytes for codecs and entropy-coded tokens."""
    mine = next(row[0] for point, row in zip(points, rows, strict=True) if point.strategy == strategy)
    return "tokens" if "tokens" in mine and not strategy.endswith(ENTROPY_CODED) else "bytes"
