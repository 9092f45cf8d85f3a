"""The published protocols as whole commands, on small trees with the true layout and file names.

Every tree lacks most of its official list, so each result says so. The tokenizer and the GPTs have the true clip shape
(16x128x128), UCF-101's 101 classes, and random weights of debug size.
"""

from __future__ import annotations

import csv
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from tokenizer.common.checkpoint import file_sha256, save_model
from tokenizer.common.config import to_dict
from tokenizer.data.video_io import write_video
from tokenizer.presets import build_tokenizer

Run = Callable[..., dict[str, Any]]

UCF_TRAIN = (  # as trainlist01.txt has them; the class of the last is spelt otherwise in its file's name
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
    "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c02.avi",
    "HandstandPushups/v_HandStandPushups_g08_c01.avi",
)
K600_HEADER = ("label", "youtube_id", "time_start", "time_end", "split")
WEBVID_HEADER = ("videoid", "contentUrl", "duration", "page_dir", "name")


class StandInI3D(torch.nn.Module):
    """The interface of the TorchScript I3D. Its numbers are three means of a clip, so no FVD."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return x.mean(dim=[2, 3, 4])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tok, c2v and fp.safetensors, and the stand-in i3d.pt."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = build_tokenizer("VQ_debug", size=128)
    save_model(folder / "tok.safetensors", tokenizer.state_dict(), {"model": to_dict(tokenizer.config)})
    for name, shape in (
        ("c2v", {"num_classes": 101}),
        ("fp", {"num_classes": 0, "condition_lengths": [8, 4]}),
    ):
        model = GPT(replace(PRESETS["GPT-debug"], **shape))  # type: ignore[arg-type]
        torch.nn.init.normal_(model.head.weight, std=0.3)
        tokens: dict[str, Any] = {"tokenizer_sha256": "", "class_names": []}
        config = {"model": to_dict(model.config), "tokens": tokens}
        save_model(folder / f"{name}.safetensors", model.state_dict(), config)
    torch.jit.script(StandInI3D()).save(str(folder / "i3d.pt"))
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(module, name of the results folder, flags ..) as typed -> metrics.json."""

    def command(module: str, out: str, *flags: object) -> dict[str, Any]:
        words = ["--out", tmp_path / out, "--device", "cpu", "--cache", tmp_path / "cache", "--force", *flags]
        monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(f"evaluations.{module}", run_name="__main__")
        assert end.value.code == 0
        return json.loads((tmp_path / out / "metrics.json").read_text())

    return command


def of_tokenizer(models: Path) -> list[object]:
    return ["--vq-ckpt", models / "tok.safetensors", "--budget", "uniform:2"]


def of_gpt(models: Path, name: str) -> list[object]:
    weights = ["--vq-ckpt", models / "tok.safetensors", "--gpt-ckpt", models / f"{name}.safetensors"]
    return [*weights, "--gpt-model", "GPT-debug", "--check-special-token-mask"]


def stand_in(models: Path) -> list[object]:
    weights = models / "i3d.pt"
    return ["--extractor-weights", weights, "--extractor-sha256", file_sha256(weights)]


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "per_clip.csv", newline="") as file:
        return list(csv.DictReader(file))


def film(path: Path, num: int, codec: str, rate: int = 25) -> None:
    """A pattern that moves, 176x144, as such data sets are coded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y_HW, x_HW = np.mgrid[:144, :176]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = 144, 176, "yuv420p"
        for t in range(num):
            grey_HW = (128 + 90 * np.sin((x_HW + 4 * t) / 9) * np.cos(y_HW / 7)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.stack([grey_HW, grey_HW[::-1], 255 - grey_HW], axis=-1), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def table(path: Path, *rows: tuple[object, ...]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def ucf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """UCF101.rar and the split files as they unpack: 34, 20 and 16 frames, one video of the list is not there."""
    root = tmp_path / "UCF-101"
    for name, num in zip(UCF_TRAIN, (34, 20, 16), strict=True):
        film(root / name, num, "mpeg4")
    film(root / "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", 20, "mpeg4")  # of testlist01
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    numbers = (1, 1, 37)
    lines = [f"{name} {number}" for name, number in zip(UCF_TRAIN, numbers, strict=True)]
    (lists / "trainlist01.txt").write_text("\n".join([*lines, "YoYo/v_YoYo_g08_c01.avi 101", ""]))
    (lists / "testlist01.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n")
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\r\n37 HandstandPushups\r\n101 YoYo\r\n")
    monkeypatch.setenv("UCF_ROOT", str(root))
    return root


def test_reconstruction_of_ucf101(run: Run, ucf: Path, models: Path, tmp_path: Path) -> None:
    """By the official list; LARP's rule takes other frames of the same videos."""
    flags = [*of_tokenizer(models), *stand_in(models), "--perceptual", "none"]
    first = run("reconstruction", "first", "--protocol", "ucf101-recon-train", *flags)
    sha256 = file_sha256(models / "i3d.pt")
    name = f"fd_torchscript_{sha256[:8]}"
    assert first["notes"] == [
        "not the protocol ucf101-recon-train: perceptual changed",
        "the list has 4 videos, the official one 9537",
        "1 of 4 listed videos are missing",
        f"{name} is not fvd_i3d: the weights have sha256 {sha256[:12]}.., the I3D of the papers has bec6519f66ea..",
        f"{name} FORCED on 3 clips, fewer than 256: not to be compared",
        f"{name}_infinity not computed: it needs more clips than the 3 features, not 3",
    ]
    assert first["metrics"]["tokens"]["value"] == 8 and first["metrics"][name]["value"] > 0
    rows = rows_of(tmp_path / "first")
    assert [row["name"] for row in rows] == list(UCF_TRAIN)
    assert [row["label"] for row in rows] == ["ApplyEyeMakeup", "ApplyEyeMakeup", "HandstandPushups"]
    card = (tmp_path / "first/card.txt").read_text()
    assert "train (trainlist01)" in card and file_sha256(models / "i3d.pt") in card

    larp = run("reconstruction", "larp", "--protocol", "ucf101-recon-train-larp", *flags)
    assert larp["card"]["list"]["sha256"] != first["card"]["list"]["sha256"]
    others = [row["psnr"] for row in rows_of(tmp_path / "larp")]
    assert [row["psnr"] == other for row, other in zip(rows, others, strict=True)] == [False, False, True]


