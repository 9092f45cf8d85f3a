"""The main job of the quick start: held-out bundled clips, the shipped weights, everything up to the report.

    python scripts/bench/quickstart.py [--quick]

Wall-clock seconds of the command as quickstart.sh runs it, interpreter start included, on an otherwise idle machine.
The ratio is seconds / 90. A second run over a few of the clips shows that memory does not grow with their number.
The last line is JSON; exit 1 where it takes 90 s or more or memory grows by over a tenth. --quick leaves out the run
over all clips: it times a third of them against a third of the 90 s.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import report

from tokenizer.data.bundled_clips import bundled_videos

ROOT = Path(__file__).parents[2]
GOAL_SECONDS = 90.0
GOAL_GROWTH = 1.1
JOB = ROOT / "tokenizer/router/reconstruction_qual_with_router.py"
MODELS = {
    "--router_config": ROOT / "configs/mini/router.yaml",
    "--router_ckpt": ROOT / "ckpts/mini/router.safetensors",
    "--tok_config": ROOT / "configs/mini/final.yaml",
    "--vq_ckpt": ROOT / "ckpts/mini/final.safetensors",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory of the quick start's main job.")
    parser.add_argument("--quick", action="store_true", help="a third of the clips, no comparison of memory")
    quick = parser.parse_args().quick
    videos = [video.path for video in bundled_videos("heldout")]
    few = len(videos) // 3
    if quick:
        seconds, peak, num_clips = run_job(videos[:few])
        goal_seconds, growth = GOAL_SECONDS * few / len(videos), None
    else:
        _, peak_of_few, _ = run_job(videos[:few])
        seconds, peak, num_clips = run_job(videos)
        goal_seconds, growth = GOAL_SECONDS, round(peak / peak_of_few, 3)
    report(
        "main job of the quick start",
        ratio=seconds / goal_seconds,
        goal=1.0,
        holds=seconds < goal_seconds and (growth is None or growth <= GOAL_GROWTH),
        seconds=round(seconds, 1),
        num_clips=num_clips,
        peak_gb=round(peak / 1e9, 3),
        memory_growth=growth,
        cores=os.cpu_count(),
    )


def run_job(videos: list[Path]) -> tuple[float, int, int]:
    """-> seconds, peak resident bytes of the job's own process, number of clips done."""
    with tempfile.TemporaryDirectory() as folder:
        source, results = Path(folder, "videos"), Path(folder, "results")
        source.mkdir()
        for video in videos:
            (source / video.name).symlink_to(video)
        options = [str(word) for pair in MODELS.items() for word in pair]
        command = [sys.executable, str(JOB), "--vid_path", str(source), "--save_dir", str(results), *options]
        start = time.perf_counter()
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(job.pid, 0)  # of this one child; RUSAGE_CHILDREN would keep the largest ever
        seconds = time.perf_counter() - start
        job.returncode = os.waitstatus_to_exitcode(status)
        if job.returncode != 0:
            sys.exit(f"error: the main job ended with exit code {job.returncode}")
        clips = json.loads((results / "metrics.json").read_text())["clips"]
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return seconds, usage.ru_maxrss * unit, len(clips)


if __name__ == "__main__":
    main()
