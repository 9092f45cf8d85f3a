"""How long the device waits in whole commands: readers, sampler, models, scoring and writers beside a stand-in device.

    python scripts/bench/pipeline.py [--quick] [--slower N] [--real] [--only PART,PART]

The stand-in device runs one operation at a time and sleeps: a step of the sampler 4 ms; encoding, decoding, image
quality and features 10 ms a clip each; a node of curation's tree 7 ms for 16 clips. Results of models are canned (the
GPT of debug size computes: its samples keep the slots busy). A read sleeps 75 ms, what a clip of a Kinetics-like mp4
costs, a written video 70 ms. So this shows the structure of a command: whether what could overlap does. Everything else
is the command as typed. The share of wall time without an operation, from the first to the last, is what a GPU waits.

slots           slots in use while 1000 clips are sampled in 64 slots (--quick: 250 in 16). Goal: 0.88.
class_to_video  waiting share of the same command. Goal of this and all below: at most 0.10, with 8 readers.
reconstruction  waiting share of an evaluation of reconstruction.
main_job        waiting share of the main job, three videos a clip.
curation        waiting share of stage 2, 81 assignments.
extraction      waiting share of stage 5a.

`host_ms_per_clip` is the CPU time of this process a clip: what the host must fit beside the device. --slower N sleeps N
times as long everywhere, for a machine whose cores are taken: the structure shows all the same, and the host's own work
counts 1/N. --real reads and writes real videos and computes with models of debug size, which needs an idle machine with
as many cores as readers. The last line is JSON; exit 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import functools
import json
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

from autoregressive import extract_codes
from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from autoregressive.sampler import Sampler
from evaluations import clip_list, job, scoring
from evaluations.generation import Generator
from evaluations.metrics.extractors import Extractor
from evaluations.protocols import PROTOCOLS
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.data import clip_stream, clips, sources
from tokenizer.data.cutting import StreamEnd
from tokenizer.data.video_io import DecodedClip, write_video
from tokenizer.model import VideoTokenizer
from tokenizer.presets import build_tokenizer
from tokenizer.router import curate, reconstruct, results
from tokenizer.router.reconstruct import Reconstructor

JOB = Path(__file__).parents[2] / "tokenizer/router/reconstruction_qual_with_router.py"
STEP_S, CLIP_S, NODE_S, READ_S, VIDEO_S = 0.004, 0.010, 0.007, 0.075, 0.070
GOAL_SLOTS, GOAL_WAIT, READERS = 0.88, 0.10, 8
SIDE, WINDOWS = 32, 20  # pixels of a clip; clips in a video
ARGS = argparse.Namespace(slower=1, real=False)


class StandIn:
    """One operation at a time, each at least as long as its latency."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.RLock(), 0
        self.busy_s = 0.0
        self.first_s = self.last_s = 0.0

    def run(self, latency_s: float, work: Callable[..., Any], *args: Any) -> Any:
        """`work` as an operation; inside of another one it is a part of it."""
        with self.lock:
            self.depth += 1
            start = time.perf_counter()
            try:
                result = work(*args)
            finally:
                self.depth -= 1
            if not self.depth:
                time.sleep(max(0.0, ARGS.slower * latency_s - (time.perf_counter() - start)))
                self.last_s = time.perf_counter()
                self.first_s = self.first_s or start
                self.busy_s += self.last_s - start
            return result

    @property
    def waiting(self) -> float:
        """Share of the time from the first operation to the last in which none ran."""
        return 1 - self.busy_s / max(1e-9, self.last_s - self.first_s)


def canned(compute: Callable[..., Any]) -> Callable[..., Any]:
    """(key, *arguments) -> what `compute(*arguments)` gave for the first arguments with this key, unless --real."""
    known: dict[Any, Any] = {}

    def answer(key: Any, *args: Any) -> Any:
        if ARGS.real or key not in known:
            known[key] = compute(*args)
        return known[key]

    return answer


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

    def by_clip(method: Callable[..., Any]) -> Callable[..., Any]:
        answer = canned(method)
        return lambda self, some, *args: device.run(CLIP_S * len(some), answer, len(some), self, some, *args)

    step = canned(curate.Scorer._step)

    def node(self: curate.Scorer, patches: Any, t: int, length: int, past: Any) -> Any:
        key = (t, len(patches.cells[0]))
        return device.run(NODE_S * key[1] / 16, step, key, self, patches, t, length, past)

    def scores(reals: list[np.ndarray], ours: list[np.ndarray], *_: Any) -> list[dict[str, float]]:
        return device.run(CLIP_S * len(ours), lambda: [{"mse": 0.1, "psnr": 10.0, "ssim": 0.5} for _ in ours])

    def network(video_BCTHW: Tensor) -> Tensor:
        return device.run(CLIP_S * len(video_BCTHW), lambda: video_BCTHW[..., 0, 0].flatten(1))

    extractor = Extractor("effnet", "0" * 64, "stand-in", 48, torch.device("cpu"), network)
    with ExitStack() as patches:
        for target, name, new in (
            (Sampler, "__init__", counted),
            (Generator, "__init__", listed),
            (VideoTokenizer, "encode", by_clip(VideoTokenizer.encode)),
            (VideoTokenizer, "decode", by_clip(VideoTokenizer.decode)),
            (Reconstructor, "_measure", by_clip(Reconstructor._measure)),
            (curate.Scorer, "_step", node),
            (curate, "load_perceptual", lambda _: OneNumber()),
            (scoring, "score_clips", scores),
            (scoring, "load_extractor", lambda *_: extractor),
            *((room, "batches_at_once", lambda _: 2) for room in (job, reconstruct, extract_codes)),  # as a GPU
            *([] if ARGS.real else sleeping_files()),
        ):
            patches.enter_context(patch.object(target, name, new))
        yield device, generators


