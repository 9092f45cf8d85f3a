"""What happens to the pictures of a clip between the decoder and the model. Frames are uint8 THWC throughout.

Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from tokenizer.common.runtime import derive_seed


def rng_for(seed: int, *keys: int | str) -> np.random.Generator:
    """A numpy generator that depends on the arguments and on nothing else, the same in every process and machine."""
    return np.random.default_rng(derive_seed(seed, *keys))


def resize(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bilinear scaling, uint8 to uint8; frames that already have the size are handed back as they are.

    torch's uint8 kernel is used: it gives the pixels of torchvision's `Resize`, at a quarter of the cost in float.
    """
    if frames_THWC.shape[1:3] == (height, width):
        return frames_THWC
    video_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)  # [T, C, H, W], channels last in memory
    video_TCHW = F.interpolate(video_TCHW, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(video_TCHW.permute(0, 2, 3, 1).numpy())  # [T, height, width, C]


def resize_center_crop(frames_THWC: np.ndarray, size: int) -> np.ndarray:
    """Short side to `size`, then the square in the middle: [T, H, W, C] -> [T, size, size, C]."""
    height, width = frames_THWC.shape[1:3]
    short = min(height, width)
    frames_THWC = resize(frames_THWC, size * height // short, size * width // short)
    top = round((frames_THWC.shape[1] - size) / 2)
    left = round((frames_THWC.shape[2] - size) / 2)
    return np.ascontiguousarray(frames_THWC[:, top : top + size, left : left + size])


def random_resized_crop(
    frames_THWC: np.ndarray, size: int, scale: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """A random square, the same in all frames, whose side is `scale` times the short side, scaled to `size`."""
    height, width = frames_THWC.shape[1:3]
    side = max(1, round(min(height, width) * generator.uniform(*scale)))
    top = int(generator.integers(height - side + 1))
    left = int(generator.integers(width - side + 1))
    crop_THWC = np.ascontiguousarray(frames_THWC[:, top : top + side, left : left + side])
    return resize(crop_THWC, size, size)


def horizontal_flip(frames_THWC: np.ndarray) -> np.ndarray:
    """Left and right exchanged in every frame."""
    return np.ascontiguousarray(frames_THWC[:, :, ::-1])
