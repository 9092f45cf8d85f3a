"""What the tests of the evaluation commands share: flags, lossless clips, results."""

from __future__ import annotations

import csv
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluations.protocols import PROTOCOLS
from tokenizer.data.video_io import write_video

MINI = Path(__file__).parents[2] / "ckpts" / "mini"
CLIPS = ("bundled:heldout",)
CLASSES = ("bottle", "tree", *(f"class {i}" for i in range(9)))
AS_PUBLISHED = dict(PROTOCOLS)
Run = Callable[..., dict[str, Any]]

# Who makes which of the three shards: one process after the other, in an order that is not the list's. A shard that
# occurs twice was lost with the process that made it first.
SHARED = {"two": ((2, 0), (0, 1)), "four": ((2,), (0,), (1,), ())}


def of_mini(*flags: object) -> list[object]:
    router = ("--router-ckpt", MINI / "router.safetensors") if not flags else ()
    return ["--protocol", "mini-recon", "--vq-ckpt", MINI / "final.safetensors", *router, *flags]


def run_shared(run: Run, parts: Sequence[Sequence[int]], module: str, out: Path, *flags: object) -> dict[str, Any]:
    """By as many processes as there are parts; the results may be there once every shard is."""
    made: set[int] = set()
    for mine in parts:
        for shard in made & set(mine):
            (out / f"shards/{shard:06d}.safetensors").unlink()
        result = run(module, out, *flags, busy=set(range(3)) - set(mine) - made)
        made |= set(mine)
        assert bool(result) == (len(made) == 3)
    return result


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "per_clip.csv", newline="") as file:
        return list(csv.DictReader(file))


def compare(*words: object, exit_code: int = 0) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["compare", *map(str, words)])
        runpy.run_module("evaluations.compare", run_name="__main__")
    assert end.value.code == exit_code


def of_gpt(models: Path, name: str, task: str) -> list[object]:
    weights = ["--vq-ckpt", models / "tok.safetensors", "--gpt-ckpt", models / f"{name}.safetensors"]
    flags = ["--gpt-model", "GPT-debug", "--per-proc-batch-size", "3", "--check-special-token-mask", "--force"]
    return ["--protocol", task, *weights, *flags]


def lossless(folder: Path, *names: str, num: int = 16, seed: int = 0) -> list[np.ndarray]:
    """Different lossless clips of noise, 64 pixels wide."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    clips = [rng.integers(0, 255, (num, 64, 64, 3), np.uint8) for _ in names]
    for name, frames in zip(names, clips, strict=True):
        write_video(folder / f"{name}.mp4", frames, 25, lossless=True)
    return clips
