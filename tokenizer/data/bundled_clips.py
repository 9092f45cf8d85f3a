"""The 126 real clips that travel with the package: where they are, which split each belongs to, whose they are."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "bundled"
SPLITS = ("train", "heldout")


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
