"""How far a number would move with other clips: intervals by bootstrap and jackknife, and paired comparisons.

The bootstrap redraws clips with replacement; its percentiles serve means and everything that is made of means. A
Frechet distance is biased upwards by about 1/n, and a redrawn set repeats clips, which adds to that bias, so its
percentiles miss the population value. The delete-a-group jackknife serves there: it repeats no clip, its spread is the
standard error, and the same values extrapolate the distance to infinitely many clips.

Letters: S clips, D draws, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from tokenizer.common.device import rng_for
from tokenizer.common.errors import UserError

DRAWS = 1000
GROUPS = 20
LEVEL = 0.95
LEAST_DEFINED = 0.95
Statistics = Callable[[np.ndarray], Sequence[float | None]]
"""index_S of some clips -> one or several numbers; None for a number that these clips do not have."""


@dataclass(frozen=True)
class Interval:
    """`low` to `high` at `level`; both None if there is no interval.

    draws: redrawn sets (bootstrap) or groups left out (jackknife). defined: share of them that gave a number; below
    LEAST_DEFINED there is no interval.
    """

    low: float | None
    high: float | None
    level: float
    draws: int
    defined: float = 1.0

    def excludes(self, value: float) -> bool:
        """Whether there is an interval and `value` lies outside of it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


@dataclass(frozen=True)
class Jackknife:
    """`interval` is around the plain value; `limit` and `limit_interval` extrapolate the value in 1/n to 0."""

    value: float
    interval: Interval
    limit: float
    limit_interval: Interval


@dataclass(frozen=True)
class PairedComparison:
    """Second minus first on the same clips: mean with its interval, and the share of clips on which the second wins.

    Equal clips count half. `decided`: the interval does not contain 0.
    """

    difference: float
    interval: Interval
    win_rate: float
    num_clips: int

    @property
    def decided(self) -> bool:
        """Whether the two systems differ by more than other clips would change."""
        return self.interval.excludes(0)


def bootstrap(
    statistics: Statistics, num_clips: int, seed: int = 0, draws: int = DRAWS, level: float = LEVEL
) -> list[Interval]:
    """Percentile intervals of every number of `statistics`, over sets of `num_clips` redrawn with replacement.

    All numbers of a draw see the same clips, so what clips have in common cancels in differences and ratios. One clip
    has no interval.
    """
    here = statistics(np.arange(num_clips))
    if num_clips < 2:
        return [Interval(None, None, level, 0) for _ in here]
    rng = rng_for(seed, "bootstrap of the mean", num_clips)
    columns = zip(*(statistics(rng.integers(num_clips, size=num_clips)) for _ in range(draws)), strict=True)
    intervals = []
    for value, column in zip(here, columns, strict=True):
        found = [each for each in column if each is not None]
        defined = len(found) / draws
        low, high = None, None
        if value is not None and defined >= LEAST_DEFINED:
            low, high = map(float, np.quantile(found, [(1 - level) / 2, (1 + level) / 2]))
        intervals.append(Interval(low, high, level, draws, defined))
    return intervals


def mean_interval(value_S: np.ndarray, seed: int = 0, draws: int = DRAWS, level: float = LEVEL) -> Interval:
    value_S = np.asarray(value_S, dtype=np.float64)
    if value_S.ndim != 1 or not len(value_S):
        raise UserError(f"an interval needs one number a clip, got shape {value_S.shape}")
    return bootstrap(lambda index_S: [value_S[index_S].mean()], len(value_S), seed, draws, level)[0]


def groups_of(num_clips: int, seed: int = 0, groups: int = GROUPS, side: int = 0) -> list[np.ndarray]:
    """Random groups of nearly equal size, sorted inside; at most one for each clip. `side`: draws other groups."""
    order_S = rng_for(seed, "jackknife", num_clips, side).permutation(num_clips)
    return [np.sort(part) for part in np.array_split(order_S, min(groups, num_clips))]


def jackknife(value: float, left_out: Sequence[Sequence[float]], level: float = LEVEL) -> Jackknife:
    """From a value over all clips and, for each independent set of clips, the values with one of its groups left out.

    Two sets of clips that belong together pair by pair are one set: the same clips are left out on both sides. The
    variances of independent sets add up. Raises ValueError for fewer than two groups.
    """
    variance, bias = 0.0, 0.0
    for values in left_out:
        value_G = np.asarray(values, dtype=np.float64)
        num_groups = len(value_G)
        if num_groups < 2:
            raise ValueError(f"a jackknife needs at least 2 groups, got {num_groups}")
        variance += (num_groups - 1) * float(value_G.var())
        bias += (num_groups - 1) * (float(value_G.mean()) - value)
    smallest = min(map(len, left_out))
    reach = float(student_t.ppf((1 + level) / 2, smallest - 1)) * math.sqrt(variance)
    draws = sum(map(len, left_out))

    def around(center: float) -> Interval:
        return Interval(center - reach, center + reach, level, draws)

    return Jackknife(value, around(value), value - bias, around(value - bias))


def jackknife_intervals(
    statistics: Statistics, num_clips: int, seed: int = 0, groups: int = GROUPS, level: float = LEVEL
) -> list[Interval]:
    """Intervals around every number of `statistics` over one set of clips, by leaving out one group at a time.

    A number that is missing for all clips or for any group has no interval.
    """
    here = statistics(np.arange(num_clips))
    parts = groups_of(num_clips, seed, groups)
    if len(parts) < 2:
        return [Interval(None, None, level, len(parts)) for _ in here]
    columns = zip(*(statistics(np.delete(np.arange(num_clips), part)) for part in parts), strict=True)
    intervals = []
    for value, column in zip(here, columns, strict=True):
        found = [each for each in column if each is not None]
        if value is None or len(found) < len(parts):
            intervals.append(Interval(None, None, level, len(parts), len(found) / len(parts)))
        else:
            intervals.append(jackknife(value, [found], level).interval)
    return intervals


def compare_paired(
    first_S: np.ndarray, second_S: np.ndarray, lower_is_better: bool, seed: int = 0, draws: int = DRAWS
) -> PairedComparison:
    """Two systems on the same clips in the same order. UserError if the numbers of clips differ."""
    first_S, second_S = np.asarray(first_S, np.float64), np.asarray(second_S, np.float64)
    if first_S.shape != second_S.shape:
        raise UserError(f"{len(first_S)} and {len(second_S)} clips cannot be compared clip by clip")
    gain_S = (first_S - second_S) if lower_is_better else (second_S - first_S)
    wins = float(((gain_S > 0) + 0.5 * (gain_S == 0)).mean())
    interval = mean_interval(second_S - first_S, seed, draws)
    return PairedComparison(float((second_S - first_S).mean()), interval, wins, len(first_S))
