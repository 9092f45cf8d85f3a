"""Random weights of debug size, and the evaluation commands run in this process, on protocols cut to five clips."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_files import AS_PUBLISHED, CLASSES, CLIPS, Run

from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from evaluations import protocols, shards
from evaluations.protocols import PROTOCOLS
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.work_units import lock
from tokenizer.presets import build_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of debug size: tok, c2v, fp."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = build_tokenizer("VQ_debug")
    save_model(folder / "tok.safetensors", tokenizer.state_dict(), {"model": to_dict(tokenizer.config)})
    for name, config, names in (
        ("c2v", PRESETS["GPT-debug"], CLASSES),
        ("fp", replace(PRESETS["GPT-debug"], num_classes=0, condition_lengths=[8, 4]), ()),
    ):
        model = GPT(config)
        torch.nn.init.normal_(model.head.weight, std=0.3)
        tokens = {"tokenizer_sha256": "", "class_names": list(names)}
        save_model(folder / f"{name}.safetensors", model.state_dict(), {"model": to_dict(config), "tokens": tokens})
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs one of the three commands in this process, two clips a shard; -> metrics.json."""
    monkeypatch.setattr(shards, "SHARD", 2)
    for name, size in (("mini-recon", 64), ("mini-c2v", 32), ("mini-fp", 32)):
        small = replace(PROTOCOLS[name], sources=CLIPS, size=size, count=5, draws=40)
        monkeypatch.setitem(protocols.PROTOCOLS, name, small)

    def command(module: str, out: Path, *flags: object, exit_code: int = 0, busy: Iterable[int] = ()) -> dict[str, Any]:
        """busy: shards that other processes hold while this one works."""
        words = ["--out", out, "--device", "cpu", "--cache", tmp_path / "cache", *flags]
        monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
        with ExitStack() as others, pytest.raises(SystemExit) as end:
            for shard in busy:
                (out / "shards").mkdir(parents=True, exist_ok=True)
                others.enter_context(lock(out / f"shards/{shard:06d}.lock"))
            runpy.run_module(f"evaluations.{module}", run_name="__main__")
        assert end.value.code == exit_code
        return json.loads((out / "metrics.json").read_text()) if (out / "metrics.json").exists() else {}

    return command


@pytest.fixture
def of_folder(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """of_folder(name of the results, flags ..): folder-recon at 64 pixels, no networks unless asked for."""
    monkeypatch.setitem(protocols.PROTOCOLS, "folder-recon", replace(AS_PUBLISHED["folder-recon"], size=64, draws=20))

    def command(out: str, *flags: object, exit_code: int = 0) -> dict[str, Any]:
        words = ["--protocol", "folder-recon", "--perceptual", "none", "--extractor", "none", *flags]
        return run("reconstruction", tmp_path / out, *words, exit_code=exit_code)

    return command