def test_class_to_video_on_ucf101(run: Run, ucf: Path, models: Path, tmp_path: Path) -> None:
    """A sample for each window, under the class of its video; every field is the protocol's own."""
    flags = [*of_gpt(models, "c2v"), "--cfg-scale", "1.75", *stand_in(models)]
    result = run("class_to_video", "out", "--protocol", "ucf101-c2v-10k", *flags)
    assert result["card"]["protocol"]["changed"] == [] and result["card"]["perceptual"] is None
    assert "the protocol asks for 10000 clips, there are 4" in result["notes"]
    digest = file_sha256(models / "i3d.pt")[:8]
    assert result["metrics"].keys() == {
        "tokens",
        "tokens_with_length_tokens",
        *(f"{kind}_torchscript_{digest}" for kind in ("fd", "kd")),
        f"fd_torchscript_{digest}_infinity",
    }
    windows = [(row["name"], row["label"]) for row in rows_of(tmp_path / "out")]
    starts = ((0, 0), (0, 16), (1, 0), (2, 0))
    labels = ["ApplyEyeMakeup"] * 3 + ["HandstandPushups"]
    assert windows == [(f"{UCF_TRAIN[v]}@{start}", label) for (v, start), label in zip(starts, labels, strict=True)]


def test_frame_prediction_on_kinetics(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 frames given, scored at 64 pixels, three windows drawn of those that there are."""
    film(tmp_path / "val/abseiling/-3B32lodo2M_000059_000069.mp4", 33, "h264")
    film(tmp_path / "val/tai chi/zzZ_09azAZ0_000004_000014.mp4", 48, "h264")
    rows = [("abseiling", "-3B32lodo2M", 59, 69, "val"), ("tai chi", "zzZ_09azAZ0", 4, 14, "val")]
    listed = table(tmp_path / "kinetics_600_val.csv", K600_HEADER, *rows, ("zumba", "removed_by_", 1, 11, "val"))
    monkeypatch.setenv("K600_ROOT", str(tmp_path / "val"))
    monkeypatch.setenv("K600_VAL_FILE", str(listed))
    judges = ["--extractor", "effnet", "--perceptual", "stlpips_alex", "--count", "3"]
    result = run("frame_prediction", "out", "--protocol", "k600-fp-50k-64px", *of_gpt(models, "fp"), *judges)
    assert result["notes"][:2] == [
        "not the protocol k600-fp-50k-64px: count, extractor, perceptual changed",
        "1 of 3 listed videos are missing",
    ]
    assert {"fcd_effnet", "stlpips_alex", "psnr"} < result["metrics"].keys() and result["num_clips"] == 3
    rows_out = rows_of(tmp_path / "out")
    assert all(row["lengths"].startswith("8 4 ") and int(row["start"]) % 16 == 0 for row in rows_out)
    assert {row["label"] for row in rows_out} == {"abseiling", "tai chi"}
    card = (tmp_path / "out/card.txt").read_text()
    assert "5 frames, scored too" in card and "resized to 64" in card


def test_reconstruction_of_webvid(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the .csv that came with it to a manifest to scores; three frames a second, the last repeated."""
    frames_THWC = np.broadcast_to((4 * np.arange(60, dtype=np.uint8))[:, None, None, None], (60, 128, 128, 3))
    shown = np.minimum(np.arange(16) * 10 // 3, 59), np.array([0, 3, 6, *[6] * 13])
    for name, num in (("053001_053050/21179416", 60), ("1066674777", 8)):
        path = tmp_path / f"videos/{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames_THWC[:num], 10, lossless=True)
    rows = [(21179416, "https://example.org/a.mp4", "PT00H00M06S", "053001_053050", "Aerial shot, winter forest"),
            (1066674777, "https://example.org/b.mp4", "PT00H00M01S", "", 'A "sign"')]  # fmt: skip
    listed = table(tmp_path / "results_2M_val.csv", WEBVID_HEADER, *rows)
    manifest = tmp_path / "webvid_val.csv"
    words = ["build", "--dataset", "webvid", "--root", tmp_path / "videos", "--list", listed, "--out", manifest]
    monkeypatch.setattr(sys, "argv", ["manifest", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("tokenizer.data.manifest", run_name="__main__")
    assert end.value.code == 0

    protocol = ["--protocol", "webvid-recon-val", "--data", manifest]
    flags = [*of_tokenizer(models), *stand_in(models), "--perceptual", "none"]
    assert run("reconstruction", "out", *protocol, *flags)["num_clips"] == 2

    ours = tmp_path / "ours"  # what a rate of 3 must show of both
    ours.mkdir()
    for i, index_T in enumerate(shown):
        np.save(ours / f"{i}.npy", frames_THWC[index_T])
    result = run("reconstruction", "same", *protocol, "--ours", ours, "--extractor", "none", "--perceptual", "none")
    assert result["metrics"]["psnr"]["low"] == result["metrics"]["psnr"]["value"] == 100
