"""Whole commands on the CPU: the quick start's main job, an evaluation, and the memory of the full-size tokenizer.

    python scripts/bench/jobs.py [--quick] [--only quickstart,evaluation,memory]

quickstart  wall time of the main job on the bundled held-out clips as quickstart.sh runs it, over 90 s, on an otherwise
            idle machine. A second run on a third of the clips: memory must not grow by over a tenth. Goal: at most 1.
            --quick runs the third alone, against a third of the 90 s.
evaluation  10 minutes over the CPU time of reconstructing and scoring 512 clips of 16x64x64, one thread. Goal: 1.
            --quick scores 32 clips and scales their time.
memory      peak resident memory of VQ_SB (144M parameters) encoding and decoding 4 clips of 16x128x128 in a fresh
            process, over 4 GB; random and largest assignments (--quick: random). Goal: at most 1.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _bench import Part, in_fresh_process, max_rss_bytes, peak_bytes, run_parts

from evaluations.protocols import PROTOCOLS
from tokenizer.data.files import bundled_videos
from tokenizer.presets import build_tokenizer

ROOT = Path(__file__).parents[2]
MINI = ROOT / "ckpts" / "mini"
JOB = ROOT / "tokenizer/router/reconstruction_qual_with_router.py"
MODELS = {
    "--router_config": ROOT / "configs/mini/router.yaml",
    "--router_ckpt": MINI / "router.safetensors",
    "--tok_config": ROOT / "configs/mini/final.yaml",
    "--vq_ckpt": MINI / "final.safetensors",
}


def main() -> None:
    parts = {"quickstart": quickstart, "evaluation": evaluation, "memory": memory}
    run_parts("whole commands on the CPU", "Time and memory of whole commands.", parts)


# --- the main job -----------------------------------------------------------------------------------------------------


def quickstart(quick: bool) -> Part:
    videos = [video.path for video in bundled_videos("heldout")]
    few, goal_seconds, growth = len(videos) // 3, 90.0, None
    if quick:
        seconds, peak, num_clips = _run_job(videos[:few])
        goal_seconds *= few / len(videos)
    else:
        _, peak_of_few, _ = _run_job(videos[:few])
        seconds, peak, num_clips = _run_job(videos)
        growth = round(peak / peak_of_few, 3)
    facts = {
        "seconds": round(seconds, 1),
        "num_clips": num_clips,
        "peak_gb": round(peak / 1e9, 3),
        "memory_growth": growth,
        "cores": os.cpu_count(),
    }
    steady = growth is None or growth <= 1.1
    return Part(seconds / goal_seconds, 1.0, at_least=False, condition=steady, facts=facts)


def _run_job(videos: list[Path]) -> tuple[float, int, int]:
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
        clips = json.loads((results / "metrics.json").read_text(encoding="utf-8"))["clips"]
        return seconds, max_rss_bytes(usage), len(clips)


# --- an evaluation ----------------------------------------------------------------------------------------------------


def evaluation(quick: bool) -> Part:
    limit_s, num_full = 600.0, 512
    num_clips = 32 if quick else num_full
    cpu_s, wall_s, result = in_fresh_process(_evaluate, num_clips)
    needed_s = cpu_s * num_full / num_clips
    facts = {
        "cpu_seconds": round(needed_s, 1),
        "clips_scored": num_clips,
        "wall_seconds_measured": round(wall_s, 1),
        "metrics": sorted(result["metrics"]),
    }
    return Part(limit_s / needed_s, 1.0, condition=result["num_clips"] == num_clips, facts=facts)


def _evaluate(num_clips: int) -> tuple[float, float, dict[str, Any]]:
    """Run evaluations.reconstruction; -> CPU seconds of this process, wall seconds, metrics.json."""
    torch.set_num_threads(1)
    sources = ("bundled:heldout", f"synthetic:heldout:{num_clips}")
    PROTOCOLS["mini-recon"] = replace(PROTOCOLS["mini-recon"], sources=sources, count=num_clips)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        sys.argv = [
            "reconstruction", "--protocol", "mini-recon", "--vq-ckpt", str(MINI / "final.safetensors"),
            "--router-ckpt", str(MINI / "router.safetensors"), "--out", str(out),
            "--cache", str(Path(folder, "cache")), "--device", "cpu", "--force",
        ]  # fmt: skip
        start = time.process_time(), time.perf_counter()
        try:
            runpy.run_module("evaluations.reconstruction", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"the evaluation ended with exit code {end.code}") from end
        seconds = time.process_time() - start[0], time.perf_counter() - start[1]
        return *seconds, json.loads((out / "metrics.json").read_text(encoding="utf-8"))


# --- the full-size tokenizer ------------------------------------------------------------------------------------------


def memory(quick: bool) -> Part:
    found = {work: in_fresh_process(_encode_and_decode, work) for work in ("random", "largest")[: 1 if quick else 2]}
    facts = {
        work: {"tokens": tokens, "seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 3)}
        for work, (tokens, seconds, peak) in found.items()
    }
    return Part(max(peak for _, _, peak in found.values()) / 4e9, 1.0, at_least=False, facts=facts)


def _encode_and_decode(work: str, num_clips: int = 4) -> tuple[int, float, int]:
    """Noise through untrained weights. -> number of tokens, CPU seconds, peak resident bytes of this process."""
    torch.manual_seed(0)
    model = build_tokenizer("VQ_SB").eval()
    video_BCTHW = torch.rand(num_clips, 3, 16, 128, 128)
    row_B = model.space.draw_rows(num_clips, torch.Generator().manual_seed(0))
    if work == "largest":
        row_B = torch.full((num_clips,), model.space.num_rows - 1)
    start = time.process_time()
    tokens = model.encode(video_BCTHW, model.space.lengths_of(row_B))
    video = model.decode(tokens)
    seconds = time.process_time() - start
    assert video.shape == video_BCTHW.shape
    return len(tokens.code_L), seconds, peak_bytes()


if __name__ == "__main__":
    main()