class OneNumber:
    """A perceptual network that costs nothing: its time is that of a node."""

    def to(self, device: torch.device) -> OneNumber:
        return self

    def features(self, image_FCHW: Tensor) -> Tensor:
        return image_FCHW[:, 0, 0, 0]

    def distance(self, a_F: Tensor, b_F: Tensor) -> Tensor:
        return (a_F - b_F).abs()


def sleeping_files() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Stand-ins for decoding, fingerprints and written videos: they sleep, and hold no core."""
    frames_THWC = np.random.default_rng(0).integers(0, 256, (16, SIDE, SIDE, 3), dtype=np.uint8)
    last = 16 * (WINDOWS - 1)

    def clip_at(path: Path, position: float, *_: Any, **__: Any) -> DecodedClip:
        time.sleep(READ_S * ARGS.slower)
        return DecodedClip(min(last, int(position * (last + 1))), frames_THWC, 0, 25.0)

    def clips_of(path: Path, *_: Any, all_clips: bool = False, **__: Any) -> Any:
        for window in range(WINDOWS if all_clips else 1):
            yield clip_at(path, 16 * window / (last + 1))
        return StreamEnd(0, ())

    def write(path: Path, *_: Any, **__: Any) -> None:
        time.sleep(VIDEO_S * ARGS.slower)
        path.touch()

    return [
        (clip_stream, "decode_clips", clips_of),
        (clip_list, "decode_clip_at", clip_at),
        (sources, "decode_clip_at", clip_at),
        (results, "write_video", write),
        *((room, "fingerprint_of", lambda path, span=None: str(path)) for room in (clip_stream, clip_list, clips)),
    ]


def type_command(target: str | Callable[[], None], *words: object) -> float:
    """Run a module, a file by its path, or a main(), in this process as typed -> CPU seconds of this process."""
    start = time.process_time()
    with patch.object(sys, "argv", [str(target), *map(str, words)]):
        try:
            if callable(target):
                target()
            else:
                run = runpy.run_path if target.endswith(".py") else runpy.run_module
                run(target, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{target} ended with {end.code}") from end
    return time.process_time() - start


def make_inputs(folder: Path, num_videos: int, windows: int = WINDOWS) -> list[object]:
    """Weights of debug size and videos of two classes, of `windows` clips each -> flags for the models."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer("VQ_debug")
    save_model(folder / "tok.safetensors", tokenizer.state_dict(), {"model": to_dict(tokenizer.config)})
    gpt = GPT(PRESETS["GPT-debug"])
    tokens = {"tokenizer_sha256": "", "class_names": ["still", "moving", *(f"class {i}" for i in range(9))]}
    save_model(folder / "gpt.safetensors", gpt.state_dict(), {"model": to_dict(gpt.config), "tokens": tokens})
    y_HW, x_HW = np.mgrid[:64, :64]
    for i in range(num_videos):
        name = folder / "videos" / ("still", "moving")[i % 2] / f"{i:03d}.mp4"
        name.parent.mkdir(parents=True, exist_ok=True)
        if not ARGS.real:
            name.touch()
            continue
        phase_T = np.arange(16 * windows)[:, None, None] + i
        grey_THW = (128 + 90 * np.sin((x_HW + phase_T) / 9) * np.cos(y_HW / 7)).astype(np.uint8)
        write_video(name, np.repeat(grey_THW[..., None], 3, axis=3), 25)
    return ["--vq-ckpt", folder / "tok.safetensors"]


def part(device: StandIn, num_clips: int, host_s: float) -> Part:
    """The share of time that the device waited, with what explains it."""
    facts = {
        "clips": num_clips,
        "device_s": round(device.busy_s, 1),
        "host_ms_per_clip": round(1e3 * host_s / num_clips, 1),
        "device_ms_per_clip": round(1e3 * device.busy_s / ARGS.slower / num_clips, 1),
        "files": "real" if ARGS.real else "sleeping stand-ins",
        "slower": ARGS.slower,
    }
    return Part(device.waiting, GOAL_WAIT, at_least=False, facts=facts)


