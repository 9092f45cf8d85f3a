"""Clips <-> rows of pixels: one patch is 4 frames x 8 x 8 pixels (paper.md section 2).

Letters: B clips, C T H W, M patches of a clip in the order (block, row, column), P numbers in a patch.
"""

from einops import rearrange
from torch import Tensor


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
