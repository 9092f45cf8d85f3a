"""Names, JSON and fields that come from files: what is accepted, and the one line for what is not."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoregressive import token_archive
from evaluations.report import find_runs
from evaluations.shards import read_result
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.schema import check_fields, check_inside, child, parse_json, read_json, remove_child
from tokenizer.common.work_units import claim_folder
from tokenizer.data.clip_store import ClipStore
from tokenizer.training.logger import ReferenceCurve
from tokenizer.training.trainer import RunConfig, TrainState, follow_schedule, note_unreadable
from tokenizer.viz import plots, report


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../a", "/etc", ".hidden", "a\\b\n", "a\x00", "x" * 300])
def test_a_name_from_a_file_is_one_component(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a name inside") as refused:
        child(tmp_path, name, "list.json", "make it again")
    assert "\n" not in str(refused.value)


def test_good_names(tmp_path: Path) -> None:
    name = "a_clip-0f.v2_000016"
    assert child(tmp_path, name, "list.json", "make it again") == tmp_path / name
    assert str(check_inside("shards/000000.safetensors", "list.json", "")) == "shards/000000.safetensors"
    for path in ("shards/../../x", "/etc/passwd", "a//b", ""):
        with pytest.raises(UserError, match="is not a path inside the folder"):
            check_inside(path, "list.json", "make it again")


def test_only_a_direct_child_is_deleted_and_no_link_is_followed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "clips", tmp_path / "elsewhere"
    (folder / "own").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "link").symlink_to(elsewhere)
    for name in ("own", "link", "absent"):
        remove_child(folder, name)
    assert list(folder.iterdir()) == [] and elsewhere.is_dir()
    with pytest.raises(UserError):
        remove_child(folder, "../elsewhere")
    assert elsewhere.is_dir()


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", b"\xff"])
def test_json_that_is_none_is_one_line(text: str | bytes) -> None:
    with pytest.raises(UserError, match="list.json: damaged.*; make it again") as refused:
        parse_json(text, "list.json", "make it again")
    assert "\n" not in str(refused.value)


def test_fields_are_checked_and_the_first_wrong_one_is_named() -> None:
    fields = {"n": int, "q": float | None, "l": list[int]}
    for good in ({"n": 3, "q": None, "l": [0, 1]}, {"n": -1, "q": 2, "l": []}, {"n": 0, "q": 0.5, "l": [1], "more": 2}):
        assert check_fields(good, fields, "x.json", "make it again") == good
    wrong = {"n": [3.0, True, "3", None], "q": [float("nan"), False, "0"], "l": [[1.0], [True], 3, None]}
    for key, values in wrong.items():
        for value in values:
            with pytest.raises(UserError, match=f"x.json: {key} = .*; make it again"):
                check_fields({"n": 3, "q": None, "l": [0], key: value}, fields, "x.json", "make it again")
    with pytest.raises(UserError, match="lacks 'q'"):
        check_fields({"n": 3, "l": [0]}, fields, "x.json", "make it again")
    with pytest.raises(UserError, match="expected an object"):
        check_fields([], fields, "x.json", "make it again")


def test_sigterm_ends_an_entry_like_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            run_cli(lambda: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 130 and "finished work is kept" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ENOENT, errno.EEXIST])
def test_a_path_that_cannot_be_used_is_one_line(fault: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise OSError(fault, os.strerror(fault), "/some/" + 400 * "x")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and len(said) < 400 and os.strerror(fault) in said


JUNK = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"x"',
    b"[[]]",
    b"\xff\xfe",
    b"[" * 100_000,
    b"[" * 60 + b"]" * 60,
    b'{"a": NaN}',
]
JUNK += [b'{"step": 1e999}', b'{"step": "1"}', b'{"card": []}', b'{"clips": {}}', b"9" * 5000]


ACCEPTED = [b'{"step": "1"}', b'{"card": []}', b'{"clips": {}}']  # objects, by what demands no more


def _archive(path: Path) -> None:
    token_archive.TokenArchive(path.parent)


def _reference(path: Path) -> None:
    ReferenceCurve(str(path))


def _changes(path: Path) -> None:
    follow_schedule(path.parent, RunConfig(dir=str(path.parent)), cast(TrainState, None))


READERS: dict[str, Callable[[Path], object]] = {
    "archive.json": _archive,
    "metrics.jsonl": _reference,
    "curves/metrics.jsonl": lambda path: plots.read_curves({"run": path}, []),
    "schedule.json": _changes,
    "out/metrics.json": lambda path: read_result(path.parent),
    "found/metrics.json": lambda path: find_runs([path.parent]),
    "page/metrics.json": lambda path: report.write_report(path.parent),
    "made_from.json": lambda path: claim_folder(path.parent, {}),
    "config.json": lambda path: read_json(path, {"model_type": str}, "fetch it again"),
    "store.safetensors": lambda path: ClipStore(path),
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_of_any_kind_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for text in JUNK:
        path.write_bytes(text)
        if name.endswith("safetensors"):
            path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(9))
        elif name.endswith("jsonl"):
            path.write_bytes(text + b"\n")
        if text in {"made_from.json": ACCEPTED, "schedule.json": [b"[]"]}.get(name, ()):
            continue  # nothing that they must hold
        with pytest.raises(UserError) as refused:
            READERS[name](path)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    with pytest.raises(UserError, match="not a regular file|no such file|no finished"):
        READERS[name](path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_text_is_read_or_refused_in_one_line(data: st.DataObject) -> None:
    """A good file with bytes changed, and values of any shape."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    )
    text = bytearray(json.dumps({"step": data.draw(values), "more": data.draw(values)}).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    fields = {"step": float, "more": {"name": str, "all": [{"n": int}]} if data.draw(st.booleans()) else object}
    try:
        found = check_fields(parse_json(bytes(text), "x.json", "go on"), fields, "x.json", "go on")
        assert math.isfinite(found["step"])
    except UserError as error:
        assert str(error).startswith("x.json") and str(error).endswith("; go on") and "\n" not in str(error)


def test_notes_of_damaged_files_are_added_to_whatever_lies_there(tmp_path: Path) -> None:
    """A training run does not end over its list of unreadable files."""
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(b'{"file": "a", "reason": "x"}\n[]\n{"file": 3}\n\xff\n{"fi\n')
    note_unreadable(tmp_path, SimpleNamespace(unreadable={"a": "x", "b": "y"}))
    assert path.read_bytes().endswith(b'{"fi\n{"file": "b", "reason": "y"}\n')
