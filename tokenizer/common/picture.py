"""The picture of a validation: originals over reconstructions, with a bar of tokens under each temporal block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor

_BAR_HEIGHT = 6
_GAP = 4
_BAR_COLOUR = (217, 119, 6)


def save_comparison(path: str | Path, real_BCTHW: Tensor, ours_BCTHW: Tensor, length_BN: Tensor, longest: int) -> None:
    """Write a PNG: per clip two rows, one frame of each block: real, ours; below, length / longest as a bar.

    Clips in [0, 1]; `longest` is the largest level, a full bar.
    """
    num_frames, num_blocks = real_BCTHW.shape[2], length_BN.shape[1]
    middle_N = [(2 * t + 1) * num_frames // (2 * num_blocks) for t in range(num_blocks)]
    rows = []
    for real, ours, length_N in zip(real_BCTHW, ours_BCTHW, length_BN.tolist(), strict=True):
        rows += [_strip(real[:, middle_N]), _strip(ours[:, middle_N])]
        rows.append(_bars([length / longest for length in length_N], real.shape[-1]))
        rows.append(np.full((_GAP, rows[0].shape[1], 3), 255, np.uint8))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def _strip(frames_CNHW: Tensor) -> np.ndarray:
    """Frames side by side, uint8 [H, N*W, 3]."""
    return rearrange((frames_CNHW.clamp(0, 1) * 255).round().byte().cpu(), "C N H W -> H (N W) C").numpy()


def _bars(shares: list[float], width: int) -> np.ndarray:
    """One bar per block, uint8 [bar, N*width, 3]."""
    strip = np.full((_BAR_HEIGHT, width * len(shares), 3), 235, np.uint8)
    for t, share in enumerate(shares):
        strip[1:-1, t * width : t * width + max(1, round(share * (width - 2)))] = _BAR_COLOUR
    return strip
