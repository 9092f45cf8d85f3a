"""Frechet distance between the features of two sets of clips, in float64, from streamed sums.

    d^2 = |mean_x - mean_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^(1/2))

With S = R^T R the last trace is the sum of the singular values of R_x R_y^T. So no square root of a matrix is taken,
and covariances of any rank are as good as full ones.

Rows are summed in chunks of fixed size in the order in which they come: features in the order of the clips give the
same bits, however many are handed over at a time and whichever process computed them.

Letters: S clips of a set, B clips handed over at a time, F numbers in a feature, R rank of a covariance.

What the distances are called. The extractor is part of the name, because numbers of two extractors never compare.

Kernel distance between the features of two sets of clips: the unbiased squared MMD with a cubic kernel (KVD, KID).

The kernel is (x . y / F + 1)^3. Unbiased: its mean is 0 for two draws of one set at any number of clips, so it may come
out a little below 0. It needs no Gaussian and is what to look at where clips are few.

Letters: S T clips of the two sets, F numbers in a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from tokenizer.common.errors import UserError

NAMES = {"i3d": "fvd_i3d", "videomae": "fd_videomae", "effnet": "fcd_effnet"}  # extractor -> its Frechet distance
KERNEL_NAMES = {"i3d": "kvd_i3d", "videomae": "kd_videomae", "effnet": "kcd_effnet"}
# Convention of a covariance -> what is taken off the number of clips. LARP and StyleGAN-V: n.
COVARIANCES = {"n": 0, "n-1": 1}


CHUNK = 256  # rows summed together; part of the result's last bits


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean [F] and covariance factor [R, F] (covariance = factor^T factor) of the features of `count` clips."""

    mean_F: Tensor
    factor_RF: Tensor
    count: int


def fit_gaussian(features: Iterable[Tensor], covariance: str = "n") -> Gaussian:
    """Fit to features [B, F] that come one after the other; memory: F*F numbers, however many clips.

    covariance: see COVARIANCES. Raises UserError for fewer than 2 clips and for features that are not finite.
    """
    chunks = _rechunked(features)
    held: list[Tensor] = []
    for chunk_SF in chunks:
        held.append(chunk_SF)
        if sum(map(len, held)) > chunk_SF.shape[1]:
            return _from_sums(chain(held, chunks), covariance)
    rows_SF = torch.cat(held) if held else torch.empty(0, 0)
    divisor = _divisor(len(rows_SF), covariance)
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
    """The squared Frechet distance between two sets of features at hand."""
    return frechet_distance(fit_gaussian([x_SF], covariance), fit_gaussian([y_SF], covariance))


def _from_sums(chunks: Iterable[Tensor], covariance: str) -> Gaussian:
    count = 0
    for chunk_SF in chunks:
        if not count:
            origin_F = chunk_SF.mean(dim=0)  # sums around it do not cancel
            sum_F, outer_FF = torch.zeros_like(origin_F), origin_F.new_zeros(len(origin_F), len(origin_F))
        offset_SF = chunk_SF - origin_F
        sum_F += offset_SF.sum(dim=0)
        outer_FF += offset_SF.T @ offset_SF
        count += len(chunk_SF)
    mean_F = sum_F / count
    covariance_FF = (outer_FF - count * torch.outer(mean_F, mean_F)) / _divisor(count, covariance)
    value_F, vector_FF = torch.linalg.eigh(covariance_FF)
    kept = value_F > value_F[-1] * len(value_F) * torch.finfo(torch.float64).eps
    return Gaussian(origin_F + mean_F, (vector_FF[:, kept] * value_F[kept].sqrt()).T, count)


def _rechunked(features: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows in float64, CHUNK at a time, the rest last."""
    waiting: list[Tensor] = []
    for feature_BF in features:
        if not feature_BF.isfinite().all():
            raise UserError("a feature is not finite: the frames or the extractor's weights are damaged")
        waiting.append(feature_BF.detach().cpu().double())
        while sum(map(len, waiting)) >= CHUNK:
            rows_SF = torch.cat(waiting)
            yield rows_SF[:CHUNK]
            waiting = [rows_SF[CHUNK:]]
    rest_SF = torch.cat(waiting) if waiting else torch.empty(0, 0)
    if len(rest_SF):
        yield rest_SF


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
    within_x = (_kernel_sum(x_SF, x_SF) - _own_sum(x_SF)) / (num_x * (num_x - 1))
    within_y = (_kernel_sum(y_TF, y_TF) - _own_sum(y_TF)) / (num_y * (num_y - 1))
    return float(within_x + within_y - 2 * _kernel_sum(x_SF, y_TF) / (num_x * num_y))


def _kernel_sum(x_SF: Tensor, y_TF: Tensor) -> Tensor:
    width = x_SF.shape[1]
    return torch.stack([(rows @ y_TF.T / width + 1).pow(3).sum() for rows in x_SF.split(_ROWS)]).sum()


def _own_sum(x_SF: Tensor) -> Tensor:
    """The kernel of each clip with itself, summed."""
    return (x_SF.square().mean(dim=1) + 1).pow(3).sum()
