"""Differentiable augmentation in front of a discriminator: it sees altered clips only, real and reconstructed.

A discriminator on top of a frozen network would otherwise learn the few training clips by heart. Colour, shift and a
hole, drawn once for a clip and the same in all its frames, so that its motion stays true (paper.md section 3).

Letters: B clips, C T H W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.common.sharing import Places

SHIFT = 1 / 8  # of the side, the farthest that a clip moves
CUTOUT = 0.2  # of the side, the side of the hole
_BRIGHTNESS = 0.25  # of the pixel range, the most that is added or taken


def augment_clips(video_BCTHW: Tensor, generator: torch.Generator, places: Places | None = None) -> Tensor:
    """Pixels around [0, 1] -> the same clips altered, each by its own draw; gradients flow to the pixels.

    What a shift or a hole leaves empty is grey (0.5). Draws come from `generator`, on the CPU, seven for each clip of
    the global batch. places: where these clips stand in it, if they are not all of it.
    """
    places = places or Places(list(range(len(video_BCTHW))), len(video_BCTHW))
    draw_B7 = places.pick(torch.rand(places.total, 7, generator=generator))
    x = video_BCTHW - 0.5  # grey is 0
    x = _cut_hole(_shift(_recolour(x, draw_B7[:, :3]), draw_B7[:, 3:5]), draw_B7[:, 5:])
    return x + 0.5


def _recolour(x_BCTHW: Tensor, draw_B3: Tensor) -> Tensor:
    """Brightness -0.25 .. 0.25 added; saturation 0 .. 2 times around the grey of each pixel; contrast 0.5 .. 1.5 times
    around the mean of the clip."""
    draw_3B = draw_B3.T[..., None, None, None, None].to(x_BCTHW)
    x_BCTHW = x_BCTHW + (2 * draw_3B[0] - 1) * _BRIGHTNESS
    grey = x_BCTHW.mean(dim=1, keepdim=True)
    x_BCTHW = grey + (x_BCTHW - grey) * (2 * draw_3B[1])
    mean = x_BCTHW.mean(dim=(1, 2, 3, 4), keepdim=True)
    return mean + (x_BCTHW - mean) * (draw_3B[2] + 0.5)


def _shift(x_BCTHW: Tensor, draw_B2: Tensor) -> Tensor:
    """Moved by whole pixels, up to an eighth of the side."""
    height, width = x_BCTHW.shape[-2:]
    far = round(max(height, width) * SHIFT)
    start_B2 = (draw_B2 * (2 * far + 1)).long().tolist()
    padded = F.pad(x_BCTHW, (far, far, far, far))
    return torch.stack(
        [clip[..., y : y + height, x : x + width] for clip, (y, x) in zip(padded, start_B2, strict=True)]
    )


def _cut_hole(x_BCTHW: Tensor, draw_B2: Tensor) -> Tensor:
    """A square of a fifth of the side, centred anywhere in the frame, is made grey."""
    height, width = x_BCTHW.shape[-2:]
    centre_2B1 = draw_B2.T[..., None]
    row_BH, column_BW = (
        (torch.arange(side) + 0.5 - side * centre_B1).abs() <= side * CUTOUT / 2
        for side, centre_B1 in zip((height, width), centre_2B1, strict=True)
    )
    hole_BHW = row_BH[:, :, None] & column_BW[:, None, :]
    return x_BCTHW.masked_fill(hole_BHW[:, None, None].to(x_BCTHW.device), 0.0)
