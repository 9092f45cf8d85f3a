"""The main job stopped and started again: nothing is done twice, nothing is lost, nothing is mixed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_files import ENTRY, copies, frames, read

from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.work_units import only_job_in
from tokenizer.data import clip_stream
from tokenizer.data.video_io import write_video
from tokenizer.router import results
from tokenizer.router.predict import TrainedRouter


def test_a_second_run_does_nothing_again(
    job: Callable[..., Path], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in"
    shutil.copytree(videos, source)
    out = job(vid_path=source)
    first = (out / "metrics.json").read_bytes()
    decoded: list[str] = []
    original = clip_stream.decode_clips
    monkeypatch.setattr(clip_stream, "decode_clips", lambda p, *a, **k: decoded.append(p.name) or original(p, *a, **k))
    job(vid_path=source)
    assert sorted(decoded) == ["cut.mp4", "empty.mp4", "text.mp4"]  # they may have been mended
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


def test_a_changed_journal_is_refused_in_one_line(job: Callable[..., Path], tmp_path: Path) -> None:
    """Every kind of line that a hand, a bug or an attack may leave; and nothing outside of the folder is deleted."""
    out = job("--max-clips", "2")
    journal, victim = out / "clips.jsonl", tmp_path / "victim"
    shutil.copytree(out / "clips" / read(out)["clips"][0]["name"], victim)
    first, second = journal.read_text().splitlines()
    record = json.loads(first)
    changes: list[dict[str, Any]] = [
        {"psnr": 99.0}, {"psnr": "99"}, {"psnr": True}, {"psnr": None}, {"tokens": 12.0}, {"assignment": [2.0] * 4},
        {"assignment": [True] * 4}, {"name": "../../victim"}, {"name": None}, {"start": -1}, {"more": 1},
    ]  # fmt: skip
    lines = [json.dumps(record | change) for change in changes]
    lines += [first.replace(f'"psnr": {record["psnr"]}', '"psnr": NaN'), "[" * 3000 + "]" * 3000, "null", "{", "7"]
    for line in lines:
        assert line != first
        journal.write_text(f"{second}\n{line}\n")
        with pytest.raises(UserError, match=r"clips.jsonl, line 2: .*--overwrite") as refused:
            job("--max-clips", "2")
        assert "\n" not in str(refused.value)
    journal.write_text(json.dumps(record | {"name": "../../victim"}) + "\n")
    job("--max-clips", "2", "--overwrite")
    assert (victim / "tokens.safetensors").is_file() and len(read(out)["clips"]) == 2


def test_a_second_job_in_the_folder_is_refused(job: Callable[..., Path]) -> None:
    out = job("--max-clips", "1")
    before = (out / "clips.jsonl").read_bytes()
    with only_job_in(out, "wait"), pytest.raises(UserError, match="another job is writing here; wait for it, or give"):
        job("--overwrite")
    assert (out / "clips.jsonl").read_bytes() == before
    job("--max-clips", "2")


def test_average_asks_the_router_once(
    job: Callable[..., Path], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and price are stored: another machine, whose router rounds differently, resumes with the same ones."""
    source = tmp_path / "in"
    shutil.copytree(videos, source)
    decoded: list[str] = []
    original = clip_stream.decode_clips
    monkeypatch.setattr(clip_stream, "decode_clips", lambda p, *a, **k: decoded.append(p.name) or original(p, *a, **k))
    out = job(vid_path=source, budget="average:14")
    assert decoded.count("long.mp4") == 1, "the pass that scores hands its clips on"
    first = read(out)

    monkeypatch.setattr(TrainedRouter, "scores", lambda *_: pytest.fail("the router was asked again"))
    shutil.rmtree(next((out / "clips").glob("short*")))
    decoded.clear()
    job(vid_path=source, budget="average:14")
    assert decoded.count("long.mp4") == 0 and decoded.count("short.mp4") == 1
    again = read(out)
    assert again["price"] == first["price"] and again["clips"] == first["clips"]

    write_video(source / "new.mp4", frames(2, seed=8), 8)
    with pytest.raises(UserError, match="the videos have changed since; give another --save_dir, or --overwrite"):
        job(vid_path=source, budget="average:14")
    monkeypatch.undo()


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
    def until_full(path: Path, *rest: Any, **options: Any) -> None:
        if "long" in str(path) and path.name == "reconstruction.mp4":  # in the middle of the third clip
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_video(path, *rest, **options)

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
    assert "Traceback" not in said and "rerun the same command to resume" in said.splitlines()[-1]
    stopped = read(out)
    num_done = len(stopped["clips"])
    assert 2 <= num_done < 24 and not stopped["complete"] and f"{num_done} clip(s)" in printed
    assert "The run was stopped" in (out / "report.html").read_text()

    job("--batch-size", "1", vid_path=source)
    whole = read(out)
    assert whole["complete"] and whole["clips"][:num_done] == stopped["clips"] and len(whole["clips"]) == 24
    assert not list((out / "clips").glob(".*")), "nothing half-written stays"
