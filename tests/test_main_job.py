"""The main job end to end on real files with tiny random weights: outputs, budgets, going on, and what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.image_quality import psnr
from tokenizer.data.video_io import iter_clips, to_model_range, write_video
from tokenizer.presets import build_tokenizer, load_tokenizer
from tokenizer.router import clip_source, report, results
from tokenizer.router.model import Router, RouterConfig
from tokenizer.router.reconstruct import motion_figures, pick_perceptual
from tokenizer.router.summary import codebook_use, rank_correlation
from tokenizer.tokens import VideoTokens

ROOT = Path(__file__).parents[1]
ENTRY = ROOT / "tokenizer/router/reconstruction_qual_with_router.py"
LEVELS = [2, 4, 8]  # of VQ_debug: 8 to 32 tokens in 4 blocks
ROUTER = RouterConfig(size=32, levels=LEVELS, layers=1, width=32, heads=2)
JOB = runpy.run_path(str(ENTRY), run_name="main_job")
LATIN_1 = b"caf\xe9 \xfc.mp4"  # a name that is not UTF-8


def frames(speed: int, num: int = 16, seed: int = 0) -> np.ndarray:
    """A textured square that slides `speed` pixels a frame over noise; uint8 [T, 36, 44, 3]."""
    noise = np.random.default_rng(seed).integers(0, 90, (36, 44, 3), dtype=np.uint8)
    video = np.stack([noise] * num)
    for t in range(num):
        left = (speed * t) % 30
        video[t, 10:24, left : left + 14] = 200
    return video


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


def read(folder: Path, name: str = "metrics.json") -> Any:
    return json.loads((folder / name).read_text())


def without_router() -> dict[str, None]:
    return {"router_config": None, "router_ckpt": None}


def copies(folder: Path, num: int) -> Path:
    folder.mkdir()
    for i in range(num):
        write_video(folder / f"{i:02d}.mp4", frames(i % 4, seed=i), 8)
    return folder


# --- what comes out ------------------------------------------------------------------------------------------------


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
    assert page.count("data:image/jpeg;base64,") == 3 and "3 of 5, evenly spread" in page


def test_names_cannot_reach_the_page_as_html(job: Callable[..., Path], videos: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "in"
    hostile.mkdir()
    shutil.copy(videos / "a.mp4", hostile / "<img src=x onerror=alert(1)>.mp4")
    page = (job(vid_path=hostile) / "report.html").read_text()
    assert "<img" not in page and "&lt;img src=x" in page


def test_a_perceptual_network_or_the_reason_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise UserError(f"{name} is absent")

    monkeypatch.setattr("tokenizer.router.reconstruct.load_perceptual", absent)
    cpu = torch.device("cpu")
    assert pick_perceptual("auto", cpu) == (None, "lpips_vgg is absent; stlpips_alex is absent")
    with pytest.raises(UserError, match="stlpips_vgg is absent"):
        pick_perceptual("stlpips_vgg", cpu)


def test_lpips_is_a_number_or_null_with_a_reason(job: Callable[..., Path]) -> None:
    metrics = read(job("--max-clips", "2", perceptual="auto"))
    values = [metrics["mean"]["lpips"], *(clip["lpips"] for clip in metrics["clips"])]
    if metrics["lpips_backbone"] is None:  # without the extra [offline]
        assert values == [None] * 3 and "stlpips_alex" in metrics["lpips_reason"]
    else:
        assert metrics["lpips_reason"] is None and all(value > 0 for value in values)


def test_motion_of_blocks() -> None:
    video = np.zeros((8, 4, 4, 3), np.uint8)
    video[4:] = 100  # a cut between the two blocks belongs to the second
    figures = motion_figures(video, 2)
    assert figures["block_motion"] == [0.0, 25.0] and figures["motion"] == pytest.approx(100 / 7)


# --- budgets -------------------------------------------------------------------------------------------------------


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


def test_all_clips_and_fps_and_max_clips(job: Callable[..., Path], tmp_path: Path) -> None:
    every = read(job("--all-clips", save_dir=tmp_path / "every"))["clips"]
    assert [c["start"] for c in every if c["file"] == "long.mp4"] == [0, 16]  # 40 frames; a rest of 8 is dropped
    assert len(read(job("--max-clips", "2", save_dir=tmp_path / "two"))["clips"]) == 2
    slow = read(job("--fps", "4", save_dir=tmp_path / "slow"))["clips"]
    assert {c["file"]: c["num_padded"] for c in slow}["a.mp4"] == 8 and slow[0]["fps"] == 4


# --- going on ------------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_again(
    job: Callable[..., Path], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    shutil.copytree(videos, source)
    out = job(vid_path=source)
    first = (out / "metrics.json").read_bytes()
    decoded: list[str] = []
    original = clip_source.decode_clips
    monkeypatch.setattr(clip_source, "decode_clips", lambda p, *a, **k: decoded.append(p.name) or original(p, *a, **k))
    job(vid_path=source)
    assert decoded == ["cut.mp4", "empty.mp4", "text.mp4"]  # they may have been mended
    assert (out / "metrics.json").read_bytes() == first

    write_video(source / "a.mp4", frames(2, seed=9), 8)  # replaced
    write_video(source / "new.mp4", frames(2, seed=8), 8)
    shutil.rmtree(next((out / "clips").glob("short*")))
    decoded.clear()
    job(vid_path=source)
    assert sorted(set(decoded) - {"cut.mp4", "empty.mp4", "text.mp4"}) == ["a.mp4", "new.mp4", "short.mp4"]
    assert len(read(out)["clips"]) == 6


def test_other_settings_are_not_mixed(job: Callable[..., Path]) -> None:
    out = job("--max-clips", "2")
    with pytest.raises(UserError, match=r"budget: 'router' / 'tokens:12'.*--overwrite"):
        job(budget="tokens:12")
    (out / "of the user.txt").touch()
    job("--overwrite", "--max-clips", "1", budget="tokens:12")
    assert len(list((out / "clips").iterdir())) == 1 and read(out)["budget"] == "tokens:12"
    assert (out / "of the user.txt").exists()


def test_a_line_cut_short_is_done_again(job: Callable[..., Path]) -> None:
    out = job("--max-clips", "2")
    before, journal = read(out), out / "clips.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    job("--max-clips", "2")
    assert read(out) == before and len(journal.read_text().splitlines()) == 2


def test_own_results_are_no_input(job: Callable[..., Path], videos: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(videos, here)
    job(vid_path=here, save_dir=here)
    job(vid_path=here, save_dir=here)
    assert len(read(here)["clips"]) == 5
    with pytest.raises(UserError, match="only results of this very job"):
        job(vid_path=here / "clips", save_dir=here)


def test_a_full_disk_keeps_what_is_done(
    job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    written: list[Path] = []

    def until_full(path: Path, *rest: Any) -> None:
        written.append(path)
        if len(written) > 7:  # three videos a clip: in the middle of the third
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_video(path, *rest)

    monkeypatch.setattr(results, "write_video", until_full)
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: job("--batch-size", "1") and None)
    assert stop.value.code == 2 and "the disk is full" in capsys.readouterr().err
    assert len((tmp_path / "out/clips.jsonl").read_text().splitlines()) == 2
    monkeypatch.undo()


def test_ctrl_c_keeps_what_is_done(job: Callable[..., Path], weights: dict[str, str], tmp_path: Path) -> None:
    source, out = copies(tmp_path / "in", 24), tmp_path / "out"
    words = [word for pair in weights.items() for word in pair]
    command = [sys.executable, str(ENTRY), "--vid_path", str(source), "--save_dir", str(out), *words]
    command += ["--perceptual", "none", "--batch-size", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        journal = out / "clips.jsonl"
        until = time.monotonic() + 60
        while time.monotonic() < until and not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        printed, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert "Traceback" not in said and "the same command goes on" in said.splitlines()[-1]
    stopped = read(out)
    num_done = len(stopped["clips"])
    assert 2 <= num_done < 24 and not stopped["complete"] and f"{num_done} clip(s)" in printed
    assert "The run was stopped" in (out / "report.html").read_text()

    job("--batch-size", "1", vid_path=source)
    whole = read(out)
    assert whole["complete"] and whole["clips"][:num_done] == stopped["clips"] and len(whole["clips"]) == 24
    assert not list((out / "clips").glob(".*")), "nothing half-written stays"


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_clear_line(job: Callable[..., Path], weights: dict[str, str], tmp_path: Path) -> None:
    empty = tmp_path / "empty folder"
    empty.mkdir()
    pickled = tmp_path / "old.pt"
    torch.save({}, pickled)
    other_config = tmp_path / "other.yaml"
    other = to_dict(build_tokenizer("VQ_debug").config) | {"codebook_size": 128}
    other_config.write_text(json.dumps({"model": other}))
    foreign = RouterConfig(size=32, levels=[2, 4], layers=1, width=32, heads=2)
    foreign_path = tmp_path / "foreign.safetensors"
    save_model(foreign_path, Router(foreign).state_dict(), {"model": to_dict(foreign)}, {"kind": "router"})
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        ([], {"vid_path": tmp_path / "nowhere"}, "nowhere: no such file or folder"),
        ([], {"vid_path": empty}, "empty folder: no video"),
        ([], {"vq_ckpt": tmp_path / "none.safetensors"}, "none.safetensors: no such model file"),
        ([], {"vq_ckpt": pickled}, "pickled weights are refused"),
        ([], {"vq_ckpt": weights["--router_ckpt"]}, "not a tokenizer"),
        ([], {"tok_config": other_config}, r"other.yaml.*tok.safetensors.*codebook_size: 128 / 64"),
        ([], {"router_config": None, "router_ckpt": foreign_path}, r"levels \[2, 4\].*levels \[2, 4, 8\]"),
        ([], {"router_ckpt": None}, "--router_config without --router_ckpt"),
        ([], without_router(), "--budget router asks a router"),
        ([], {"budget": "tokens:7"}, "the minimum is 8 tokens"),
        ([], {"budget": "uniform:5"}, "its levels are 2, 4, 8"),
        ([], {"budget": "cheap"}, "is none of router"),
        ([], {"device": "tpu"}, "device='tpu'"),
        ([], {"perceptual": "vgg"}, "unknown perceptual distance 'vgg'"),
        (["--max-clips", "0"], {}, r"--max-clips: '0' is not a whole number of at least 1 \(see --help\)"),
        (["--fps", "fast"], {}, "--fps: 'fast' is not a number above 0"),
        (["--all_clip"], {}, "unrecognized arguments: --all_clip"),
    ]
    for flags, changes, pattern in cases:
        with pytest.raises(UserError, match=pattern) as caught:
            job(*flags, **changes)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "a mistake found at the start leaves no folder behind"


def test_nothing_readable_is_an_error(job: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "bad.mp4").write_text("no video")
    for budget in ("router", "average:14"):
        out = tmp_path / budget.partition(":")[0]
        with pytest.raises(UserError, match="none of the 1 videos could be read.*bad.mp4"):
            job(vid_path=source, save_dir=out, budget=budget)
        assert [each["file"] for each in read(out, "skipped.json")] == ["bad.mp4"]
        assert not (out / "metrics.json").exists()


def test_run_by_path_and_its_exit_code(weights: dict[str, str], tmp_path: Path) -> None:
    """From another folder, as in the README; a wrong path is one line and 2."""
    command = [sys.executable, str(ENTRY), "--vid_path", "nowhere", "--save_dir", "out", "--vq_ckpt", "none"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: nowhere: no such file or folder; give a video file or a folder of videos\n"


# --- small parts ---------------------------------------------------------------------------------------------------


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
