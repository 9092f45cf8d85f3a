"""The small parts under the main job: motion, correlation, use of the codebook, choice of a perceptual network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer.common.errors import UserError
from tokenizer.common.image_quality import motion_figures
from tokenizer.router.reconstruct import pick_perceptual
from tokenizer.router.results import codebook_use, rank_correlation
from tokenizer.tokens import VideoTokens


def test_a_perceptual_network_or_the_reason_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise UserError(f"{name} is absent")

    monkeypatch.setattr("tokenizer.router.reconstruct.load_perceptual", absent)
    cpu = torch.device("cpu")
    assert pick_perceptual("auto", cpu, 64) == (None, "lpips_vgg is absent; stlpips_alex is absent")
    with pytest.raises(UserError, match="stlpips_vgg is absent"):
        pick_perceptual("stlpips_vgg", cpu, 64)


def test_motion_of_blocks() -> None:
    video = np.zeros((8, 4, 4, 3), np.uint8)
    video[4:] = 100  # a cut between the two blocks belongs to the second
    figures = motion_figures(video, 2)
    assert figures["block_motion"] == [0.0, 25.0] and figures["motion"] == pytest.approx(100 / 7)


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1], [1, 2]) is None


def test_codebook_use(tmp_path: Path) -> None:
    for name, codes in (("a", [0, 1, 1, 1]), ("b", [0, 2, 2, 2])):
        VideoTokens(torch.tensor(codes), torch.tensor([[2, 2]]), 8, 16, 8).save(tmp_path / name)
    use = codebook_use([tmp_path / "a", tmp_path / "b"], 8)
    assert (use["num_drawn"], use["share_used"]) == (8, 3 / 8)
    assert use["curve"][:4] == [3.0, 3.0, 2.0, 0.0]
    share = np.array([3, 3, 2]) / 8
    assert use["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_the_face_of_the_package_is_light() -> None:
    code = "import sys, tokenizer; assert 'torch' not in sys.modules; from tokenizer import load_router, VideoTokens"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
