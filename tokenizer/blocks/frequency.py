"""Cosine filters over the frames, rows, columns and colours of a patch: where linear maps of pixels start.

Letters: P numbers in a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_filters(patch_frames: int, patch_size: int, colour_rank: float) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal filters, one a row, lowest frequency first: float32 [P, P], with frequency and waves over time, [P].

    Frequency is the number of half waves over time, rows and columns together; a filter that sees a difference of
    colours counts `colour_rank` more. The numbers of a patch stand in the order of `patchify`.
    """
    axes = [_cosines(patch_frames), _cosines(patch_size), _cosines(patch_size), _cosines(3)]
    filter_PP = axes[0]
    for axis in axes[1:]:
        filter_PP = torch.kron(filter_PP, axis)  # in the order of patchify: frame, row, column, colour
    frame, row, column, colour = torch.meshgrid(*(torch.arange(len(axis)) for axis in axes), indexing="ij")
    frequency = frame + row + column + colour_rank * (colour > 0)
    order_P = frequency.flatten().argsort(stable=True)
    return filter_PP[order_P], frequency.flatten()[order_P], frame.flatten()[order_P]


def _cosines(length: int) -> Tensor:
    """The orthonormal cosine basis (DCT-II), one wave a row, slowest first: [length, length]."""
    wave, place = torch.arange(length)[:, None], torch.arange(length)[None, :] + 0.5
    basis = (math.pi * wave * place / length).cos() * math.sqrt(2 / length)
    basis[0] /= math.sqrt(2)
    return basis
