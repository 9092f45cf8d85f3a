"""How long the device waits in whole commands: readers, sampler, decoding and scoring beside one stand-in device.

    python scripts/bench/pipeline.py [--quick] [--only slots,class_to_video,reconstruction,main_job]

The stand-in runs one operation at a time, each for at least a fixed latency: a step of the sampler 4 ms, encoding,
decoding, image quality and features 10 ms a clip each. Inside an operation runs a model of debug size; everything else
is the command as typed. The share of wall time without an operation, from the first to the last, is the time a GPU
waits.

slots           slots in use while 1000 clips are sampled in 64 slots (--quick: 250 in 16). Goal: 0.88.
class_to_video  waiting share of the same command. Goal: at most 0.10.
reconstruction  waiting share of an evaluation of reconstruction with 8 readers. Goal: at most 0.10.
main_job        waiting share of the main job with 8 readers. Goal: at most 0.10.

Wall time counts, so run it on an otherwise idle machine. The last line is JSON; exit 1 if a goal is missed.
"""

from __future__ import annotations

import functools
import runpy
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _bench import Part, run_parts
from torch import Tensor

from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from autoregressive.sampler import Sampler
from evaluations import job, scoring
from evaluations.generation import Generator
from evaluations.metrics.extractors import Extractor
from evaluations.protocols import PROTOCOLS
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.data.video_io import write_video
from tokenizer.model import VideoTokenizer
from tokenizer.presets import build_tokenizer
from tokenizer.router import reconstruct_videos

JOB = Path(__file__).parents[2] / "tokenizer/router/reconstruction_qual_with_router.py"
STEP_S, CLIP_S = 0.004, 0.010
GOAL_SLOTS, GOAL_WAIT, READERS = 0.88, 0.10, 8
SIDE, WINDOWS = 32, 20  # pixels of a clip; clips in a video


