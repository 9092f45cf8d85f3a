"""Scores of one reconstructed clip and their means over a set: PSNR in both conventions, SSIM, LPIPS by backbone.

Clips are scored as uint8, as a lossless file holds them, so arrays and files give equal numbers.

Letters: B clips, T frames, H W rows and columns, C colours, X any further dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenizer.common.image_quality import PSNR_OF_EQUAL, psnr_of_mse, ssim
from tokenizer.data.video_io import to_model_range
from tokenizer.losses.perceptual import PERCEPTUAL_NAMES, PerceptualDistance

TOKEN_COUNTS = ("tokens", "tokens_with_length_tokens")
# Every column of a clip's record that is a metric -> whether less is better. Other columns are never compared.
LOWER_IS_BETTER = {
    "mse": True,
    "psnr": False,
    "ssim": False,
    **dict.fromkeys(PERCEPTUAL_NAMES, True),
    **dict.fromkeys(TOKEN_COUNTS, True),
}


def lower_is_better(metric: str) -> bool:
    """Whether less is better in a metric of one clip; any other name (a Frechet distance) is a distance."""
    return LOWER_IS_BETTER.get(metric, True)


def score_clip(real_THWC: np.ndarray, ours_THWC: np.ndarray, perceptual: PerceptualDistance | None) -> dict[str, float]:
    """The scores of one clip; see `score_clips`."""
    return score_clips([real_THWC], [ours_THWC], perceptual)[0]


@torch.inference_mode()
def score_clips(
    reals: Sequence[np.ndarray], ours: Sequence[np.ndarray], perceptual: PerceptualDistance | None, batch_size: int = 1
) -> list[dict[str, float]]:
    """uint8 frames -> mse (of [0, 1]), psnr (dB of the clip's mse), ssim, and the distance under its own name.

    An exact copy has PSNR_OF_EQUAL dB. The perceptual network sees `batch_size` clips at a time, see `fixed_batches`.
    """
    for real_THWC, ours_THWC in zip(reals, ours, strict=True):
        for frames in (real_THWC, ours_THWC):
            if frames.dtype != np.uint8 or frames.shape != real_THWC.shape:
                raise ValueError(f"need two uint8 clips of one shape, got {frames.dtype} {frames.shape}")
    device = torch.device("cpu") if perceptual is None else perceptual.shift.device
    real_B1CTHW, ours_B1CTHW = ([to_model_range(clip)[None].to(device) for clip in side] for side in (reals, ours))
    scores = []
    for x, y in zip(ours_B1CTHW, real_B1CTHW, strict=True):
        mse = (x.double() - y.double()).square().mean()
        psnr = min(PSNR_OF_EQUAL, float(psnr_of_mse(mse)))
        scores.append({"mse": float(mse), "psnr": psnr, "ssim": float(ssim(x, y))})
    if perceptual is not None:
        pair = torch.cat(ours_B1CTHW), torch.cat(real_B1CTHW)
        distance_B = fixed_batches(perceptual.clip_distance, batch_size, *pair).tolist()
        for score, distance in zip(scores, distance_B, strict=True):
            score[perceptual.name] = distance
    return scores


def fixed_batches(network: Callable[..., Tensor], size: int, *inputs_BX: Tensor) -> Tensor:
    """`network` on `size` rows at a time, the last batch filled up with copies of its last row.

    The shape of every call is the same, so a row has the same bits whichever rows are beside it.
    """
    outputs = []
    for parts in zip(*(each.split(size) for each in inputs_BX), strict=True):
        missing = size - len(parts[0])
        full = [torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part for part in parts]
        outputs.append(network(*full)[: len(parts[0])])
    return torch.cat(outputs)


def mean_scores(clips: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over clips of every score; `psnr_of_mean_mse` is the other convention: the dB of the mean error.

    `psnr` is the mean over clips of their dB, as LARP and the paper report it; it is never below the other.
    """
    means = {name: math.fsum(clip[name] for clip in clips) / len(clips) for name in clips[0]}
    error = means["mse"]
    other = min(PSNR_OF_EQUAL, -10 * math.log10(error)) if error else PSNR_OF_EQUAL
    return {**means, "psnr_of_mean_mse": other}
