"""What a full evaluation costs: 512 clips of 16x64x64 reconstructed and scored with the shipped miniature.

    python scripts/bench/evaluation.py [--quick]

The command of scripts/test/eval_reconstruction.sh, from clips to metrics.json: router, tokenizer, PSNR, SSIM, LPIPS
and Frechet distance with their intervals. Seconds are the CPU time of the process with one thread, so that other work
on the machine does not count; wall time is shown beside it. The ratio is 10 minutes / CPU time; goal 1.
The last line is JSON; exit 1 where the goal is missed. --quick scores 32 clips and scales their time up to 512.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from _report import report

from evaluations.protocols import PROTOCOLS

LIMIT_S = 600.0
NUM_CLIPS, NUM_QUICK = 512, 32
MINI = Path(__file__).parents[2] / "ckpts" / "mini"


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of reconstructing and scoring 512 clips of 16x64x64.")
    parser.add_argument("--quick", action="store_true", help="32 clips, their time scaled up")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    num_clips = NUM_QUICK if quick else NUM_CLIPS
    sources = ("bundled:heldout", f"synthetic:heldout:{num_clips}")
    PROTOCOLS["mini-recon"] = replace(PROTOCOLS["mini-recon"], sources=sources, count=num_clips)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time(), time.perf_counter()
        result = evaluate(Path(folder))
        cpu_s, wall_s = time.process_time() - start[0], time.perf_counter() - start[1]
    needed_s = cpu_s * NUM_CLIPS / num_clips
    report(
        "evaluation of 512 clips of 16x64x64",
        ratio=LIMIT_S / needed_s,
        goal=1.0,
        holds=needed_s <= LIMIT_S and result["num_clips"] == num_clips,
        cpu_seconds=round(needed_s, 1),
        clips_scored=num_clips,
        wall_seconds_measured=round(wall_s, 1),
        metrics=sorted(result["metrics"]),
    )


def evaluate(folder: Path) -> dict:
    """Run the command in this process; -> metrics.json."""
    sys.argv = [
        "reconstruction", "--protocol", "mini-recon", "--vq-ckpt", str(MINI / "final.safetensors"),
        "--router-ckpt", str(MINI / "router.safetensors"), "--out", str(folder / "out"),
        "--cache", str(folder / "cache"), "--device", "cpu", "--force",
    ]  # fmt: skip
    try:
        runpy.run_module("evaluations.reconstruction", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    return json.loads((folder / "out" / "metrics.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