class StandIn:
    """One operation at a time, each at least as long as its latency."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.RLock(), 0
        self.busy_s = 0.0
        self.first_s = self.last_s = 0.0

    def run(self, latency_s: float, work: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """`work` as an operation; inside of another one it is a part of it."""
        with self.lock:
            self.depth += 1
            start = time.perf_counter()
            try:
                result = work(*args, **more)
            finally:
                self.depth -= 1
            if not self.depth:
                time.sleep(max(0.0, latency_s - (time.perf_counter() - start)))
                self.last_s = time.perf_counter()
                self.first_s = self.first_s or start
                self.busy_s += self.last_s - start
            return result

    @property
    def waiting(self) -> float:
        """Share of the time from the first operation to the last in which none ran."""
        return 1 - self.busy_s / max(1e-9, self.last_s - self.first_s)


@contextmanager
def on_the_stand_in() -> Iterator[tuple[StandIn, list[Generator]]]:
    """Every model of this process runs on a stand-in; the GPTs that are loaded meanwhile are listed."""
    device, generators = StandIn(), []
    start_sampler, start_generator = Sampler.__init__, Generator.__init__

    def counted(self: Sampler, *args: Any, **more: Any) -> None:
        start_sampler(self, *args, **more)
        step = self._run_step
        self._run_step = lambda live: device.run(STEP_S, step, live)

    def listed(self: Generator, *args: Any, **more: Any) -> None:
        start_generator(self, *args, **more)
        generators.append(self)

    def on_device(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(self: VideoTokenizer, clips: Any, *args: Any, **more: Any) -> Any:
            return device.run(CLIP_S * len(clips), method, self, clips, *args, **more)

        return run

    def scores(reals: list[np.ndarray], ours: list[np.ndarray], *_: Any) -> list[dict[str, float]]:
        return device.run(CLIP_S * len(ours), lambda: [{"mse": 0.1, "psnr": 10.0, "ssim": 0.5} for _ in ours])

    def network(video_BCTHW: Tensor) -> Tensor:
        return device.run(CLIP_S * len(video_BCTHW), lambda: video_BCTHW.mean(dim=(3, 4)).flatten(1))

    extractor = Extractor("effnet", "0" * 64, "stand-in", 48, torch.device("cpu"), network)
    with ExitStack() as patches:
        for target, name, new in (
            (Sampler, "__init__", counted),
            (Generator, "__init__", listed),
            (VideoTokenizer, "encode", on_device(VideoTokenizer.encode)),
            (VideoTokenizer, "decode", on_device(VideoTokenizer.decode)),
            (scoring, "score_clips", scores),
            (scoring, "load_extractor", lambda *_: extractor),
            (job, "batches_at_once", lambda _: 2),  # as on a GPU
            (reconstruct_videos, "batches_at_once", lambda _: 2),
        ):
            patches.enter_context(patch.object(target, name, new))
        yield device, generators


def type_command(target: str, *words: object) -> None:
    """Run a module, or a file by its path, in this process as typed."""
    run = runpy.run_path if target.endswith(".py") else runpy.run_module
    with patch.object(sys, "argv", [target, *map(str, words)]):
        try:
            run(target, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{target} ended with {end.code}") from end


def make_inputs(folder: Path, num_clips: int) -> list[object]:
    """Weights of debug size and videos of two classes that hold `num_clips` windows -> flags for the models."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer("VQ_debug")
    save_model(folder / "tok.safetensors", tokenizer.state_dict(), {"model": to_dict(tokenizer.config)})
    gpt = GPT(PRESETS["GPT-debug"])
    tokens = {"tokenizer_sha256": "", "class_names": ["still", "moving", *(f"class {i}" for i in range(9))]}
    save_model(folder / "gpt.safetensors", gpt.state_dict(), {"model": to_dict(gpt.config), "tokens": tokens})
    y_HW, x_HW = np.mgrid[:64, :64]
    for i in range(-(-num_clips // WINDOWS)):
        name = folder / "videos" / ("still", "moving")[i % 2] / f"{i:03d}.mp4"
        name.parent.mkdir(parents=True, exist_ok=True)
        phase_T = np.arange(16 * WINDOWS)[:, None, None] + i
        grey_THW = (128 + 90 * np.sin((x_HW + phase_T) / 9) * np.cos(y_HW / 7)).astype(np.uint8)
        write_video(name, np.repeat(grey_THW[..., None], 3, axis=3), 25)
    return ["--vq-ckpt", folder / "tok.safetensors"]


@functools.cache
def class_to_video_run(quick: bool) -> tuple[float, float, dict[str, Any]]:
    """(slots in use, waiting share, facts) of `evaluations.class_to_video`."""
    num_clips, slots = (250, 16) if quick else (1000, 64)
    protocol = replace(PROTOCOLS["ucf101-c2v-10k"], size=SIDE, count=num_clips, extractor="effnet", draws=20)
    with tempfile.TemporaryDirectory() as name, patch.dict(PROTOCOLS, {protocol.name: protocol}):
        folder = Path(name)
        flags = make_inputs(folder, num_clips)
        with on_the_stand_in() as (device, generators):
            type_command(
                "evaluations.class_to_video", "--protocol", protocol.name, "--data", folder / "videos", *flags,
                "--gpt-ckpt", folder / "gpt.safetensors", "--per-proc-batch-size", slots, "--check-special-token-mask",
                "--batch-size", 8, "--num-workers", READERS, "--out", folder / "out", "--cache", folder / "cache",
                "--device", "cpu",
            )  # fmt: skip
    facts = {"clips": num_clips, "slots": slots, "device_s": round(device.busy_s, 1)}
    return generators[0].slots_in_use, device.waiting, facts


def slots(quick: bool) -> Part:
    """See the top."""
    in_use, _, facts = class_to_video_run(quick)
    return Part(in_use, GOAL_SLOTS, facts=facts)


def class_to_video(quick: bool) -> Part:
    """See the top."""
    _, waiting, facts = class_to_video_run(quick)
    return Part(waiting, GOAL_WAIT, at_least=False, facts=facts)


def reconstruction(quick: bool) -> Part:
    """See the top."""
    num_clips = 100 if quick else 400
    protocol = replace(PROTOCOLS["folder-recon"], size=SIDE, clip_rule="windows", extractor="effnet", draws=20)
    protocol = replace(protocol, perceptual="none")
    with tempfile.TemporaryDirectory() as name, patch.dict(PROTOCOLS, {protocol.name: protocol}):
        folder = Path(name)
        flags = make_inputs(folder, num_clips)
        with on_the_stand_in() as (device, _):
            type_command(
                "evaluations.reconstruction", "--protocol", protocol.name, "--data", folder / "videos", *flags,
                "--budget", "uniform:4", "--batch-size", 8, "--num-workers", READERS, "--out", folder / "out",
                "--cache", folder / "cache", "--device", "cpu", "--force",
            )  # fmt: skip
    return Part(
        device.waiting, GOAL_WAIT, at_least=False, facts={"clips": num_clips, "device_s": round(device.busy_s, 1)}
    )


def main_job(quick: bool) -> Part:
    """See the top."""
    num_clips = 60 if quick else 200
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, num_clips)
        with on_the_stand_in() as (device, _):
            type_command(
                str(JOB), "--vid_path", folder / "videos", "--save_dir", folder / "out", "--vq_ckpt",
                folder / "tok.safetensors", "--budget", "uniform:4", "--all-clips", "--perceptual", "none",
                "--num-workers", READERS, "--device", "cpu",
            )  # fmt: skip
    return Part(
        device.waiting, GOAL_WAIT, at_least=False, facts={"clips": num_clips, "device_s": round(device.busy_s, 1)}
    )


PARTS = {"slots": slots, "class_to_video": class_to_video, "reconstruction": reconstruction, "main_job": main_job}


if __name__ == "__main__":
    run_parts("share of time that the device waits", "How long a device waits in whole commands.", PARTS)
