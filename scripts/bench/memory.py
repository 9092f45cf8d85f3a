"""Memory of the true VQ_SB (144M parameters): 4 clips of 16x128x128 encoded and decoded on the CPU.

    python scripts/bench/memory.py [--quick]

The work runs in a fresh process whose peak resident memory the system reports, Python and torch included. The clips
are noise, the weights untrained: neither changes a shape. The ratio is peak / 4 GB; the last line is JSON; exit 1
where the peak is 4 GB or more. --quick runs random assignments only, else also the largest (2048 tokens a clip).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from _report import report

from tokenizer.presets import build_tokenizer

GOAL_BYTES = 4e9
CLIPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak resident memory of VQ_SB on 4 clips.")
    parser.add_argument("--quick", action="store_true", help="random assignments only")
    parser.add_argument("--work", choices=("random", "largest"), help=argparse.SUPPRESS)  # the fresh process
    args = parser.parse_args()
    if args.work:
        print(*_encode_and_decode(args.work))
        return
    peaks, details = [], {}
    for work in ("random",) if args.quick else ("random", "largest"):
        done = subprocess.run([sys.executable, __file__, "--work", work], check=True, stdout=subprocess.PIPE, text=True)
        tokens, seconds, peak = map(float, done.stdout.split())
        peaks.append(peak)
        details[work] = {"tokens": int(tokens), "seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 3)}
    report(
        "memory of VQ_SB, 4 clips", ratio=max(peaks) / GOAL_BYTES, goal=1.0, holds=max(peaks) < GOAL_BYTES, **details
    )


def _encode_and_decode(work: str) -> tuple[int, float, int]:
    """-> number of tokens, CPU seconds, peak resident bytes of this process."""
    torch.manual_seed(0)
    model = build_tokenizer("VQ_SB").eval()
    video_BCTHW = torch.rand(CLIPS, 3, 16, 128, 128)
    row_B = model.space.draw_rows(CLIPS, torch.Generator().manual_seed(0))
    if work == "largest":
        row_B = torch.full((CLIPS,), model.space.num_rows - 1)
    start = time.process_time()
    tokens = model.encode(video_BCTHW, model.space.lengths_of(row_B))
    video = model.decode(tokens)
    seconds = time.process_time() - start
    assert video.shape == video_BCTHW.shape
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return len(tokens.code_L), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
