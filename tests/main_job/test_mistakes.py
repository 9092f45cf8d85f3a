"""The main job and a user's mistakes: one clear line, and no folder left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_files import ENTRY, read, without_router

from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.presets import build_tokenizer
from tokenizer.router.model import Router, RouterConfig


def test_mistakes_are_one_clear_line(job: Callable[..., Path], weights: dict[str, str], tmp_path: Path) -> None:
    empty = tmp_path / "empty folder"
    empty.mkdir()
    pickled = tmp_path / "old.pt"
    torch.save({}, pickled)
    other_config = tmp_path / "other.yaml"
    other = to_dict(build_tokenizer("VQ_debug").config) | {"codebook_size": 128}
    other_config.write_text(json.dumps({"model": other}))
    foreign = RouterConfig(size=32, levels=[2, 4], layers=1, width=32, heads=2)
    foreign_path = tmp_path / "foreign.safetensors"
    save_model(foreign_path, Router(foreign).state_dict(), {"model": to_dict(foreign)}, {"kind": "router"})
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        ([], {"vid_path": tmp_path / "nowhere"}, "nowhere: no such file or folder"),
        ([], {"vid_path": empty}, "empty folder: no video"),
        ([], {"vq_ckpt": tmp_path / "none.safetensors"}, "none.safetensors: no such model file"),
        ([], {"vq_ckpt": pickled}, "pickled weights are refused"),
        ([], {"vq_ckpt": weights["--router_ckpt"]}, "not a tokenizer"),
        ([], {"tok_config": other_config}, r"other.yaml.*tok.safetensors.*codebook_size: 128 / 64"),
        ([], {"router_config": None, "router_ckpt": foreign_path}, r"levels \[2, 4\].*levels \[2, 4, 8\]"),
        ([], {"router_ckpt": None}, "--router_config without --router_ckpt"),
        ([], without_router(), "--budget router needs a router"),
        ([], {"budget": "tokens:7"}, "the minimum is 8 tokens"),
        ([], {"budget": "uniform:5"}, "its levels are 2, 4, 8"),
        ([], {"budget": "cheap"}, "is none of router"),
        ([], {"budget": "quality:0.1"}, "predicts no distances; give a router trained with labels=quality"),
        ([], {"trade-off": "1.0"}, "one trade-off"),
        ([], {"trade-off": "1.0", "budget": "uniform:4"}, "changes nothing under the budget 'uniform:4'"),
        ([], {"trade-off": "1.0", "budget": "quality:0.1"}, "changes nothing under the budget 'quality:0.1'"),
        (["--trade-off", "much"], {}, "--trade-off: invalid float value: 'much'"),
        ([], {"device": "tpu"}, "device='tpu'"),
        ([], {"perceptual": "vgg"}, "unknown perceptual distance 'vgg'"),
        (["--max-clips", "0"], {}, r"--max-clips: '0' is not a whole number of at least 1 \(see --help\)"),
        (["--fps", "fast"], {}, "--fps: 'fast' is not a number above 0"),
        (["--all_clip"], {}, "unrecognized arguments: --all_clip"),
    ]
    for flags, changes, pattern in cases:
        with pytest.raises(UserError, match=pattern) as caught:
            job(*flags, **changes)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "a mistake found at the start leaves no folder behind"


def test_nothing_readable_is_an_error(job: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "bad.mp4").write_text("no video")
    for budget in ("router", "average:14"):
        out = tmp_path / budget.partition(":")[0]
        with pytest.raises(UserError, match="none of the 1 videos could be read.*bad.mp4"):
            job(vid_path=source, save_dir=out, budget=budget)
        assert [each["file"] for each in read(out, "skipped.json")] == ["bad.mp4"]
        assert not (out / "metrics.json").exists()


def test_run_by_path_and_its_exit_code(weights: dict[str, str], tmp_path: Path) -> None:
    """From another folder, as in the README; a wrong path is one line and 2."""
    command = [sys.executable, str(ENTRY), "--vid_path", "nowhere", "--save_dir", "out", "--vq_ckpt", "none"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: nowhere: no such file or folder; give a video file or a folder of videos\n"
