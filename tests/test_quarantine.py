"""Damaged training videos: put aside by name in `quarantine.jsonl`, once each, while the others keep their order."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer.common.config import load_config
from tokenizer.common.device import epoch_order
from tokenizer.data.loader import ClipBatch
from tokenizer.data.video_io import write_video
from tokenizer.train import TokenizerTrainConfig, TokenizerTraining
from tokenizer.training.train_step import Values
from tokenizer.training.trainer import note_unreadable

PROXY = Path(__file__).parents[1] / "configs" / "debug" / "proxy.yaml"
DAMAGED = {"videos/1.mp4": "videos/2.mp4", "videos/4.mp4": "videos/5.mp4"}  # and the clip that stands in for each


class Watched(TokenizerTraining):
    """Remembers the clips of every step."""

    def train_step(self, batch: ClipBatch) -> Values:
        self.seen = {**getattr(self, "seen", {}), self.state.step: batch.names}
        return super().train_step(batch)


def train(videos: Path, folder: Path, steps: int) -> dict[int, list[str]]:
    """A run on `videos`, six clips in batches of two; the names of each step."""
    settings = [f"data.sources=[{videos}]", f"run.dir={folder}", f"run.steps={steps}", "run.num_workers=2"]
    settings += ["val_data.sources=[synthetic:heldout:1]", "loss.perceptual=0", "loss.perceptual_net=none"]
    training = Watched(load_config(TokenizerTrainConfig, PROXY, [*settings, "run.device=cpu"]))
    training.fit()
    return training.seen


def entries(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Six videos, of which one is cut short and one is empty."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
        write_video(folder / f"{number}.mp4", noise, fps=10)
    (folder / "1.mp4").write_bytes((folder / "1.mp4").read_bytes()[:200])
    (folder / "4.mp4").write_bytes(b"")
    return folder


def test_damaged_videos_are_put_aside_by_name(tmp_path: Path, videos: Path) -> None:
    run = tmp_path / "run"
    found = train(videos, run, 3)  # one epoch: every file was met
    noted = entries(run)
    assert sorted(entry["file"] for entry in noted) == sorted(DAMAGED)
    reasons = {entry["file"]: entry["reason"] for entry in noted}
    assert "cannot be decoded" in reasons["videos/1.mp4"] and reasons["videos/4.mp4"].startswith("is empty")
    assert all(entry.keys() == {"file", "reason"} for entry in noted)

    found |= train(videos, run, 6)  # resumed: the files are met again
    assert entries(run) == noted
    order = [f"videos/{index}.mp4" for epoch in (0, 1) for index in epoch_order(6, 0, epoch)]
    assert [name for step in range(6) for name in found[step]] == [DAMAGED.get(name, name) for name in order]


def test_what_several_processes_meet_is_noted_once(tmp_path: Path) -> None:
    def met(**unreadable: str) -> ClipBatch:
        return ClipBatch(torch.zeros(0), [], [], [], unreadable, shard=None)  # type: ignore[arg-type]

    note_unreadable(tmp_path, met())
    assert not list(tmp_path.iterdir())
    for batch in (met(a="is empty"), met(a="is empty", b="holds no video"), met(b="holds no video"), object()):
        note_unreadable(tmp_path, batch)
    assert entries(tmp_path) == [{"file": "a", "reason": "is empty"}, {"file": "b", "reason": "holds no video"}]
