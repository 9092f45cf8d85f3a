"""The perceptual distance in bf16 against fp32: how far apart they are on real clips, and what bf16 saves.

    python scripts/bench/perceptual.py [--quick]

Bundled held-out clips against copies that are blurred a little and a lot (3 and 9 pixels) and noisy (0.1 of the
range). The ratio is (the largest difference of a clip's distance between bf16 and fp32) / 1e-3; the last line is JSON;
exit 1 where it is 1 or more. bf16 means what a training in bf16 does: the first layer, the normalisation, the
difference and the means stay in fp32. `time_ratio` is CPU time of bf16 / fp32 for the features of one clip. Networks
in turn: stlpips_alex at 64 pixels, and without --quick at 128 too, and stlpips_vgg at 64.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from _report import report
from torch import Tensor

from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.losses.perceptual import PerceptualDistance, load_perceptual

GOAL = 1e-3
CLIPS, FRAMES = 8, slice(0, 16, 4)
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="The perceptual distance in bf16 against fp32.")
    parser.add_argument("--quick", action="store_true", help="one network at one size")
    cases = [("stlpips_alex", 64), ("stlpips_alex", 128), ("stlpips_vgg", 64)]
    torch.set_num_threads(1)
    worst, details = 0.0, {}
    for name, size in cases[:1] if parser.parse_args().quick else cases:
        exact, fast = load_perceptual(name), load_perceptual(name, dtype=torch.bfloat16)
        real_BCTHW = _real_clips(size)
        gaps = {}
        with torch.no_grad():
            for damage, copy_BCTHW in _damaged(real_BCTHW).items():
                gap_B = fast.clip_distance(copy_BCTHW, real_BCTHW) - exact.clip_distance(copy_BCTHW, real_BCTHW)
                gaps[damage] = float(gap_B.abs().max())
            seconds = [_seconds(net, real_BCTHW[0].transpose(0, 1)) for net in (fast, exact)]
        worst = max(worst, *gaps.values())
        details[f"{name}_{size}"] = {damage: float(f"{gap:.2g}") for damage, gap in gaps.items()} | {
            "time_ratio": round(seconds[0] / seconds[1], 2)
        }
    report(
        "perceptual distance in bf16 against fp32",
        ratio=worst / GOAL,
        goal=1.0,
        holds=worst < GOAL,
        difference=float(f"{worst:.2g}"),
        num_clips=CLIPS,
        **details,
    )


def _real_clips(size: int) -> Tensor:
    """Every fourth frame of the first held-out clips: [B, C, 4, H, W]."""
    data = build_dataset(DataConfig(sources=["bundled:heldout"], size=size, augment=False))
    return torch.stack([data.get(index).video_CTHW[:, FRAMES] for index in range(CLIPS)])


def _damaged(video_BCTHW: Tensor) -> dict[str, Tensor]:
    noise = 0.1 * torch.randn(video_BCTHW.shape, generator=torch.Generator().manual_seed(0))
    blurred = {
        f"blur_{k}": F.avg_pool3d(video_BCTHW, (1, k, k), 1, (0, k // 2, k // 2), count_include_pad=False)
        for k in (3, 9)
    }
    return blurred | {"noise": (video_BCTHW + noise).clamp(0, 1)}


def _seconds(net: PerceptualDistance, frames_FCHW: Tensor) -> float:
    """CPU time of the thread for the features of these frames: the best of a few."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.thread_time()
        net.features(frames_FCHW)
        best = min(best, time.thread_time() - start)
    return best


if __name__ == "__main__":
    main()
