"""Frame prediction as users type it, on a folder of real files; and the pictures of both commands."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_files import CLASSES, contents, num_frames

from autoregressive.model import GPT
from autoregressive.sample_folder import Card, sample_page
from autoregressive.sample_grid import sample_grid
from autoregressive.sampler import Request, SamplingConfig
from tokenizer.common.errors import UserError
from tokenizer.data.files import BUNDLED
from tokenizer.data.video_io import write_video
from tokenizer.presets import load_tokenizer
from tokenizer.tokens import VideoTokens
from tokenizer.viz.frames import ShownClip, contact_sheet, grid_video, mark_given


def test_frame_prediction_of_a_folder(frame_prediction, models: Path, videos: Path, tmp_path: Path) -> None:
    """Real decoded files; what cannot be used is named; a second run only tries those again."""
    out = tmp_path / "out"
    flags = ("--vid_path", str(videos), "--fixed-prefix", "8,4", "--condition-mode", "padding", "--orig-aspect-ratio")
    summary = frame_prediction(out, *flags)
    assert summary["complete"] and summary["num_samples"] == 3
    reasons = {skipped["file"]: skipped["reason"] for skipped in summary["skipped"]}
    assert reasons.keys() == {"short.mp4", "text.mp4"}
    assert reasons["short.mp4"] == "has 3 frame(s), and the condition needs 5"
    for sample in summary["samples"]:
        assert sample["assignment"][:2] == [8, 4] and sample["given_frames"] == 5
        folder = out / "samples" / sample["name"]
        real_THWC = np.load(folder / "original.npy")
        assert real_THWC.shape == np.load(folder / "frames.npy").shape == (16, 32, 32, 3)
        assert num_frames(folder / "side_by_side.mp4") == num_frames(folder / "original.mp4") == 16
    assert num_frames(out / "grids/frame_prediction.mp4") == 16 and (out / "grids/frame_prediction.png").is_file()
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "blue border" in page

    before = contents(out, "frames.npy")
    assert frame_prediction(out, *flags) == summary
    assert contents(out, "frames.npy") == before


def test_only_the_given_frames_are_seen(frame_prediction, tmp_path: Path) -> None:
    """Videos that differ from the sixth frame on are continued alike; a change in the fifth is seen."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 255, (16, 32, 32, 3), np.uint8)
    (tmp_path / "in").mkdir()
    for name, place in (("a", None), ("b", 5), ("c", 4)):
        frames = first.copy()
        if place is not None:
            frames[place] = 255 - frames[place]
        write_video(tmp_path / "in" / f"{name}.mp4", frames, 24, lossless=True)
    likeliest = frame_prediction(tmp_path / "out", "--vid_path", str(tmp_path / "in"), "--top-k", "1")
    names = [sample["name"] for sample in likeliest["samples"]]
    a, b, c = (VideoTokens.load(tmp_path / "out/samples" / name / "tokens.safetensors").code_L for name in names)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_kinetics_is_found_by_its_environment(
    frame_prediction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--dataset", "k600_val", "--sample-num", "1")
    for name in ("K600_ROOT", "K600_VAL_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="K600_ROOT is not set: .* give --vid_path DIR"):
        frame_prediction(tmp_path / "out", *flags)
    root, listed = tmp_path / "k600", tmp_path / "val.csv"
    (root / "juggling").mkdir(parents=True)
    listed.write_text("label,youtube_id,time_start,time_end\njuggling,abcdefghijk,3,13\njuggling,gone,1,11\n")
    monkeypatch.setenv("K600_ROOT", str(root))
    monkeypatch.setenv("K600_VAL_FILE", str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match=r"K600_VAL_FILE=.*none\.csv: does not exist"):
        frame_prediction(tmp_path / "out", *flags)
    monkeypatch.setenv("K600_VAL_FILE", str(listed))
    shutil.copy(BUNDLED / "tree_000.mp4", root / "juggling" / "abcdefghijk_000003_000013.mp4")
    summary = frame_prediction(tmp_path / "out", *flags)
    assert [sample["name"] for sample in summary["samples"]] == ["abcdefghijk_000003_000013_000000"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "either --dataset k600_val or --vid_path"),
        (["--vid_path", "nowhere"], "nowhere: no such file"),
        (["--vid_path", "{videos}", "--fixed-prefix", "16,4"], "16 is none of the levels"),
        (["--vid_path", "{videos}", "--fixed-prefix", "8,4,4,4,4"], "longer than the 4 blocks"),
        (["--vid_path", "{videos}", "--fixed-prefix", "8,8"], "was trained with 8,4"),
        (["--vid_path", "{videos}", "--condition-frames", "9"], "takes 5 to 8"),
        (["--vid_path", "{videos}", "--tokens-per-block", "4,4"], "this model's clips begin with"),
        (["--vid_path", "{videos}/short.mp4"], "short.mp4: has 3 frame.s., and the condition needs 5"),
    ],
)
def test_mistakes_of_frame_prediction(
    frame_prediction, videos: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        frame_prediction(tmp_path / "out", *(flag.format(videos=videos) for flag in flags))


def test_names_cannot_reach_the_page_as_html() -> None:
    frames_THWC = np.zeros((16, 32, 32, 3), np.uint8)
    cards = [Card("<script>alert(1)</script>", '<img src="x">', ShownClip(frames_THWC, (2, 4, 8, 2)))]
    settings = {"<u>": "</style><script>"}
    facts = {"num_samples": 1, "mean_tokens": 16.0, "num_broken": 0, "gpt_model": "<u>", "gpt": "<u>", "tokenizer": "t"}
    page = sample_page({**facts, "settings": settings}, cards, 8)
    assert not re.search("<(script|img|u)[ >]", page) and "&lt;script&gt;alert" in page and page.count("</style>") == 1


def test_grid_of_a_validation(models: Path, tmp_path: Path) -> None:
    """The model comes back in the mode it had, whatever happens."""
    model = GPT(CLASSES)
    requests = [Request(("validation", label), label) for label in range(3)]
    samples = sample_grid(
        tmp_path / "grid.png", model, load_tokenizer(models / "tok.safetensors"), requests, SamplingConfig(slots=2)
    )
    assert [sample.request.label for sample in samples] == [0, 1, 2]
    assert (tmp_path / "grid.png").is_file() and model.training


def test_given_frames_are_marked() -> None:
    clip = ShownClip(np.zeros((16, 64, 64, 3), np.uint8), (8, 16, 32, 8), np.zeros((16, 64, 64, 3), np.uint8), 5)
    marked = mark_given(clip.frames_THWC, 5)
    assert marked[:5, 0].any(axis=(1, 2)).all() and not marked[5:].any() and not marked[:, 2:-2, 2:-2].any()
    assert grid_video([clip] * 3, longest=32).shape[0] == 16
    assert contact_sheet([clip] * 3, longest=32).width == 16 * 64
    wide = ShownClip(np.zeros((16, 512, 512, 3), np.uint8), (8, 16, 32, 8))
    assert contact_sheet([wide], longest=32).width == 4 * 512
