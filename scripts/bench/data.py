"""Random clips from an ordinary mp4 against the same video after `tokenizer.data.prepare`.

    python scripts/bench/data.py [--quick]

The source is 10 s of 1280x720 at 30 frames a second, H.264 with x264's own settings (a keyframe every 250 frames), made
of the bundled clips. Both are read at 16x128x128 from random starts. Seconds are the CPU time of this thread, the two
variants take turns, and the best of the rounds counts. The ratio is CPU time of the source / of the copy; goal 10.
The last line is JSON; exit 1 where the goal is missed. --quick takes fewer draws.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _report import report

from tokenizer.data.bundled_clips import bundled_videos
from tokenizer.data.prepare import PrepareRule, prepare_video
from tokenizer.data.video_io import iter_clips, read_clip_at, resize, write_video

GOAL = 10.0
HEIGHT, WIDTH, FPS, NUM_CLIPS = 720, 1280, 30, 19  # 304 frames: ten seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of a random clip: prepared video against source mp4.")
    parser.add_argument("--quick", action="store_true", help="4 draws and 2 rounds instead of 16 and 3")
    num_draws, num_rounds = (4, 2) if parser.parse_args().quick else (16, 3)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source, copy = Path(folder, "source.mp4"), Path(folder, "copy.mp4")
        write_source(source)
        prepare_video(source, copy, PrepareRule())
        positions = np.random.default_rng(0).random(num_draws)
        rounds = [[cpu_ms(path, positions) for path in (source, copy)] for _ in range(num_rounds)]
        sizes = [path.stat().st_size for path in (source, copy)]
    source_ms, copy_ms = np.min(rounds, axis=0)
    report(
        "prepared clips against source mp4",
        ratio=source_ms / copy_ms,
        goal=GOAL,
        holds=bool(source_ms / copy_ms >= GOAL),
        source_ms=round(source_ms, 2),
        prepared_ms=round(copy_ms, 2),
        source_bytes=sizes[0],
        prepared_bytes=sizes[1],
    )


def write_source(path: Path) -> None:
    """One video of many scenes, enlarged by a pan over each bundled clip."""
    videos = bundled_videos("train")[:NUM_CLIPS]
    clips = [next(iter_clips(video.path, size=None)).frames_THWC for video in videos]
    frames = [resize(clip[:, :72], HEIGHT, WIDTH) for clip in clips]
    write_video(path, np.concatenate(frames), FPS)


def cpu_ms(path: Path, positions: np.ndarray) -> float:
    """Mean CPU milliseconds of one random clip."""
    start = time.thread_time()
    for position in positions:
        read_clip_at(path, position, size=128)
    return (time.thread_time() - start) / len(positions) * 1000


if __name__ == "__main__":
    main()
