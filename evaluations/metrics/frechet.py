"""Frechet and kernel distance between the features of two sets of clips, in float64.

    d^2 = |mean_x - mean_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^(1/2))

With S = R^T R the last trace is the sum of the singular values of R_x R_y^T: no square root of a matrix is needed, and
the rank of the covariances does not matter.

The distance of n clips a side is biased upwards by about 1/n. `frechet_jackknife` gives the standard error of the value
and extrapolates it to infinitely many clips (FVD-infinity, after arXiv 1911.07023); the extrapolation holds only for
more clips than features.

The kernel distance is the unbiased squared MMD with the cubic kernel (x . y / F + 1)^3 (KVD, KID). Its mean is 0 for
two draws of one set at any number of clips, so it may be slightly negative. Prefer it for few clips.

Letters: S T clips of the two sets, F numbers in a feature, R rank of a covariance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluations.metrics.bootstrap import Jackknife, groups_of, jackknife
from tokenizer.common.errors import UserError

# Names of the distances. The extractor is part of the name: numbers of two extractors never compare.
NAMES = {"i3d": "fvd_i3d", "videomae": "fd_videomae", "effnet": "fcd_effnet"}
KERNEL_NAMES = {"i3d": "kvd_i3d", "videomae": "kd_videomae", "effnet": "kcd_effnet"}
# Convention of a covariance -> subtracted from the number of clips. LARP and StyleGAN-V: n.
COVARIANCES = {"n": 0, "n-1": 1}


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean [F] and covariance factor [R, F] (covariance = factor^T factor) of the features of `count` clips."""

    mean_F: Tensor
    factor_RF: Tensor
    count: int


def fit_gaussian(features_SF: Tensor, covariance: str = "n") -> Gaussian:
    """Fit to features [S, F]. covariance: see COVARIANCES.

    Raises UserError for fewer than 2 clips and for features that are not finite.
    """
    if not features_SF.isfinite().all():
        raise UserError("a feature is not finite: the frames or the extractor's weights are damaged")
    divisor, rows_SF = _divisor(len(features_SF), covariance), features_SF.detach().cpu().double()
    if len(rows_SF) > rows_SF.shape[1]:
        return _Sums.of(rows_SF).fit(covariance)
    mean_F = rows_SF.mean(dim=0)
    return Gaussian(mean_F, (rows_SF - mean_F) / divisor**0.5, len(rows_SF))  # fewer clips than numbers: no sums needed


def frechet_distance(x: Gaussian, y: Gaussian) -> float:
    """The squared Frechet distance, as FID and FVD report it; 0 for equal sets."""
    if len(x.mean_F) != len(y.mean_F):
        raise UserError(f"features of {len(x.mean_F)} and of {len(y.mean_F)} numbers come from different extractors")
    means = (x.mean_F - y.mean_F).square().sum()
    spread = x.factor_RF.square().sum() + y.factor_RF.square().sum()
    common = torch.linalg.svdvals(x.factor_RF @ y.factor_RF.T).sum()
    return max(0.0, float(means + spread - 2 * common))


def frechet_of_features(x_SF: Tensor, y_SF: Tensor, covariance: str = "n") -> float:
    """The squared Frechet distance between two sets of features."""
    return frechet_distance(fit_gaussian(x_SF, covariance), fit_gaussian(y_SF, covariance))


def frechet_jackknife(
    x_SF: Tensor, y_SF: Tensor, paired: bool, covariance: str = "n", seed: int = 0
) -> tuple[float, Jackknife | None]:
    """The squared Frechet distance, and its jackknife; None for fewer than 4 clips a side.

    paired: row s of both sides belongs to the same clip, as in reconstruction, so both leave out the same clips. Two
    independent sets leave out groups of their own, one side at a time.
    """
    x, y = fit_gaussian(x_SF, covariance), fit_gaussian(y_SF, covariance)
    value = frechet_distance(x, y)
    if min(x.count, y.count) < 4:
        return value, None
    groups_x = groups_of(x.count, seed)
    without_x = gaussians_without(x_SF, groups_x, covariance)
    if paired:
        pairs = zip(without_x, gaussians_without(y_SF, groups_x, covariance), strict=True)
        return value, jackknife(value, [[frechet_distance(*pair) for pair in pairs]])
    groups_y = groups_of(y.count, seed, side=1)
    left_out_x = [frechet_distance(part, y) for part in without_x]
    left_out_y = [frechet_distance(x, part) for part in gaussians_without(y_SF, groups_y, covariance)]
    return value, jackknife(value, [left_out_x, left_out_y])


