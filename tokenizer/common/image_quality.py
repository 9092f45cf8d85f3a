"""How alike two clips are by pixels, and how much one moves.

Letters: B clips, C channels, T frames, H height, W width, N single-channel images.
"""

from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from tokenizer.common.errors import UserError

SSIM_WINDOW = 11
PSNR_OF_EQUAL = 100.0  # dB; an exact copy has infinite PSNR, which JSON cannot hold


def psnr(x_BCTHW: Tensor, y_BCTHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [B], of clips in [0, 1]: -10 log10 of the mean squared error of the clip.

    One error over the whole clip, never a mean over frames, as the paper evaluates. Equal clips give inf.
    """
    _require_same_shape(x_BCTHW, y_BCTHW)
    return psnr_of_mse((x_BCTHW.double() - y_BCTHW.double()).square().mean(dim=(1, 2, 3, 4))).float()


def psnr_of_mse(mse: Tensor) -> Tensor:
    """Mean squared error of clips in [0, 1] -> dB, the same shape."""
    return -10 * mse.log10()


def ssim(x_BCTHW: Tensor, y_BCTHW: Tensor) -> Tensor:
    """Structural similarity, [B], of clips in [0, 1]: 1 for equal clips, mean over windows, channels and frames.

    The window is a Gaussian of 11x11 pixels and deviation 1.5 that stays inside the frame, the constants are 0.01 and
    0.03 (Wang et al. 2004). Frames smaller than the window raise UserError.
    """
    _require_same_shape(x_BCTHW, y_BCTHW)
    num_clips, _, _, height, width = x_BCTHW.shape
    if min(height, width) < SSIM_WINDOW:
        raise UserError(f"ssim needs frames of at least {SSIM_WINDOW} pixels a side, got {height}x{width}")
    images = "b c t h w -> (b c t) 1 h w"
    x, y = rearrange(x_BCTHW.double(), images), rearrange(y_BCTHW.double(), images)  # N 1 H W
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x**2
    var_y = _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).reshape(num_clips, -1).mean(dim=1).float()


def motion(frames_THWC: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames (uint8) in grey levels, 0 to 255; 0 for a single frame."""
    if frames_THWC.dtype != np.uint8:
        raise ValueError(f"motion takes uint8 frames, got {frames_THWC.dtype}")
    if len(frames_THWC) < 2:
        return 0.0
    return float(np.abs(np.diff(frames_THWC.astype(np.int16), axis=0)).mean())


def motion_figures(frames_THWC: np.ndarray, num_blocks: int) -> dict[str, Any]:
    """Motion of the clip and of each temporal block; a block's first frame is compared with the one before it."""
    in_block = len(frames_THWC) // num_blocks
    blocks = [frames_THWC[max(0, t * in_block - 1) : (t + 1) * in_block] for t in range(num_blocks)]
    return {"motion": motion(frames_THWC), "block_motion": [motion(block) for block in blocks]}


def _window_mean(image_N1HW: Tensor) -> Tensor:
    offset = torch.arange(SSIM_WINDOW, dtype=image_N1HW.dtype, device=image_N1HW.device) - SSIM_WINDOW // 2
    weight = torch.softmax(-(offset**2) / (2 * 1.5**2), dim=0)  # a Gaussian that sums to 1
    rows = F.conv2d(image_N1HW, weight.view(1, 1, -1, 1))
    return F.conv2d(rows, weight.view(1, 1, 1, -1))


def _require_same_shape(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"clips differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
