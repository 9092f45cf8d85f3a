"""The main job stopped and started again: nothing is done twice, nothing is lost, nothing is mixed."""

from __future__ import annotations

import errno
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
from tokenizer.data import clip_stream
from tokenizer.data.video_io import write_video
from tokenizer.router import results


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
