"""From measurements to curves: the mean of every point, and what each curve saves at equal quality.

Letters: S clips of the set, P points of a curve.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluations.bd_rate import Curve, bd_rate, bootstrap
from evaluations.strategies import Point
from evaluations.sweep import Figures, Measured, clip_bytes, codec_key, row_key
from tokenizer.assignment import AssignmentSpace
from tokenizer.common.runtime import generator_for

HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False}
REFERENCE = "uniform"
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
    """For each clip by name, every key that some point asks for, each once, in a fixed order."""
    return {name: sorted({point.keys[s] for point in points} | set(also)) for s, name in enumerate(names)}


def clip_figures(point: CurvePoint, measured: Measured, names: Sequence[str]) -> list[Figures]:
    """What each clip has in this point, with `bytes` as the point counts them."""
    rows = []
    for name, key in zip(names, point.keys, strict=True):
        found = measured.figures[name][key]
        rows.append(found | {"bytes": found[point.bytes_figure]})
    return rows


def summary(point: CurvePoint, rows: Sequence[Figures]) -> dict[str, Any]:
    """Means over the clips. `reached`: share of the clips in which a codec kept to the bytes."""
    shared = [name for name in ("tokens", "bytes", *HIGHER_IS_BETTER, "reached") if name in rows[0]]
    means = {name: float(np.mean([row[name] for row in rows])) for name in shared}
    return {"strategy": point.strategy, "setting": point.setting, "clips": len(rows), **means}


def savings(
    points: Sequence[CurvePoint], rows: Sequence[Sequence[Figures]], draws: int, seed: int
) -> list[dict[str, Any]]:
    """For every curve but the reference and every metric: relative cost at equal quality, with its interval.

    Tokens are compared with tokens; codecs and entropy-coded tokens by bytes. Negative numbers save.
    """
    found = []
    for strategy in dict.fromkeys(point.strategy for point in points if point.strategy != REFERENCE):
        cost = "tokens" if _is_plain(strategy, points, rows) else "bytes"
        for metric in HIGHER_IS_BETTER:
            reference_PS, test_PS = (_table(points, rows, name, cost, metric) for name in (REFERENCE, strategy))

            def saving(index_S: np.ndarray, pair: tuple[Tables, Tables] = (reference_PS, test_PS)) -> float | None:
                return bd_rate(*(table.curve(index_S) for table in pair))

            num_clips = reference_PS.cost_PS.shape[1]
            interval = bootstrap(saving, num_clips, generator_for(seed, "bootstrap"), draws)
            found.append(
                {
                    "strategy": strategy,
                    "reference": REFERENCE,
                    "cost": cost,
                    "metric": metric,
                    "saving": saving(np.arange(num_clips)),
                    "interval": asdict(interval),
                }
            )
    return found


@dataclass(frozen=True, eq=False)
class Tables:
    """Cost and quality (higher is better) of each point for each clip, [P, S]."""

    cost_PS: np.ndarray
    quality_PS: np.ndarray

    def curve(self, index_S: np.ndarray) -> Curve:
        """The curve over the clips of a draw."""
        return Curve(self.cost_PS[:, index_S].mean(axis=1), self.quality_PS[:, index_S].mean(axis=1))


def _table(
    points: Sequence[CurvePoint], rows: Sequence[Sequence[Figures]], strategy: str, cost: str, metric: str
) -> Tables:
    mine = [row for point, row in zip(points, rows, strict=True) if point.strategy == strategy]
    sign = 1 if HIGHER_IS_BETTER[metric] else -1

    def array(name: str) -> np.ndarray:
        return np.array([[figures[name] for figures in row] for row in mine], dtype=np.float64)

    return Tables(array(cost), sign * array(metric))


def _is_plain(strategy: str, points: Sequence[CurvePoint], rows: Sequence[Sequence[Figures]]) -> bool:
    """Whether the strategy's cost is a number of tokens: it has some, and they are not entropy-coded."""
    return not strategy.endswith(ENTROPY_CODED) and all(
        "tokens" in row[0] for point, row in zip(points, rows, strict=True) if point.strategy == strategy
    )
