"""The 126 real clips that come with the package: their files, labels and splits."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenizer.data.video_io import iter_clips

FOLDER = Path(__file__).parent / "bundled"
SPLITS = ("train", "heldout")
KEPT_SIDE = 128  # of `kept_frames`


@dataclass(frozen=True)
class BundledVideo:
    """One shipped clip (16x128x128, mp4): its file, its scene as label, and its split (splits share no source file)."""

    path: Path
    label: str


@functools.cache
def bundled_videos(split: str) -> tuple[BundledVideo, ...]:
    """The shipped clips of "train" or "heldout", sorted by file name."""
    entries = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    return tuple(BundledVideo(FOLDER / e["file"], e["label"]) for e in entries if e["split"] == split)


@functools.lru_cache(maxsize=256)
def kept_frames(split: str, clip: int) -> np.ndarray:
    """The first and the middle frame of a bundled clip, uint8 [2, 128, 128, 3]; 100 KB each, decoded once a process."""
    frames_THWC = next(iter_clips(bundled_videos(split)[clip].path, size=KEPT_SIDE)).frames_THWC
    return frames_THWC[:: len(frames_THWC) // 2].copy()
