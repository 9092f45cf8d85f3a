"""Manifests: read whatever spreadsheets make of them, built from the true layouts, checked, and prepared."""

from __future__ import annotations

import csv
import hashlib
import runpy
import sys
import tracemalloc
from collections import deque
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.common.errors import UserError
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.datasets import ASCII_ORDER, OFFICIAL_ORDER
from tokenizer.data.manifest import CheckRule, check_manifest, collect
from tokenizer.data.prepare import PrepareRule, prepare, prepare_video
from tokenizer.data.safe_decode import timing_of
from tokenizer.data.video_io import probe, write_video
from tokenizer.data.video_table import ManifestRow, read_rows, write_rows

NAME = st.text(st.characters(exclude_characters="\0\r", exclude_categories=("Cs",)), min_size=1, max_size=12)


def video(path: Path, num: int = 20, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.random.default_rng(seed).integers(0, 255, (num, 40, 60, 3), dtype=np.uint8), 10)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["manifest", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("tokenizer.data.manifest", run_name="__main__")
    return int(end.value.code or 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NAME, NAME), min_size=1, max_size=5))
def test_any_name_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("m") / "m.csv"
    assert write_rows(path, (ManifestRow(*pair) for pair in pairs)) == len(pairs)
    assert [(row.path, row.label) for row in read_rows(path)] == pairs


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_rows_or_one_clear_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("m") / "m.csv"
    path.write_bytes(b"path,label\n" + data)
    try:
        assert all(row.path for row in read_rows(path))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_forms_of_lists(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    for data in (b"\xef\xbb\xbfpath,label\r\na.mp4,x\r\n\r\n", b"path,action,label\na.mp4,x,3\n"):
        path.write_bytes(data)
        assert [(row.path, row.label) for row in read_rows(path)] == [("a.mp4", "x")]
        assert build_dataset(DataConfig(sources=[str(path)])).names == ["a.mp4"]
    path.write_bytes(b"a.mp4\nb.avi\n")
    assert [row.path for row in read_rows(path)] == ["a.mp4", "b.avi"]
    for data, word in (
        (b"name\nx\n", "header"),
        (b'path\n"a\n', "quote"),
        (b"path\na,b\n", "line 2"),
        (b"path\n", "row"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=word):
            list(read_rows(path))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NAME, NAME), min_size=1, max_size=4),
    st.permutations(["path", "label", "other"]),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_any_spelling_of_a_list_is_the_same_list(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[str, str]],
    columns: list[str],
    mark: bool,
    line_end: str,
    quoting: Literal[0, 1],
) -> None:
    """Byte order mark, order of columns, upper case in the header, line ends, quotes: as spreadsheets write them."""
    path = tmp_path_factory.mktemp("m") / "m.csv"
    with open(path, "w", newline="", encoding="utf-8-sig" if mark else "utf-8") as file:
        out = csv.writer(file, lineterminator=line_end, quoting=quoting)
        out.writerow([column.title() for column in columns])
        for pair in pairs:
            cells = dict(zip(("path", "label"), pair, strict=True)) | {"other": "x, y"}
            out.writerow([cells[column] for column in columns])
    assert [(row.path, row.label) for row in read_rows(path)] == pairs


def test_a_million_rows_in_bounded_memory(tmp_path: Path) -> None:
    peaks = []
    for num_rows in (5_000, 25_000):
        write_rows(tmp_path / "m.csv", (ManifestRow(f"{i:07d}.mp4", "x") for i in range(num_rows)))
        tracemalloc.start()
        assert sum(1 for _ in read_rows(tmp_path / "m.csv")) == num_rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 2**20, "memory does not grow with the rows"
    (tmp_path / "m.csv").write_text("path\n" + "".join(f"{i:07d}.mp4\n" for i in range(1_000_000)))
    last = deque(read_rows(tmp_path / "m.csv"), maxlen=1)[0]
    assert (last.path, last.line) == ("0999999.mp4", 1_000_001)


def test_class_orders() -> None:
    assert len(set(OFFICIAL_ORDER)) == 101
    assert (ASCII_ORDER.index("JumpRope"), ASCII_ORDER.index("HammerThrow")) == (46, 34)
    moved = [name for name in ASCII_ORDER if ASCII_ORDER.index(name) != OFFICIAL_ORDER.index(name)]
    assert sorted(moved) == ["HammerThrow", "Hammering", "JumpRope", "JumpingJack"]


