"""Random debug models, a folder of good and bad videos, and both sampling commands run on them in this process."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_files import CLASS_NAMES, CLASSES, FRAMES, common, save_random_gpt

from autoregressive import sample_c2v, sample_frame_prediction
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.data.files import BUNDLED
from tokenizer.data.video_io import write_video
from tokenizer.presets import build_tokenizer


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tok.safetensors, c2v.safetensors and fp.safetensors: random weights of debug size."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = build_tokenizer("VQ_debug")
    with torch.no_grad():
        for parameter in tokenizer.parameters():  # an untrained tokenizer hardly tells noise from noise
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = {"model": to_dict(tokenizer.config)}
    save_model(folder / "tok.safetensors", tokenizer.state_dict(), config, {"kind": "tokenizer"})
    save_random_gpt(folder / "c2v.safetensors", CLASSES, CLASS_NAMES)
    save_random_gpt(folder / "fp.safetensors", FRAMES, [])
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real videos, a wide one, one that is too short, and one that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("box_000.mp4", "bunny_000.mp4"):
        shutil.copy(BUNDLED / name, folder)
    rng = np.random.default_rng(0)
    write_video(folder / "wide.mp4", rng.integers(0, 255, (16, 32, 96, 3), np.uint8), 24)
    write_video(folder / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8), 24)
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.fixture
def c2v(models: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the class-to-video command in this process -> samples.json."""

    def run(out: Path, *flags: str, mask: bool = True) -> dict:
        words = [*common(models, "c2v", out), *(["--check-special-token-mask"] if mask else []), *flags]
        monkeypatch.setattr(sys, "argv", ["sample_c2v", *words])
        sample_c2v.main()
        return json.loads((out / "samples.json").read_text())

    return run


@pytest.fixture
def frame_prediction(models: Path, monkeypatch: pytest.MonkeyPatch):
    """The same for frame prediction."""

    def run(out: Path, *flags: str) -> dict:
        words = [*common(models, "fp", out), "--check-special-token-mask", *flags]
        monkeypatch.setattr(sys, "argv", ["sample_frame_prediction", *words])
        sample_frame_prediction.main()
        return json.loads((out / "samples.json").read_text())

    return run
