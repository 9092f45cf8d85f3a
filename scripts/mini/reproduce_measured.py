"""What the quality-cost stages of scripts/mini/reproduce.py measured, and the numbers that the claims are made of.

Letters: S clips, P points of a curve, F numbers in a feature.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluations.metrics.bootstrap import Interval, bootstrap, jackknife_intervals
from evaluations.metrics.frechet import frechet_of_features
from evaluations.quality_cost.points import Curve, bd_rate
from evaluations.shards import read_shard
from tokenizer.assignment import AssignmentSpace

DISTANCE, FRECHET = "stlpips_alex", "fcd_effnet"
STRATEGIES = ("uniform", "threshold", "max-reward", "router")
Statistic = Callable[[np.ndarray], float | None]
"""index_S of some clips -> the number of a claim, None if these clips do not have it."""


@dataclass(frozen=True)
class Answer:
    """A claim's number for one training seed, on `clips` test clips. pair: what it compares, ours and the reference."""

    value: float | None
    interval: Interval
    clips: int
    pair: tuple[float, float] | None = None


def over_clips(statistic: Statistic, num_clips: int) -> Answer:
    """Of a mean, or what is made of means."""
    (interval,) = bootstrap(lambda index_S: [statistic(index_S)], num_clips)
    return Answer(statistic(np.arange(num_clips)), interval, num_clips)


def over_groups(statistic: Statistic, num_clips: int) -> Answer:
    """Of a Frechet distance, or what is made of some."""
    (interval,) = jackknife_intervals(lambda index_S: [statistic(index_S)], num_clips)
    return Answer(statistic(np.arange(num_clips)), interval, num_clips)


@dataclass(frozen=True)
class Point:
    """One setting of a strategy: figures of each clip and, if asked for, its features and rows."""

    figures: dict[str, np.ndarray]  # name -> [S]
    keys: list[str]

    def mean(self, name: str, index_S: np.ndarray) -> float:
        return float(self.figures[name][index_S].mean())


class Measured:
    """The folder of a quality-cost stage: every point, clip by clip in the order of the table."""

    def __init__(self, folder: Path, space: AssignmentSpace) -> None:
        self.folder, self.space = folder, space
        rows: dict[tuple[str, str], list[dict[str, str]]] = {}
        with open(folder / "clips.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.setdefault((row["strategy"], row["setting"]), []).append(row)
        self.points = {at: self._point(mine) for at, mine in rows.items()}
        self.names = [row["clip"] for row in next(iter(rows.values()))]

    def _point(self, rows: Sequence[Mapping[str, str]]) -> Point:
        figures = {name: np.array([float(row[name]) for row in rows]) for name in ("tokens", "psnr", DISTANCE)}
        lengths = torch.tensor([[int(k) for k in row["assignment"].split()] for row in rows])
        return Point(figures, [f"row:{row}" for row in self.space.rows_of(lengths).tolist()])

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """ "clip key" -> float32 [F]."""
        found: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("units/*/*.safetensors")):
            found |= read_shard(path)[1]
        return found

    def frechet(self, point: Point, index_S: np.ndarray) -> float:
        """Frechet distance of a point's reconstructions of some clips to these clips."""
        ours = torch.stack([self.features[f"{self.names[i]} {point.keys[i]}"] for i in index_S])
        real = torch.stack([self.features[f"{self.names[i]} real"] for i in index_S])
        return frechet_of_features(ours, real)

    def curve(self, strategy: str, metric: str, index_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean tokens and distance of each point of a strategy, in the order of the tokens."""
        mine = [point for (name, _), point in self.points.items() if name == strategy]
        tokens_P = np.array([point.mean("tokens", index_S) for point in mine])
        value_P = np.array([
            self.frechet(point, index_S) if metric == FRECHET else point.mean(metric, index_S) for point in mine
        ])  # fmt: skip
        order = np.argsort(tokens_P, kind="stable")
        return tokens_P[order], value_P[order]


def at_equal_tokens(measured: Measured, metric: str) -> Statistic:
    """The smallest relative gain of max-reward over the uniform levels between the lowest and the highest.

    Max-reward's distance is read between its points, linear in the logarithm of the tokens.
    """

    def statistic(index_S: np.ndarray) -> float | None:
        uniform, best = (measured.curve(name, metric, index_S) for name in ("uniform", "max-reward"))
        inner = list(zip(uniform[0][1:-1], uniform[1][1:-1], strict=True))
        if best[0][0] > inner[0][0]:
            return None
        return min(float(1 - np.interp(np.log(t), np.log(best[0]), best[1]) / value) for t, value in inner)

    return statistic


def saved_at(measured: Measured, metric: str, level: str) -> Statistic:
    """Relative tokens of max-reward at the distance of a uniform level; negative saves."""

    def statistic(index_S: np.ndarray) -> float | None:
        point = measured.points["uniform", level]
        value = measured.frechet(point, index_S) if metric == FRECHET else point.mean(metric, index_S)
        tokens_P, value_P = measured.curve("max-reward", metric, index_S)
        at_level = Curve(np.array([point.mean("tokens", index_S)]), np.array([-value]))
        return bd_rate(at_level, Curve(tokens_P, -value_P))

    return statistic


def saved_by(measured: Measured, reference: str, test: str) -> Statistic:
    """Relative tokens of one strategy against another at equal distance (Bjontegaard); negative saves."""

    def statistic(index_S: np.ndarray) -> float | None:
        curves = [measured.curve(name, DISTANCE, index_S) for name in (reference, test)]
        return bd_rate(*(Curve(tokens_P, -value_P) for tokens_P, value_P in curves))

    return statistic


Side = tuple[Measured, tuple[str, str]]
"""A measured folder, and the strategy and setting of a point in it."""


def relative(name: str, ours: Side, theirs: Side) -> Answer:
    """Ours over theirs, minus 1: of the means of a figure, or of the Frechet distances."""
    (a, at_a), (b, at_b) = ours, theirs
    p, q, num_clips = a.points[at_a], b.points[at_b], len(a.names)

    def pair(index_S: np.ndarray) -> tuple[float, float]:
        if name == FRECHET:
            return a.frechet(p, index_S), b.frechet(q, index_S)
        return p.mean(name, index_S), q.mean(name, index_S)

    interval_of = over_groups if name == FRECHET else over_clips
    answer = interval_of(lambda index_S: ratio(*pair(index_S)), num_clips)
    return replace(answer, pair=pair(np.arange(num_clips)))


def ratio(ours: float, theirs: float) -> float:
    return ours / theirs - 1
