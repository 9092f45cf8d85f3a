"""Patchify clips, and initialise the 1D queries by coarse-to-fine average pooling of the block's own patches.

The k = 2^n queries of a block are groups of 1, 1, 2, 4, ..., 2^(n-1) cells; group 2^g pools the G x G grid over a
2^ceil(g/2) x 2^floor(g/2) grid of cells (rows grow first). A longer assignment therefore starts with the queries of a
shorter one, and a block has at most 2 * G * G. A level that is not a power of two takes all groups that fit and then
cells spread evenly over the next group. One patch is 4 frames x 8 x 8 pixels.

Letters: B clips, C T H W, M patches of a clip in the order (block, row, column), P numbers in a patch.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizer.assignment import Packing


def patchify(video_BCTHW: Tensor, patch_frames: int, patch_size: int) -> Tensor:
    """[B, C, T, H, W] -> [B, M, P]; the patches of a temporal block are contiguous."""
    return rearrange(
        video_BCTHW,
        "B C (t pt) (h ph) (w pw) -> B (t h w) (pt ph pw C)",
        pt=patch_frames,
        ph=patch_size,
        pw=patch_size,
    )


def unpatchify(patch_BMP: Tensor, patch_frames: int, patch_size: int, grid: int) -> Tensor:
    """[B, M, P] -> [B, C, T, H, W]; exact inverse of `patchify` for a square `grid` x `grid` of patches a block."""
    return rearrange(
        patch_BMP,
        "B (t h w) (pt ph pw C) -> B C (t pt) (h ph) (w pw)",
        pt=patch_frames,
        ph=patch_size,
        pw=patch_size,
        h=grid,
        w=grid,
    )


def most_queries(grid: int) -> int:
    """The largest number of queries that pooling a `grid` x `grid` block can start: two for each patch."""
    return 2 * grid * grid


def pooling_pyramid(patch_RMD: Tensor, grid: int) -> Tensor:
    """Patches of R blocks, [R, G*G, D] -> all pooled cells, coarse to fine, [R, 2*G*G, D]."""
    plane = rearrange(patch_RMD, "R (h w) D -> R D h w", h=grid, w=grid)
    cells = [F.avg_pool2d(plane, (grid // h, grid // w)) for h, w in _cell_grids(grid)]
    pyramid = [rearrange(cell, "R D h w -> R (h w) D") for cell in cells]
    return torch.cat([pyramid[0], *pyramid], dim=1)  # the first two groups are both the block's mean


def packed_queries(patch_BMD: Tensor, packing: Packing, grid: int) -> Tensor:
    """Patches of all clips, [B, N*G*G, D] -> first values of the packed queries, [L, D]."""
    pyramid = pooling_pyramid(rearrange(patch_BMD, "B (N m) D -> (B N) m D", N=packing.num_blocks), grid)
    block_L = packing.clip_L * packing.num_blocks + packing.block_L  # among the blocks of all clips
    row_L = block_L * most_queries(grid) + packed_cells(packing)
    return rearrange(pyramid, "R K D -> (R K) D")[row_L.to(pyramid.device)]


def packed_cells(packing: Packing) -> Tensor:
    """int64 [L]: for each packed token, the cell of its block's pyramid that it starts from."""
    return torch.cat([level_cells(length) for row in packing.lengths for length in row])


@lru_cache(maxsize=128)
def level_cells(length: int) -> Tensor:
    """int64 [length]: which cells of the pyramid a block of `length` tokens starts from."""
    whole = 1 << (length.bit_length() - 1)  # the largest power of two that fits
    spread = torch.arange(length - whole) * whole // max(length - whole, 1)
    return torch.cat([torch.arange(whole), whole + spread])


def _cell_grids(grid: int) -> list[tuple[int, int]]:
    """(rows, columns) of the groups of 1, 2, 4, ..., G*G cells."""
    sizes = [(1, 1)]
    while sizes[-1] != (grid, grid):
        rows, columns = sizes[-1]
        sizes.append((rows * 2, columns) if rows == columns else (rows, columns * 2))
    return sizes
