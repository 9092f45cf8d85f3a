"""Tiny random weights, a folder of good and bad videos, and the main job run on them in this process."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from job_files import ENTRY, JOB, LATIN_1, ROUTER, frames

from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.data.video_io import write_video
from tokenizer.presets import build_tokenizer
from tokenizer.router.model import Router


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The four model arguments: debug tokenizer and router with random weights, and their YAML files."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    tokenizer, router = build_tokenizer("VQ_debug"), Router(ROUTER)
    torch.nn.init.normal_(router.head.weight)
    for name, kind, model in (("tok", "tokenizer", tokenizer), ("router", "router", router)):
        config = {"model": to_dict(model.config)}
        save_model(folder / f"{name}.safetensors", model.state_dict(), config, {"kind": kind})
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return {
        "--router_config": str(folder / "router.yaml"),
        "--router_ckpt": str(folder / "router.safetensors"),
        "--tok_config": str(folder / "tok.yaml"),
        "--vq_ckpt": str(folder / "tok.safetensors"),
    }


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good files, two of one name, one short, one long; and three that cannot be read."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more clips").mkdir()
    write_video(folder / "a.mp4", frames(1), 8)
    write_video(folder / "more clips/a.mp4", frames(3, seed=1), 8)
    write_video(folder / "long.mp4", frames(2, num=40, seed=2), 8)
    write_video(folder / "short.mp4", frames(1, num=5, seed=3), 8)
    shutil.copy(folder / "a.mp4", os.fsencode(folder) + b"/" + LATIN_1)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video <b>at all</b>")
    (folder / "cut.mp4").write_bytes((folder / "long.mp4").read_bytes()[:600])
    return folder


@pytest.fixture
def job(weights: dict[str, str], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """job(*flags, key=value, ...) runs the main job in this process, into tmp_path/out, and returns that folder."""

    def run(*flags: str, **changes: str | Path | None) -> Path:
        given = {"--vid_path": videos, "--save_dir": tmp_path / "out", **weights, "--perceptual": "none"}
        given |= {f"--{key}": value for key, value in changes.items()}
        words = [word for key, value in given.items() if value is not None for word in (key, str(value))]
        monkeypatch.setattr(sys, "argv", [str(ENTRY), *words, *flags])
        JOB["main"]()
        return Path(str(given["--save_dir"]))

    return run
