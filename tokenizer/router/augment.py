"""Views of a clip under which the same assignment stays best, or nearly: what a router learns from a small table.

Everything is drawn for the whole global batch and then picked (Places), so the views do not depend on the number of
processes. Letters: B clips of a batch, C T H W, K patches that are seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.common.sharing import Places


def zoom_and_turn(
    video_BCTHW: Tensor, crop_scale: float, flip: bool, turns: bool, generator: torch.Generator, places: Places
) -> Tensor:
    """Each clip zoomed into a random square and, if asked, seen in a mirror or turned; all its frames alike.

    crop_scale: the smallest side of the square as a part of the frame; 1.0 leaves the frame whole.
    flip: left to right with probability 1/2. turns: upside down and along the diagonal too; all eight views with flip.
    """
    num_clips = places.total
    side_B = 1 - (1 - crop_scale) * torch.rand(num_clips, generator=generator)
    shift_B2 = (1 - side_B)[:, None] * (2 * torch.rand(num_clips, 2, generator=generator) - 1)
    mirrored_B2 = torch.zeros(num_clips, 2, dtype=torch.bool)  # along x and y
    if flip:
        mirrored_B2[:, 0] = torch.rand(num_clips, generator=generator) < 0.5
    affine_B22 = torch.eye(2).repeat(num_clips, 1, 1)
    if turns:
        mirrored_B2[:, 1] = torch.rand(num_clips, generator=generator) < 0.5
        swapped_B = torch.rand(num_clips, generator=generator) < 0.5
        affine_B22[swapped_B] = affine_B22[swapped_B].flip(1)
    affine_B22 = affine_B22 * side_B[:, None, None] * torch.where(mirrored_B2, -1.0, 1.0)[..., None]
    affine_B23 = torch.cat([affine_B22, shift_B2[..., None]], dim=2)
    frames = video_BCTHW.flatten(1, 2)  # B C*T H W
    grid = F.affine_grid(places.pick(affine_B23), list(frames.shape), align_corners=False)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False).view_as(video_BCTHW)


def recolour(video_BCTHW: Tensor, generator: torch.Generator, places: Places) -> Tensor:
    """Each clip with its three colours in a random order and, with probability 1/2, as a negative. Pixels in [0, 1]."""
    order_B3 = places.pick(torch.rand(places.total, 3, generator=generator).argsort(dim=1))
    negative_B = places.pick(torch.rand(places.total, generator=generator) < 0.5)
    video_BCTHW = video_BCTHW.take_along_dim(order_B3[..., None, None, None], dim=1)
    return torch.where(negative_B[:, None, None, None, None], 1 - video_BCTHW, video_BCTHW)


def draw_patches(num_patches: int, share: float, generator: torch.Generator, places: Places) -> Tensor:
    """seen_BK: numbers of the patches that each clip shows, at least one, all different, in no order."""
    num_seen = max(1, round(share * num_patches))
    return places.pick(torch.rand(places.total, num_patches, generator=generator).argsort(dim=1)[:, :num_seen])
