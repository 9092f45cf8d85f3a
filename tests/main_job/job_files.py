"""What the tests of the main job share: its path, a small film, and reading what it wrote."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.data.video_io import write_video
from tokenizer.router.model import RouterConfig

ROOT = Path(__file__).parents[2]
ENTRY = ROOT / "tokenizer/router/reconstruction_qual_with_router.py"
LEVELS = [2, 4, 8]  # of VQ_debug: 8 to 32 tokens in 4 blocks
ROUTER = RouterConfig(size=32, levels=LEVELS, layers=1, width=32, heads=2)
JOB = runpy.run_path(str(ENTRY), run_name="main_job")
LATIN_1 = b"caf\xe9 \xfc.mp4"  # a name that is not UTF-8


def frames(speed: int, num: int = 16, seed: int = 0) -> np.ndarray:
    """A textured square that slides `speed` pixels a frame over noise; uint8 [T, 36, 44, 3]."""
    noise = np.random.default_rng(seed).integers(0, 90, (36, 44, 3), dtype=np.uint8)
    video = np.stack([noise] * num)
    for t in range(num):
        left = (speed * t) % 30
        video[t, 10:24, left : left + 14] = 200
    return video


def read(folder: Path, name: str = "metrics.json") -> Any:
    return json.loads((folder / name).read_text())


def without_router() -> dict[str, None]:
    return {"router_config": None, "router_ckpt": None}


def copies(folder: Path, num: int) -> Path:
    folder.mkdir()
    for i in range(num):
        write_video(folder / f"{i:02d}.mp4", frames(i % 4, seed=i), 8)
    return folder
