"""How far a number would move with other clips: bootstrap intervals, and two systems compared on the same clips.

Letters: S clips, D draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from tokenizer.common.errors import UserError
from tokenizer.data.video_io import rng_for

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """`low` to `high` at `level`, from `draws` redrawn sets of clips."""

    low: float
    high: float
    level: float
    draws: int


@dataclass(frozen=True)
class PairedComparison:
    """Second minus first on the same clips: mean with its interval, and the share of clips on which the second wins.

    Equal clips count half. `decided`: the interval does not hold 0.
    """

    difference: float
    interval: Interval
    win_rate: float
    num_clips: int

    @property
    def decided(self) -> bool:
        """Whether the two systems differ by more than other clips would change."""
        return not self.interval.low <= 0 <= self.interval.high


def mean_interval(value_S: np.ndarray, seed: int = 0, draws: int = DRAWS, level: float = LEVEL) -> Interval:
    """Percentile interval of the mean over clips."""
    value_S = np.asarray(value_S, dtype=np.float64)
    if value_S.ndim != 1 or not len(value_S):
        raise UserError(f"an interval needs one number a clip, got shape {value_S.shape}")
    rng = rng_for(seed, "bootstrap of the mean", len(value_S))
    mean_D = np.array([value_S[rng.integers(len(value_S), size=len(value_S))].mean() for _ in range(draws)])
    low, high = np.quantile(mean_D, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, draws)


def spread_interval(
    value: float,
    redrawn: Callable[[np.ndarray], float],
    num_clips: int,
    seed: int = 0,
    draws: int = 100,
    level: float = LEVEL,
) -> Interval:
    """`value` plus and minus the spread of `redrawn(index_S)` over redrawn clips, as for a normal distribution.

    For distances between distributions, whose redrawn values are all shifted upwards, because a redrawn set repeats
    clips: their spread says how sure the number is, their percentiles do not.
    """
    rng = rng_for(seed, "bootstrap of a distance", num_clips)
    value_D = np.array([redrawn(rng.integers(num_clips, size=num_clips)) for _ in range(draws)])
    reach = NormalDist().inv_cdf((1 + level) / 2) * float(value_D.std(ddof=1))
    return Interval(value - reach, value + reach, level, draws)


def compare_paired(
    first_S: np.ndarray, second_S: np.ndarray, lower_is_better: bool, seed: int = 0, draws: int = DRAWS
) -> PairedComparison:
    """Two systems on the same clips in the same order. UserError where the numbers of clips differ."""
    first_S, second_S = np.asarray(first_S, np.float64), np.asarray(second_S, np.float64)
    if first_S.shape != second_S.shape:
        raise UserError(f"{len(first_S)} and {len(second_S)} clips cannot be compared clip by clip")
    gain_S = (first_S - second_S) if lower_is_better else (second_S - first_S)
    wins = float(((gain_S > 0) + 0.5 * (gain_S == 0)).mean())
    interval = mean_interval(second_S - first_S, seed, draws)
    return PairedComparison(float((second_S - first_S).mean()), interval, wins, len(first_S))
