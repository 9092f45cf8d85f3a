"""Names, JSON and fields that come from files: what is accepted, and the one line for what is not."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.schema import check_fields, check_inside, child, parse_json, remove_child


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


@pytest.mark.parametrize("fault", [errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
def test_a_path_that_cannot_be_used_is_one_line(fault: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise OSError(fault, os.strerror(fault), "/some/" + 400 * "x")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and len(said) < 400 and os.strerror(fault) in said
