"""Kernel distance between the features of two sets of clips: the unbiased squared MMD with a cubic kernel (KVD, KID).

The kernel is (x . y / F + 1)^3. Unbiased: its mean is 0 for two draws of one set at any number of clips, so it may come
out a little below 0. It needs no Gaussian and is what to look at where clips are few.

Letters: S T clips of the two sets, F numbers in a feature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.common.errors import UserError

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