def gaussians_without(features_SF: Tensor, groups: Sequence[np.ndarray], covariance: str = "n") -> Iterator[Gaussian]:
    """The fit to all clips but those of one group, group by group; equal to `fit_gaussian` of the rest up to rounding.

    With more clips than numbers the sums of a group are taken off the sums of all, so the whole costs one pass.
    """
    if len(features_SF) - max(map(len, groups)) <= features_SF.shape[1]:
        for group in groups:
            kept = np.delete(np.arange(len(features_SF)), group)
            yield fit_gaussian(features_SF[torch.from_numpy(kept)], covariance)
        return
    rows_SF = features_SF.detach().cpu().double()
    everything = _Sums.of(rows_SF)
    for group in groups:
        part = _Sums.of(rows_SF[torch.from_numpy(group)], everything.origin_F)
        yield everything.without(part).fit(covariance)


@dataclass(eq=False)
class _Sums:
    """Sums of features and of their outer products, around `origin_F` so that they do not cancel."""

    origin_F: Tensor
    sum_F: Tensor
    outer_FF: Tensor
    count: int

    @staticmethod
    def of(rows_SF: Tensor, origin_F: Tensor | None = None) -> _Sums:
        origin_F = rows_SF.mean(dim=0) if origin_F is None else origin_F
        offset_SF = rows_SF - origin_F
        return _Sums(origin_F, offset_SF.sum(dim=0), offset_SF.T @ offset_SF, len(rows_SF))

    def without(self, part: _Sums) -> _Sums:
        return _Sums(self.origin_F, self.sum_F - part.sum_F, self.outer_FF - part.outer_FF, self.count - part.count)

    def fit(self, covariance: str) -> Gaussian:
        mean_F = self.sum_F / self.count
        covariance_FF = (self.outer_FF - self.count * torch.outer(mean_F, mean_F)) / _divisor(self.count, covariance)
        value_F, vector_FF = torch.linalg.eigh(covariance_FF)
        kept = value_F > value_F[-1] * len(value_F) * torch.finfo(torch.float64).eps  # the rest is rounding
        return Gaussian(self.origin_F + mean_F, (vector_FF[:, kept] * value_F[kept].sqrt()).T, self.count)


def _divisor(count: int, covariance: str) -> int:
    if count < 2:
        raise UserError(f"a Gaussian needs the features of at least 2 clips, got {count}")
    return count - COVARIANCES[covariance]


_ROWS = 1024  # rows of a kernel matrix at a time


def kernel_distance(x_SF: Tensor, y_TF: Tensor) -> float:
    """The unbiased estimate over all pairs, float64. UserError for fewer than 2 clips or unequal widths."""
    if min(len(x_SF), len(y_TF)) < 2:
        raise UserError(f"a kernel distance needs at least 2 clips a side, got {len(x_SF)} and {len(y_TF)}")
    if x_SF.shape[1] != y_TF.shape[1]:
        raise UserError(f"features of {x_SF.shape[1]} and {y_TF.shape[1]} numbers come from different extractors")
    x_SF, y_TF = x_SF.double(), y_TF.double()
    num_x, num_y = len(x_SF), len(y_TF)
    blocks = 2 * -(-num_x // _ROWS) + -(-num_y // _ROWS)
    with tqdm(desc="kernel distance", total=blocks, unit="block", delay=5, disable=None) as bar:
        within_x = (_kernel_sum(x_SF, x_SF, bar) - _own_sum(x_SF)) / (num_x * (num_x - 1))
        within_y = (_kernel_sum(y_TF, y_TF, bar) - _own_sum(y_TF)) / (num_y * (num_y - 1))
        return float(within_x + within_y - 2 * _kernel_sum(x_SF, y_TF, bar) / (num_x * num_y))


def _kernel_sum(x_SF: Tensor, y_TF: Tensor, bar: tqdm) -> Tensor:
    """The kernel of every pair, summed: S x T products, a block of rows at a time."""
    width, sums = x_SF.shape[1], []
    for rows_SF in x_SF.split(_ROWS):
        sums.append((rows_SF @ y_TF.T).div_(width).add_(1).pow_(3).sum())  # of [_ROWS, T]
        bar.update()
    return torch.stack(sums).sum()


def _own_sum(x_SF: Tensor) -> Tensor:
    """The kernel of each clip with itself, summed."""
    return (x_SF.square().mean(dim=1) + 1).pow(3).sum()
