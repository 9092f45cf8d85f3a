"""Patchify clips; initial positions of patches; 1D queries by coarse-to-fine pooling of the block's own patches.

The k = 2^n queries of a block are groups of 1, 1, 2, 4, ..., 2^(n-1) cells; on a square grid group 2^g pools the
patches over a 2^ceil(g/2) x 2^floor(g/2) grid of cells (rows grow first). A longer assignment therefore starts with the
queries of a shorter one, and a block has at most two for each patch. A level that is not a power of two takes all
groups that fit and then cells spread evenly over the next group. One patch is 4 frames x 8 x 8 pixels.

On other grids (ours; the paper's are square powers of two) the axis along which a cell is longer is halved next, and
pooling is adaptive: cell i of c covers patches floor(i G / c) to ceil((i + 1) G / c) - 1 of G along an axis, so
neighbours may share one.

With `model.queries=grid` (ours) the k = 2^n queries of a block are the cells of one grid instead, so every token has a
place of its own. Half of a pyramid's tokens are averages of the others: until training finds another use for them, they
show nothing new. Queries beyond one a patch are second tokens of the finest cells.

The position tables are ordinary parameters. Starting from sin-cos over block, row and column, a small run need not
first discover which token belongs to which place. Linear maps of pixels start from cosine filters of a patch.

Letters: B clips, C T H W, M patches of a clip in the order (block, row, column), P numbers in a patch, R blocks of all
clips, K cells, m patches of a block.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizer.assignment import Packing
from tokenizer.common.clip_shape import Size, sides
from tokenizer.common.device import send

Grid = tuple[int, int]
"""Rows and columns of a block's patches."""


def patchify(video_BCTHW: Tensor, patch_frames: int, patch_size: int) -> Tensor:
    """[B, C, T, H, W] -> [B, M, P]; the patches of a temporal block are contiguous."""
    return rearrange(
        video_BCTHW,
        "B C (t pt) (h ph) (w pw) -> B (t h w) (pt ph pw C)",
        pt=patch_frames,
        ph=patch_size,
        pw=patch_size,
    )


def unpatchify(patch_BMP: Tensor, patch_frames: int, patch_size: int, grid: Grid) -> Tensor:
    """[B, M, P] -> [B, C, T, H, W]; exact inverse of `patchify` for `grid` rows and columns of patches a block."""
    return rearrange(
        patch_BMP,
        "B (t h w) (pt ph pw C) -> B C (t pt) (h ph) (w pw)",
        pt=patch_frames,
        ph=patch_size,
        pw=patch_size,
        h=grid[0],
        w=grid[1],
    )


def grid_of(size: Size, patch_size: int) -> Grid:
    """Rows and columns of the patches of a picture."""
    height, width = sides(size)
    return height // patch_size, width // patch_size


def finest_cells(grid: Grid) -> int:
    """Cells of the last group of the pyramid: one for each patch or, on grids that are no powers of two, more."""
    rows, columns = _cell_grids(grid)[-1]
    return rows * columns


def most_queries(grid: Grid) -> int:
    """The largest number of queries that pooling a block can start: two for each patch."""
    return 2 * grid[0] * grid[1]


def pooling_pyramid(patch_RmD: Tensor, grid: Grid) -> Tensor:
    """Patches of R blocks, [R, m, D] -> all pooled cells, coarse to fine, [R, K, D]; K = 2 m on power-of-two grids."""
    plane = rearrange(patch_RmD, "R (h w) D -> R D h w", h=grid[0])
    pyramid = [rearrange(_pool(plane, cells), "R D h w -> R (h w) D") for cells in _cell_grids(grid)]
    return torch.cat([pyramid[0], *pyramid], dim=1)  # the first two groups are both the block's mean


