"""What both frozen encoders expect of frames, as the library's own processors make it.

The processors resize the short side with antialiased bilinear filtering, cut the centre, and standardise by the
statistics of ImageNet. Our clips are square and are used whole: resized to the encoder's side, with no margin to cut,
so that every place of the clip has its cell among the features.

Letters: B clips, C T H W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenizer.common.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def prepare_frames(video_BCTHW: Tensor, side: int) -> Tensor:
    """Square clips in [0, 1] -> standardised float32 [B, T, C, side, side]; gradients flow to the pixels."""
    num_clips, height, width = len(video_BCTHW), *video_BCTHW.shape[-2:]
    if height != width:
        raise UserError(f"a frozen encoder reads square clips, got frames of {height}x{width}")
    frame_FCHW = rearrange(video_BCTHW.float(), "B C T H W -> (B T) C H W")
    if side != height:
        frame_FCHW = F.interpolate(frame_FCHW, (side, side), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(numbers).view(3, 1, 1).to(frame_FCHW) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return rearrange((frame_FCHW - mean) / std, "(B T) C H W -> B T C H W", B=num_clips)
