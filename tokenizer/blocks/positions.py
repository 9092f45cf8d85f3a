"""Initial values of the learned position tables (separable sin-cos over block, row, column) and of pixel filters.

The tables are ordinary parameters. Starting from sin-cos, a small run need not first discover which token belongs to
which place. Linear maps of pixels start from cosine filters over the frames, rows, columns and colours of a patch.

Letters: P numbers in a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sincos_3d(num_blocks: int, grid: int, width: int) -> Tensor:
    """float32 [num_blocks * grid * grid, width]: a quarter of the width tells the block, the rest row and column.

    The slowest waves, which tell least, are at both ends: structured_init.py overwrites those channels.
    """
    row_width, block_width, column_width = _axis_widths(width)
    row = _sincos_1d(grid, row_width).flip(1)
    block = _sincos_1d(num_blocks, block_width)
    column = _sincos_1d(grid, column_width)
    table = torch.cat(
        [
            row[None, :, None].expand(num_blocks, -1, grid, -1),
            block[:, None, None].expand(-1, grid, grid, -1),
            column[None, None, :].expand(num_blocks, grid, -1, -1),
        ],
        dim=-1,
    )
    return table.reshape(num_blocks * grid * grid, width)


def waves_3d(width: int) -> list[list[tuple[int, int]]]:
    """Of row, block and column: the two channels of `sincos_3d` that hold sine and cosine of each wave."""
    waves, start = [], 0
    for axis_width in _axis_widths(width):
        half = axis_width // 2
        waves.append([(start + wave, start + half + wave) for wave in range(half)])
        start += axis_width
    return waves


def _axis_widths(width: int) -> tuple[int, int, int]:
    block_width = 2 * (width // 8)
    row_width = 2 * ((width - block_width) // 4)
    return row_width, block_width, width - block_width - row_width


def _sincos_1d(length: int, width: int) -> Tensor:
    """Wavelengths from 4 cells up to 4 times the axis, so that every channel tells places of *this* grid apart."""
    num_waves = (width + 1) // 2
    wave = torch.logspace(0, -math.log10(max(length, 2)), num_waves) * (math.pi / 2)
    angle = torch.arange(length)[:, None] * wave
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]


def cosine_filters(patch_frames: int, patch_size: int, colour_rank: float) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal filters, one a row, lowest frequency first: float32 [P, P], with frequency and waves over time, [P].

    Frequency is the number of half waves over time, rows and columns together; a filter that sees a difference of
    colours counts `colour_rank` more. The numbers of a patch are in the order of `patchify`.
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
