"""The main job end to end on real files with tiny random weights: what it writes, under every form of budget."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_files import read, without_router

from tokenizer.common.image_quality import psnr
from tokenizer.data.video_io import iter_clips, to_model_range
from tokenizer.presets import load_tokenizer
from tokenizer.router import results
from tokenizer.tokens import VideoTokens
from tokenizer.viz import report


def test_everything_is_written(job: Callable[..., Path], weights: dict[str, str], capsys: Any) -> None:
    out = job()
    metrics, tokenizer = read(out), load_tokenizer(weights["--vq_ckpt"])
    clips = metrics["clips"]
    assert [c["file"] for c in clips] == ["a.mp4", r"caf\xe9 \xfc.mp4", "long.mp4", "more clips/a.mp4", "short.mp4"]
    assert len({c["name"] for c in clips}) == 5 and all(re.fullmatch(r"[\w-]+", c["name"]) for c in clips)
    assert [c["num_padded"] for c in clips] == [0, 0, 0, 0, 11]
    assert metrics["complete"] and metrics["budget"] == "router" and metrics["price"] is None
    assert metrics["lpips_backbone"] is None and "--perceptual none" in metrics["lpips_reason"]
    assert metrics["tokenizer"]["sha256"] == tokenizer.sha256 and not metrics["tokenizer"]["paper_size"]
    for key in ("tokens", "psnr", "ssim", "motion"):
        assert metrics["mean"][key] == pytest.approx(np.mean([c[key] for c in clips]))
    assert metrics["mean"]["lpips"] is None

    skipped = read(out, "skipped.json")
    assert [each["file"] for each in skipped] == ["cut.mp4", "empty.mp4", "text.mp4"]
    assert all(each["reason"] for each in skipped) and metrics["num_skipped"] == 3
    assert "3 video(s) skipped" in capsys.readouterr().out

    for clip in clips:
        folder = out / "clips" / clip["name"]
        assert sorted(path.name for path in folder.iterdir()) == sorted(results._FILES)
        shown = next(iter_clips(folder / "side_by_side.mp4", 16, None)).frames_THWC
        assert shown.shape == (16, 256 + 48, 2 * 256 + 8, 3)


def test_figures_come_from_the_arrays(job: Callable[..., Path], weights: dict[str, str], videos: Path) -> None:
    """The saved tokens alone give the very reconstruction that was measured."""
    out = job("--max-clips", "1")
    clip = read(out)["clips"][0]
    tokens = VideoTokens.load(out / "clips" / clip["name"] / "tokens.safetensors")
    real_BCTHW = to_model_range(next(iter_clips(videos / "a.mp4", 16, 32)).frames_THWC)[None]
    ours_BCTHW = load_tokenizer(weights["--vq_ckpt"]).decode(tokens)
    assert clip["psnr"] == pytest.approx(float(psnr(ours_BCTHW, real_BCTHW)[0]), abs=1e-4)
    assert clip["tokens"] == len(tokens.code_L) and clip["assignment"] == tokens.length_BN[0].tolist()


def test_report_is_one_safe_file(job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out = job()
    page = (out / "report.html").read_text()
    assert "<script" not in page and "http" not in re.sub(r"http-equiv", "", page) and "src=" not in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    assert page.count("data:image/jpeg;base64,") == 5 and page.count("<article") == 5
    assert r"caf\xe9 \xfc.mp4" in page and "Not the size of the paper" in page
    assert "The file is short: its last frame is repeated 11 times." in page

    monkeypatch.setattr(report, "MOST_FILMS", 3)
    monkeypatch.setattr(report, "NUM_EXTREMES", 1)
    report.write_report(out)
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == page.count("<article") == 3
    assert "<h2>Worst reconstructions<" in page and "<h2>Other clips<" in page and "evenly spread" in page


def test_a_clip_is_shown_once_in_the_first_group_that_has_it() -> None:
    """Clip i has i tokens; clips 0 and 1 are also the worst."""
    records = [{"name": f"{i:02d}", "tokens": i, "motion": 1.0, "psnr": 10.0 + i} for i in range(80)]
    groups = report.grouped(records)
    assert [heading for heading, _, _ in groups] == ["Worst reconstructions", "Most tokens", "Other clips"]
    assert [r["name"] for r in groups[0][2]] == ["00", "01", "02"] and [r["tokens"] for r in groups[1][2]] == [
        79,
        78,
        77,
    ]
    assert len(groups[2][2]) == report.MOST_FILMS - 6 and "54 of 74" in groups[2][1]
    names = [r["name"] for _, _, group in groups for r in group]
    assert len(set(names)) == len(names)


def test_names_cannot_reach_the_page_as_html(job: Callable[..., Path], videos: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "in"
    hostile.mkdir()
    shutil.copy(videos / "a.mp4", hostile / "<img src=x onerror=alert(1)>.mp4")
    page = (job(vid_path=hostile) / "report.html").read_text()
    assert "<img" not in page and "&lt;img src=x" in page


def test_lpips_is_a_number_or_null_with_a_reason(job: Callable[..., Path]) -> None:
    metrics = read(job("--max-clips", "2", perceptual="auto"))
    values = [metrics["mean"]["lpips"], *(clip["lpips"] for clip in metrics["clips"])]
    if metrics["lpips_backbone"] is None:  # without the extra [offline]
        assert values == [None] * 3 and "stlpips_alex" in metrics["lpips_reason"]
    else:
        assert metrics["lpips_reason"] is None and all(value > 0 for value in values)


def test_tokens_and_average_and_price(job: Callable[..., Path], tmp_path: Path) -> None:
    free = read(job(save_dir=tmp_path / "free"))
    limited = read(job(save_dir=tmp_path / "limited", budget="tokens:12"))
    average = read(job(save_dir=tmp_path / "average", budget="average:14"))
    dear = read(job(save_dir=tmp_path / "dear", budget="price:1000"))
    assert all(clip["tokens"] <= 12 for clip in limited["clips"])
    assert average["mean"]["tokens"] <= 14 and average["price"] is not None
    assert all(clip["assignment"] == [2, 2, 2, 2] for clip in dear["clips"])
    for other in (limited, average, dear):
        assert [c["router_tokens"] for c in other["clips"]] == [c["tokens"] for c in free["clips"]]
    for clip in [*free["clips"], *limited["clips"], *average["clips"], *dear["clips"]]:
        assert clip["score_gap"] >= 0  # no even split that the budget allows is rated above the choice


@pytest.mark.parametrize("budget", ["fixed:8,4,2,2", "uniform:4"])
def test_budgets_that_need_no_router(job: Callable[..., Path], budget: str) -> None:
    metrics = read(job("--max-clips", "2", budget=budget, **without_router()))
    wanted = [8, 4, 2, 2] if budget.startswith("fixed") else [4] * 4
    assert all(clip["assignment"] == wanted and "score_gap" not in clip for clip in metrics["clips"])
    assert metrics["router"] is None and metrics["motion_tokens_rank_correlation"] is None


def test_a_router_at_hand_is_asked_even_where_the_budget_decides(job: Callable[..., Path]) -> None:
    clip = read(job("--max-clips", "1", budget="uniform:4"))["clips"][0]
    assert clip["assignment"] == [4] * 4 and clip["router_tokens"] in range(8, 33)


def test_batches_and_workers_change_nothing(job: Callable[..., Path], tmp_path: Path) -> None:
    one = job("--batch-size", "1", "--num-workers", "0", "--all-clips", save_dir=tmp_path / "one")
    many = job("--batch-size", "4", "--num-workers", "3", "--all-clips", save_dir=tmp_path / "many")
    for a, b in zip(read(one)["clips"], read(many)["clips"], strict=True):
        assert a.pop("psnr") == pytest.approx(b.pop("psnr"), abs=1e-3)
        assert a.pop("ssim") == pytest.approx(b.pop("ssim"), abs=1e-4)
        assert a.pop("score_gap") == b.pop("score_gap")
        assert a == b


def test_writers_change_nothing(job: Callable[..., Path], tmp_path: Path) -> None:
    """One thread in turn, or three beside the models: every file of the results has the same bytes."""
    serial, pool = (job("--num-workers", n, save_dir=tmp_path / n) for n in ("0", "3"))
    files = sorted(path.relative_to(serial) for path in serial.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(pool) for path in pool.rglob("*") if path.is_file())
    assert len(files) == 5 * 5 + 6 and not [f for f in files if (serial / f).read_bytes() != (pool / f).read_bytes()]


def test_without_videos_the_figures_and_tokens_are_the_same(job: Callable[..., Path], tmp_path: Path) -> None:
    full, bare = job(save_dir=tmp_path / "full"), job("--no-videos", save_dir=tmp_path / "bare")
    assert read(full)["clips"] == read(bare)["clips"] and not list(bare.rglob("*.mp4"))
    assert (full / "report.html").read_bytes() == (bare / "report.html").read_bytes()
    for clip in read(full)["clips"]:
        one, other = (f / "clips" / clip["name"] / "tokens.safetensors" for f in (full, bare))
        assert one.read_bytes() == other.read_bytes()
    job(save_dir=tmp_path / "bare")  # the videos are made after all
    assert len(list(bare.rglob("*.mp4"))) == 15


def test_the_same_clips_at_uniform_tokens(job: Callable[..., Path], tmp_path: Path) -> None:
    """Of every clip the nearest uniform total, measured as a run with that budget measures it."""
    out = job("--compare-uniform", "--batch-size", "1", budget="fixed:4,2,2,4")
    metrics = read(out)
    uniform = read(job("--batch-size", "1", save_dir=tmp_path / "uniform", budget="uniform:2"))
    assert [clip["uniform_tokens"] for clip in metrics["clips"]] == [8] * 5  # 12 lies between 8 and 16: the cheaper
    for ours, theirs in zip(metrics["clips"], uniform["clips"], strict=True):
        assert ours["uniform_psnr"] == theirs["psnr"] and ours["uniform_ssim"] == theirs["ssim"]
    assert metrics["mean_uniform"]["uniform_psnr"] == uniform["mean"]["psnr"]
    page = (out / "report.html").read_text()
    assert "<small>uniform</small>" in page and "The same clips at the nearest uniform assignment: 8.0 tokens" in page


def test_special_files_are_skipped(job: Callable[..., Path], videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(videos / "a.mp4", source)
    os.mkfifo(source / "pipe.mp4")
    (source / "zero.mp4").symlink_to("/dev/zero")
    out = job(vid_path=source)
    assert len(read(out)["clips"]) == 1 and len(read(out, "skipped.json")) in (0, 2)


def test_padded_clips_are_counted(job: Callable[..., Path], capsys: Any) -> None:
    """At 4 frames a second four of the five clips repeat frames: their figures are also given without them."""
    out = job("--fps", "4")
    metrics = read(out)
    padding, whole = metrics["padding"], [clip for clip in metrics["clips"] if not clip["num_padded"]]
    assert padding["num_clips"] == 5 - len(whole) == 4 and padding["num_frames"] == 8 + 8 + 8 + 13
    assert padding["mean_without"]["psnr"] == pytest.approx(np.mean([clip["psnr"] for clip in whole]))
    sentence = "4 of 5 clip(s) are padded: 37 of their 64 frames repeat the last frame of a short video. Without them:"
    assert sentence in capsys.readouterr().out and sentence in (out / "report.html").read_text()


def test_all_clips_and_fps_and_max_clips(job: Callable[..., Path], tmp_path: Path) -> None:
    every = read(job("--all-clips", save_dir=tmp_path / "every"))
    starts = [c["start"] for c in every["clips"] if c["file"] == "long.mp4"]
    assert starts == [0, 16] and every["frames_left_out"] == 8  # it has 40 frames
    assert len(read(job("--max-clips", "2", save_dir=tmp_path / "two"))["clips"]) == 2
    slow = read(job("--fps", "4", save_dir=tmp_path / "slow"))["clips"]
    assert {c["file"]: c["num_padded"] for c in slow}["a.mp4"] == 8 and slow[0]["fps"] == 4
