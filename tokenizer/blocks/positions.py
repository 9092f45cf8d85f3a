"""Where the learned position tables start: separable sin-cos over (block, row, column).

The tables are ordinary parameters; only their first values are special. With random ones a small run must first
find out which token belongs to which place (paper.md section 2, "Initialisation that makes small runs learn").
"""

import math

import torch
from torch import Tensor


def sincos_3d(num_blocks: int, grid: int, width: int) -> Tensor:
    """float32 [num_blocks * grid * grid, width]: a quarter of the width tells the block, the rest row and column."""
    block_width = 2 * (width // 8)
    row_width = 2 * ((width - block_width) // 4)
    block = _sincos_1d(num_blocks, block_width)
    row = _sincos_1d(grid, row_width)
    column = _sincos_1d(grid, width - block_width - row_width)
    table = torch.cat(
        [
            block[:, None, None].expand(-1, grid, grid, -1),
            row[None, :, None].expand(num_blocks, -1, grid, -1),
            column[None, None, :].expand(num_blocks, grid, -1, -1),
        ],
        dim=-1,
    )
    return table.reshape(num_blocks * grid * grid, width)


def _sincos_1d(length: int, width: int) -> Tensor:
    """Wavelengths from 4 cells up to 4 times the axis, so that every channel tells places of *this* grid apart."""
    num_waves = (width + 1) // 2
    wave = torch.logspace(0, -math.log10(max(length, 2)), num_waves) * (math.pi / 2)
    angle = torch.arange(length)[:, None] * wave
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :width]
