"""The release of the miniature: what is rounded once, before tokens are made, and what the card is filled with."""

from __future__ import annotations

from pathlib import Path

import torch
from release import round_weights

from tokenizer.common.checkpoint import file_sha256, read_model, save_model
from tokenizer.common.config import to_dict
from tokenizer.presets import PRESETS, build_tokenizer, load_tokenizer


def test_a_tokenizer_is_rounded_once_and_in_its_place(tmp_path: Path) -> None:
    config = PRESETS["VQ_debug"]
    model, path = build_tokenizer(config), tmp_path / "final" / "model.safetensors"
    save_model(path, model.state_dict(), {"model": to_dict(config)}, {"step": "7"})
    (path.parent / "SHA256SUMS").write_text(f"{file_sha256(path)}  {path.name}\n")
    before = path.stat().st_size
    round_weights(tmp_path)
    stored = path.read_bytes()
    assert len(stored) < 0.6 * before and read_model(path).card == {"step": "7", "stored_in": "float16"}
    rounded = load_tokenizer(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], tensor.half().float()), name
    round_weights(tmp_path)
    assert path.read_bytes() == stored and rounded.sha256 == file_sha256(path)
