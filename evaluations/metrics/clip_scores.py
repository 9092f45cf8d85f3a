"""What one reconstructed clip is worth, and what a set of them is: PSNR in both conventions, SSIM, LPIPS by backbone.

Clips are scored as uint8, as a lossless file holds them, so arrays and files give equal numbers.

Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from tokenizer.common.image_quality import psnr_of_mse, ssim
from tokenizer.data.video_io import to_model_range
from tokenizer.losses.perceptual import PerceptualDistance
from tokenizer.router.reconstruct import PSNR_OF_EQUAL

LOWER_IS_BETTER = {"mse": True, "psnr": False, "ssim": False}  # any lpips: True


def lower_is_better(metric: str) -> bool:
    """Whether less is better in a metric of one clip."""
    return LOWER_IS_BETTER.get(metric, True)


@torch.inference_mode()
def score_clip(real_THWC: np.ndarray, ours_THWC: np.ndarray, perceptual: PerceptualDistance | None) -> dict[str, float]:
    """uint8 frames -> mse (of [0, 1]), psnr (dB of the clip's mse), ssim, and the distance under its own name.

    An exact copy has PSNR_OF_EQUAL dB. One clip at a time, so that no number depends on its neighbours.
    """
    for frames in (real_THWC, ours_THWC):
        if frames.dtype != np.uint8 or frames.shape != real_THWC.shape:
            raise ValueError(f"need two uint8 clips of one shape, got {frames.dtype} {frames.shape}")
    device = torch.device("cpu") if perceptual is None else perceptual.shift.device
    real = to_model_range(real_THWC)[None].to(device)
    ours = to_model_range(ours_THWC)[None].to(device)
    mse = (ours.double() - real.double()).square().mean()
    scores = {
        "mse": float(mse),
        "psnr": min(PSNR_OF_EQUAL, float(psnr_of_mse(mse))),
        "ssim": float(ssim(ours, real)),
    }
    if perceptual is not None:
        scores[perceptual.name] = float(perceptual.clip_distance(ours, real))
    return scores


def mean_scores(clips: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over clips of every score; `psnr_of_mean_mse` is the other convention: the dB of the mean error.

    `psnr` is the mean over clips of their dB, as LARP and the paper report it; it is never below the other.
    """
    means = {name: math.fsum(clip[name] for clip in clips) / len(clips) for name in clips[0]}
    error = means["mse"]
    other = min(PSNR_OF_EQUAL, -10 * math.log10(error)) if error else PSNR_OF_EQUAL
    return {**means, "psnr_of_mean_mse": other}