def _pool(plane_RDhw: Tensor, cells: Grid) -> Tensor:
    rows, columns = plane_RDhw.shape[-2:]
    if rows % cells[0] == 0 and columns % cells[1] == 0:
        return F.avg_pool2d(plane_RDhw, (rows // cells[0], columns // cells[1]))
    return F.adaptive_avg_pool2d(plane_RDhw, cells)  # on a GPU its gradient is not deterministic in the last bits


def packed_queries(patch_BMD: Tensor, packing: Packing, grid: Grid, finest: int = 0) -> Tensor:
    """Patches of all clips, [B, M, D] -> first values of the packed queries, [L, D]. `finest`: see `level_cells`."""
    pyramid = pooling_pyramid(rearrange(patch_BMD, "B (N m) D -> (B N) m D", m=grid[0] * grid[1]), grid)
    cell_L = torch.cat([level_cells(length, finest) for row in packing.lengths for length in row])
    block_L = packing.clip_L * packing.num_blocks + packing.block_L  # among the blocks of all clips
    row_L = block_L * pyramid.shape[1] + cell_L
    return rearrange(pyramid, "R K D -> (R K) D")[send(row_L, pyramid.device)]


def packed_second(packing: Packing, finest: int) -> Tensor:
    """int64: the packed tokens that are second ones of their cells."""
    return (packed_rows(packing, finest) >= 2 * finest).nonzero().flatten()


def packed_rows(packing: Packing, finest: int = 0) -> Tensor:
    """int64 [L]: the row of each packed token in its block's table of positions."""
    return torch.cat([level_rows(length, finest) for row in packing.lengths for length in row])


@lru_cache(maxsize=128)
def level_cells(length: int, finest: int = 0) -> Tensor:
    """int64 [length]: which cells of the pyramid a block of `length` tokens starts from.

    finest = 0: all groups up to the one that completes the length. Otherwise the number of cells of the last group:
    `length` cells of one group, and beyond `finest` the cells of the last group once more.
    """
    row_K = level_rows(length, finest)
    return torch.where(row_K >= 2 * finest, row_K - finest, row_K) if finest else row_K


@lru_cache(maxsize=128)
def level_rows(length: int, finest: int = 0) -> Tensor:
    """int64 [length]: the rows of a position table that a block of `length` tokens takes; see `level_cells`.

    The rows of cells are those of the pyramid; a second token of a cell has its own, behind them all.
    """
    whole = 1 << (length.bit_length() - 1)  # the largest power of two that fits
    first, following, spacing = 0, whole, 1
    if finest:  # the group of 2^g cells begins at row 2^g
        whole = min(whole, finest)
        first, following, spacing = whole, 2 * whole, 1 if whole == finest else 2
    spread = torch.arange(length - whole) * whole // max(length - whole, 1)  # of a length between two powers of two
    return torch.cat([first + torch.arange(whole), following + spacing * spread])


@lru_cache(maxsize=128)
def _cell_grids(grid: Grid) -> tuple[Grid, ...]:
    """(rows, columns) of the groups of 1, 2, 4, ... cells, up to the first that has one for each patch."""
    sizes = [(1, 1)]
    while (rows := sizes[-1][0]) * (columns := sizes[-1][1]) < grid[0] * grid[1]:
        taller = grid[0] * columns >= grid[1] * rows  # a cell's height against its width
        sizes.append((rows * 2, columns) if taller else (rows, columns * 2))
    return tuple(sizes)


def sincos_3d(num_blocks: int, grid: Grid, width: int) -> Tensor:
    """float32 [num_blocks * rows * columns, width]: a quarter of the width tells the block, the rest row and column.

    The slowest waves, which tell least, are at both ends: structured_init.py overwrites those channels.
    """
    (rows, columns), (row_width, block_width, column_width) = grid, _axis_widths(width)
    row = _sincos_1d(rows, row_width).flip(1)
    block = _sincos_1d(num_blocks, block_width)
    column = _sincos_1d(columns, column_width)
    table = torch.cat(
        [
            row[None, :, None].expand(num_blocks, -1, columns, -1),
            block[:, None, None].expand(-1, rows, columns, -1),
            column[None, None, :].expand(num_blocks, rows, -1, -1),
        ],
        dim=-1,
    )
    return table.reshape(num_blocks * rows * columns, width)


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