def test_build_from_true_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "UCF-101"
    for name in ("YoYo/v_YoYo_g08_c01.avi", "HandstandPushups/v_HandStandPushups_g08_c02.avi"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    listed = [
        "YoYo/v_YoYo_g08_c01.avi 101",
        "HandstandPushups/v_HandstandPushups_g08_c02.avi 37",
        "Punch/v_Punch_g09_c01.avi 71",
    ]
    (lists / "trainlist01.txt").write_text("\r\n".join(listed))
    out = tmp_path / "m.csv"
    assert run(monkeypatch, "build", "--dataset", "ucf101", "--root", root, "--out", out) == 0
    assert [row.label for row in read_rows(out)] == ["YoYo", "HandstandPushups"]
    assert Path(f"{out}.missing.txt").read_text() == "Punch/v_Punch_g09_c01.avi\n"

    k600 = tmp_path / "val"
    k600.mkdir()
    (k600 / "-abc_000004_000014.mp4").touch()
    (tmp_path / "v.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nyoga,-abc,4,14,val\nyoga,gone,1,11,val\n"
    )
    words = ("--dataset", "k600", "--root", k600, "--list", tmp_path / "v.csv", "--out", out)
    assert run(monkeypatch, "build", *words) == 0
    assert [(row.path, row.label) for row in read_rows(out)] == [("val/-abc_000004_000014.mp4", "yoga")]


def test_build_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in/a class/x.mp4", "in/b/deep/y.MKV", "in/flat.avi", "in/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    out = tmp_path / "m.csv"
    assert run(monkeypatch, "build", "--dataset", "folder", "--root", tmp_path / "in", "--out", out, "--sha256") == 0
    rows = list(read_rows(out))
    expected = [("in/a class/x.mp4", "a class"), ("in/b/deep/y.MKV", "deep"), ("in/flat.avi", "")]
    assert [(row.path, row.label) for row in rows] == expected
    assert rows[2].sha256 == hashlib.sha256(b"in/flat.avi").hexdigest()

    (tmp_path / "in/0001_0050").mkdir()
    (tmp_path / "in/0001_0050/7.mp4").touch()
    (tmp_path / "list.csv").write_text("videoid,page_dir,name\n7,0001_0050,a cat\n8,0001_0050,gone\n")
    words = ("--dataset", "webvid", "--root", tmp_path / "in", "--list", tmp_path / "list.csv", "--out", out)
    assert run(monkeypatch, "build", *words) == 0
    assert [row.path for row in read_rows(out)] == ["in/0001_0050/7.mp4"]
    assert Path(f"{out}.missing.txt").read_text() == "8\n"


def test_overlap_by_name_and_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K600: the same clip under train/ and val/; and a copy under another name."""
    for name in ("train/a_1_11.mp4", "val/a_1_11.mp4", "val/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("the same bytes" if "b" in name else name)
    (tmp_path / "train/copy.mp4").write_text("the same bytes")
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    for split, out in (("train", train), ("val", val)):
        words = ("build", "--dataset", "folder", "--root", tmp_path / split, "--out", out, "--sha256")
        assert run(monkeypatch, *words) == 0

    def overlaps(**rule: bool) -> list[str]:
        checked = check_manifest(val, CheckRule(decode="none", **rule), train)
        return [row.path for row, problems in checked for problem in problems if problem.kind == "overlap"]

    assert overlaps() == []
    assert overlaps(same_name=True) == ["val/a_1_11.mp4"]
    assert overlaps(sha256=True) == ["val/b.mp4"]
    assert run(monkeypatch, "check", val, "--against", train, "--same-name", "--decode", "none") == 1
    assert run(monkeypatch, "check", val, "--same-name") == 2


def test_check_finds_each_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video(tmp_path / "good.mp4")
    video(tmp_path / "short.mp4", num=5)
    (tmp_path / "bad.mp4").write_text("words")
    other = tmp_path / "other.csv"
    write_rows(other, [ManifestRow("good.mp4")])
    manifest = tmp_path / "m.csv"
    write_rows(manifest, map(ManifestRow, ("good.mp4", "./good.mp4", "short.mp4", "bad.mp4", "gone.mp4")))
    counts = collect(check_manifest(manifest, CheckRule(), other)).counts
    assert counts == {"duplicate": 1, "too short": 1, "unreadable": 1, "missing": 1, "overlap": 2}
    assert run(monkeypatch, "check", manifest, "--decode", "none", "--json") == 1
    assert run(monkeypatch, "check", other) == 0
    assert run(monkeypatch, "check", tmp_path / "none.csv") == 2


def test_check_finds_pictures_that_the_header_promises(tmp_path: Path) -> None:
    path = tmp_path / "whole.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "bgr0"
        for _ in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((24, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        end = list(container.streams.video[0].index_entries)[30].pos
    (tmp_path / "cut.avi").write_bytes(path.read_bytes()[:end])
    write_rows(tmp_path / "m.csv", map(ManifestRow, ("whole.avi", "cut.avi")))
    checked = check_manifest(tmp_path / "m.csv", CheckRule(decode="all"))
    found = [(p.row.path, p.kind, p.detail) for _, problems in checked for p in problems]
    assert found == [("cut.avi", "truncated", "the header counts 40 pictures, the file holds 30")]


def test_prepared_videos_keep_every_frame(tmp_path: Path) -> None:
    copy = tmp_path / "copy.mp4"
    prepare_video(video(tmp_path / "a.mp4", num=19), copy, PrepareRule(short_side=20))
    info = probe(copy)
    assert (info.num_frames, info.height, info.width, info.fps) == (19, 20, 30, 10)
    names = [rule.name_of(copy, content) for rule in (PrepareRule(), PrepareRule(fps=3)) for content in ("1-a", "1-b")]
    assert len(set(names)) == 4


def test_a_prepared_video_keeps_the_time_of_every_picture(tmp_path: Path) -> None:
    """A variable rate, as phones write it; and a constant one that is no round number."""
    pts = np.cumsum(np.random.default_rng(0).integers(20, 70, 25))
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 40, 60, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in (pts - pts[0]).tolist():
            frame = av.VideoFrame.from_ndarray(np.full((40, 60, 3), time % 255, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    write_video(tmp_path / "steady.mp4", np.zeros((9, 40, 60, 3), np.uint8), 30000 / 1001)
    for name in ("phone.mp4", "steady.mp4"):
        assert prepare_video(tmp_path / name, tmp_path / f"copy of {name}", PrepareRule(short_side=20)) == []
        source, copy = (timing_of(path) for path in (tmp_path / name, tmp_path / f"copy of {name}"))
        assert source is not None and copy is not None and source.is_constant() == (name == "steady.mp4")
        before, after = ([Fraction(t * each.tick[0], each.tick[1]) for t in each.pts] for each in (source, copy))
        assert before == after
    assert copy.rate == (30000, 1001)


def test_a_changed_source_is_prepared_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "m.csv", [ManifestRow("a.mp4"), ManifestRow("none.mp4")])
    listed = []
    for seed in (0, 1):
        video(tmp_path / "a.mp4", seed=seed)
        done, skipped = prepare(tmp_path / "m.csv", tmp_path / "out", PrepareRule(), num_threads=1)
        assert done == 1 and [entry["path"] for entry in skipped] == ["none.mp4"]
        listed += [row.path for row in read_rows(tmp_path / "out/manifest.csv")]
    assert len(set(listed)) == 2


def test_paths_upwards_are_read_and_formulas_are_disarmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list may name videos outside its folder; nothing is ever written at a path that a list names."""
    video(tmp_path / "videos/a.mp4")
    (tmp_path / "lists/deep").mkdir(parents=True)
    manifest = tmp_path / "lists/deep/m.csv"
    write_rows(manifest, [ManifestRow("../../videos/a.mp4"), ManifestRow('=HYPERLINK("x")'), ManifestRow("/dev/zero")])
    dataset = build_dataset(DataConfig([str(manifest)], num_frames=4, size=16))
    assert dataset.get_this(0).name == "../../videos/a.mp4"
    before = set(tmp_path.rglob("*"))
    prepare(manifest, tmp_path / "out", PrepareRule(), num_threads=1)
    new = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "out") for path in new)
    report = tmp_path / "report.csv"
    assert run(monkeypatch, "check", manifest, "--sha256", "--report", report) == 1
    with open(report, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["problem"], row["path"][:2]) for row in rows] == [("missing", "'="), ("unreadable", "/d")]
