"""Which settings a folder of results accepts: keys of before, changed ones, damaged notes."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tokenizer.common.errors import UserError
from tokenizer.common.work_units import claim_folder
from tokenizer.training.optim import OptimConfig
from tokenizer.training.trainer import claim


@dataclass
class _Width:
    width: int = 4
    norm: str = field(default="layer", metadata={"renamed_from": "normalisation"})


@dataclass
class _Config:
    model: _Width = field(default_factory=_Width)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0


def test_a_run_of_before_a_setting_resumes_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    """Keys that the stored config lacks count as their defaults, at the top, in a section, in what a run notes."""
    noted = {"tokens": _Width()}
    (tmp_path / "config.yaml").write_text("model: {width: 4}\noptim: {lr: 0.0001}\ntokens: {norm: layer}\n")
    claim(tmp_path, _Config(), noted, write=False)
    for key, changed in (
        ("seed: 0 / 1", _Config(seed=1)),
        ("model.norm: 'layer' / 'rms'", _Config(_Width(norm="rms"))),
        ("optim.clip_norm: 1.0 / 2.0", _Config(optim=OptimConfig(clip_norm=2.0))),
    ):
        with pytest.raises(UserError, match=re.escape(f"(there / here): {key}; choose")):
            claim(tmp_path, changed, noted)
    with pytest.raises(UserError, match=r"tokens\.width: 4 / 5; choose run\.dir=OTHER$"):
        claim(tmp_path, _Config(), {"tokens": _Width(5)}, allow_changes=True)
    claim(tmp_path, _Config(), noted)
    assert "seed: 0" in (tmp_path / "config.yaml").read_text()  # from here on the key is there
    (tmp_path / "config.yaml").write_text("model: {normalisation: layer}\n")
    with pytest.raises(UserError, match=r"config\.yaml: key 'normalisation' is called 'norm' today"):
        claim(tmp_path, _Config(), noted)


def test_work_of_before_a_setting_goes_on_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"data": {"width": 4}})
    claim_folder(tmp_path, {"data": _Width(), "views": 1}, defaults={"views": 1})
    with pytest.raises(UserError, match=r"made from another views \(there / now: views: 1 / 2\)"):
        claim_folder(tmp_path, {"data": _Width(), "views": 2}, defaults={"views": 1})
    with pytest.raises(UserError, match=r"data\.norm: 'layer' / 'rms'"):
        claim_folder(tmp_path, {"data": _Width(norm="rms")})


def test_a_damaged_note_of_what_a_folder_is_made_from_is_one_line(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"seed": 0})
    for damaged in (b"", b"\xff", b"[]", b"[" * 100_000):
        (tmp_path / "made_from.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"made_from\.json: .*; choose another dir="):
            claim_folder(tmp_path, {"seed": 0})