@functools.cache
def class_to_video_run(quick: bool) -> tuple[float, Part]:
    """(slots in use, the part) of `evaluations.class_to_video`."""
    num_clips, slots = (250, 16) if quick else (1000, 64)
    protocol = replace(PROTOCOLS["ucf101-c2v-10k"], size=SIDE, count=num_clips, extractor="effnet", draws=20)
    with tempfile.TemporaryDirectory() as name, patch.dict(PROTOCOLS, {protocol.name: protocol}):
        folder = Path(name)
        flags = make_inputs(folder, -(-num_clips // WINDOWS))
        with on_the_stand_in() as (device, generators):
            host_s = type_command(
                "evaluations.class_to_video", "--protocol", protocol.name, "--data", folder / "videos", *flags,
                "--gpt-ckpt", folder / "gpt.safetensors", "--per-proc-batch-size", slots, "--check-special-token-mask",
                "--batch-size", 8, "--num-workers", READERS, "--out", folder / "out", "--cache", folder / "cache",
                "--device", "cpu",
            )  # fmt: skip
    found = part(device, num_clips, host_s)
    found.facts["slots"] = slots
    return generators[0].slots_in_use, found


def slots(quick: bool) -> Part:
    in_use, found = class_to_video_run(quick)
    return Part(in_use, GOAL_SLOTS, facts=found.facts)


def class_to_video(quick: bool) -> Part:
    return class_to_video_run(quick)[1]


def reconstruction(quick: bool) -> Part:
    num_clips = 100 if quick else 400
    protocol = replace(PROTOCOLS["folder-recon"], size=SIDE, clip_rule="windows", extractor="effnet", draws=20)
    protocol = replace(protocol, perceptual="none")
    with tempfile.TemporaryDirectory() as name, patch.dict(PROTOCOLS, {protocol.name: protocol}):
        folder = Path(name)
        flags = make_inputs(folder, num_clips // WINDOWS)
        with on_the_stand_in() as (device, _):
            host_s = type_command(
                "evaluations.reconstruction", "--protocol", protocol.name, "--data", folder / "videos", *flags,
                "--budget", "uniform:4", "--batch-size", 8, "--num-workers", READERS, "--out", folder / "out",
                "--cache", folder / "cache", "--device", "cpu", "--force",
            )  # fmt: skip
    return part(device, num_clips, host_s)


def main_job(quick: bool) -> Part:
    num_clips = 160 if quick else 400  # the first video is read by one reader, which only a long job hides
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, num_clips // WINDOWS)
        with on_the_stand_in() as (device, _):
            host_s = type_command(
                str(JOB), "--vid_path", folder / "videos", "--save_dir", folder / "out", "--vq_ckpt",
                folder / "tok.safetensors", "--budget", "uniform:4", "--all-clips", "--perceptual", "none",
                "--num-workers", READERS, "--device", "cpu",
            )  # fmt: skip
    return part(device, num_clips, host_s)


def curation(quick: bool) -> Part:
    return shared_work(curate.main, 48 if quick else 160, clips_per_unit=16, proxy="tok.safetensors")


def extraction(quick: bool) -> Part:
    settings = {"clips_per_shard": 128, "batch_size": 8, "budget": "uniform:4", "tokenizer": "tok.safetensors"}
    return shared_work(extract_codes.main, 128 if quick else 512, **settings)


def shared_work(main: Callable[[], None], num_clips: int, **settings: Any) -> Part:
    """Stage 2 or 5a on videos of one clip each; weights are looked up in the folder of the inputs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, num_clips, windows=1)
        weights = {key: str(folder / value) for key, value in settings.items() if str(value).endswith(".safetensors")}
        data = {"sources": [str(folder / "videos")], "size": SIDE, "augment": False}
        config = {**settings, **weights, "dir": str(folder / "out"), "data": data, "num_workers": READERS}
        (folder / "stage.yaml").write_text(json.dumps({**config, "device": "cpu"}))  # JSON is YAML
        with on_the_stand_in() as (device, _):
            host_s = type_command(main, folder / "stage.yaml")
    return part(device, num_clips, host_s)


PARTS = {
    "slots": slots,
    "class_to_video": class_to_video,
    "reconstruction": reconstruction,
    "main_job": main_job,
    "curation": curation,
    "extraction": extraction,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How long a device waits in whole commands.")
    parser.add_argument("--slower", type=float, default=1, metavar="N", help="all latencies N times as long")
    parser.add_argument("--real", action="store_true", help="real videos and models of debug size")
    run_parts("share of time that the device waits", parser, PARTS, ARGS)
