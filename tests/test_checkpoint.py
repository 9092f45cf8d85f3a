"""Files on disk: equal bytes for equal models, strict loading, damage found, a full disk that costs nothing."""

import errno
import json
import logging
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tokenizer.common import checkpoint
from tokenizer.common.checkpoint import (
    Checkpoint,
    CheckpointStore,
    atomic_write,
    file_sha256,
    load_strict,
    read_card,
    read_model,
    save_model,
)
from tokenizer.common.errors import UserError, run_cli

CONFIG = {"model": {"width": 4, "lr": 1e-06}}


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((4, 3), value), "bias": torch.arange(4.0)}


def filled(folder: Path, *steps: int, keep_last: int = 2) -> CheckpointStore:
    store = CheckpointStore(folder, keep_last)
    for step in steps:
        store.save(Checkpoint(step, {"model": tensors(step), "ema": tensors(-step)}, {"note": "x"}, CONFIG))
    return store


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_model_goes_round(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(path, tensors(), CONFIG, {"kind": "toy"})
    file = read_model(path)
    assert file.config == CONFIG and file.card == {"kind": "toy"} and file.sha256 == file_sha256(path)
    assert torch.equal(file.tensors["weight"], tensors()["weight"])
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_equal_models_are_equal_bytes(tmp_path: Path) -> None:
    sums = set()
    for number in range(8):
        save_model(tmp_path / f"{number}.safetensors", tensors(), CONFIG, {"kind": "toy", "step": "1"})
        sums.add(file_sha256(tmp_path / f"{number}.safetensors"))
    assert len(sums) == 1


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.safetensors"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: pickled weights are refused because .* convert"):
        read_model(tmp_path / name)


def test_damaged_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_model(path, tensors(), CONFIG)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  other\n{file_sha256(path)}  m.safetensors\n")
    read_model(path)
    flip_a_byte(path)
    with pytest.raises(UserError, match=r"m\.safetensors: damaged: sha256"):
        read_model(path)
    (tmp_path / "SHA256SUMS").unlink()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"m\.safetensors: damaged or not"):
        read_model(path)
    with pytest.raises(UserError, match="no such model file"):
        read_model(tmp_path / "absent.safetensors")


def test_strict_load_lists_differences() -> None:
    with pytest.raises(UserError) as caught:
        load_strict(nn.Linear(3, 5), {"weight": torch.zeros(4, 3), "extra": torch.zeros(2)}, "F")
    message = str(caught.value)
    for part in ("F:", "missing bias (5,)", "unexpected extra (2,)", "weight is (4, 3), the model has (5, 3)"):
        assert part in message


def test_store_goes_round_and_prunes(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2, 3)
    latest = store.load_latest()
    assert latest is not None and latest.step == 3 and latest.state == {"note": "x"} and latest.config == CONFIG
    assert torch.equal(latest.groups["ema"]["weight"], tensors(-3)["weight"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000002", "00000003"]
    assert CheckpointStore(tmp_path / "nothing").load_latest() is None


def test_step_is_in_the_file_not_in_the_name(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2)
    (tmp_path / "00000001").rename(tmp_path / "99999999")
    latest = store.load_latest()
    assert latest is not None and latest.step == 2


@pytest.mark.parametrize("part", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_newest_falls_back_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str, damage: str
) -> None:
    store = filled(tmp_path, 1, 2)
    file = tmp_path / "00000002" / part
    if damage == "flip":
        flip_a_byte(file)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        latest = store.load_latest()
    assert latest is not None and latest.step == 1
    assert "00000002 is damaged" in caplog.text
    # the run goes on from step 1: the damaged one gives way and the good ones stay
    filled(tmp_path, 2, keep_last=1)
    latest = store.load_latest()
    assert latest is not None and latest.step == 2
    assert [p.name for p in tmp_path.iterdir()] == ["00000002"]


def test_a_good_one_is_not_pruned_for_a_later_damaged_one(tmp_path: Path) -> None:
    filled(tmp_path, 10, 30)
    flip_a_byte(tmp_path / "00000030" / "model.safetensors")
    latest = filled(tmp_path, 20, keep_last=1).load_latest()
    assert latest is not None and latest.step == 20


def test_all_damaged_stops(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    flip_a_byte(tmp_path / "00000001" / "ema.safetensors")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        store.load_latest()


def test_run_folder_gives_final_else_newest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither"):
        read_model(tmp_path)
    filled(tmp_path / "checkpoints", 1, 2)
    found = read_model(tmp_path)
    assert found.card == {"weights": "ema", "step": "2"} and found.tensors["weight"][0, 0] == -2
    save_model(tmp_path / "final" / "model.safetensors", tensors(7), CONFIG)
    assert read_model(tmp_path).tensors["weight"][0, 0] == 7


@pytest.mark.parametrize("moment", range(1, 6))
def test_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    store = filled(tmp_path / "c", 1)
    path = tmp_path / "m.safetensors"
    save_model(path, tensors(1), CONFIG)
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= moment:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        filled(tmp_path / "c", 2)
    calls = moment
    for write in (lambda: save_model(path, tensors(2), CONFIG), lambda: atomic_write(path, b"new")):
        with pytest.raises(OSError, match="No space"):
            write()
    monkeypatch.undo()
    latest = store.load_latest()
    assert latest is not None and latest.step == 1
    assert read_model(path).tensors["weight"][0, 0] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "m.safetensors"]
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["00000001"]


def test_a_real_write_limit_keeps_what_was_there(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            store.save(Checkpoint(2, {"model": {"weight": torch.zeros(10_000)}}, {}, CONFIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.yaml: no"), 2, "error: a.yaml: no\n"),
        (KeyboardInterrupt(), 130, "interrupted; finished work is kept\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full; finished work"),
        (OSError("49152 requested and 20352 written"), 2, "error: the disk is full; finished work"),  # np.save
        (
            OSError(errno.EROFS, "Read-only", "a\n\x1b[2J\udcff"),
            2,
            "error: a\\n\\x1b[2J\\xff: Read-only; check the path",
        ),
        (UserError("key '\ud800\x9b': no"), 2, "error: key '\\ud800\\x9b': no\n"),
    ],
)
def test_run_cli_says_one_line(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        run_cli(main)
    stderr = capsys.readouterr().err
    assert left.value.code == code and stderr.startswith(line) and stderr.count("\n") == 1


def test_a_card_is_read_from_the_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "final" / "model.safetensors"
    save_model(path, tensors(), CONFIG, {"kind": "toy", "step": "7"})
    checkpoint_run = tmp_path / "unfinished"
    filled(checkpoint_run / "checkpoints", 3)
    monkeypatch.setattr(checkpoint, "load_file", None)
    assert read_card(path) == read_card(tmp_path) == (CONFIG, {"kind": "toy", "step": "7"})
    assert read_card(checkpoint_run)[1] == {"weights": "ema", "step": "3"}
    save_file(tensors(), path)
    with pytest.raises(UserError, match=r"model\.safetensors: holds tensors but no config of ours"):
        read_card(path)
    save_file(tensors(), path, metadata={"model_card": '{"config": 1, "card": {}}'})
    for read in (read_card, read_model):
        with pytest.raises(UserError, match="its card is not one of ours"):
            read(path)
    for name in ("absent.safetensors", "m.pt"):
        (tmp_path / "m.pt").write_bytes(b"PK\x03\x04")
        with pytest.raises(UserError, match=name):
            read_card(tmp_path / name)


def test_any_flipped_byte_of_a_weights_file_shows_without_a_file_beside_it(tmp_path: Path) -> None:
    """The digest inside covers everything: tensors, names, config, padding and the digest itself."""
    path, damaged = tmp_path / "m.safetensors", tmp_path / "d.safetensors"
    save_model(path, {"weight": torch.arange(4.0), "bias": torch.ones(1)}, {"optim": {"lr": 1e-05}}, {"kind": "toy"})
    good = path.read_bytes()
    assert read_model(path).card == {"kind": "toy"}
    for place in range(len(good)):
        for bit in (0, 3, 5):
            damaged.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            with pytest.raises(UserError, match=str(damaged)):
                read_model(damaged)


def test_a_file_of_before_the_digest_is_read_with_sums_or_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "old.safetensors"
    card = json.dumps({"config": CONFIG, "card": {"kind": "toy"}}, sort_keys=True)
    save_file({"weight": torch.ones(2)}, path, metadata={"model_card": card})
    assert read_model(path).config == CONFIG and "no sha256 inside or beside it" in caplog.text
    caplog.clear()
    (tmp_path / "SHA256SUMS").write_text(f"{checkpoint.file_sha256(path)}  old.safetensors\n")
    assert read_model(path).config == CONFIG and not caplog.text


def test_a_checkpoint_holds_exactly_what_its_manifest_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path, 1)
    filled(tmp_path, 2)
    (tmp_path / "00000002" / "discriminator.safetensors").write_bytes(b"")
    latest = store.load_latest()
    assert latest is not None and latest.step == 1
    assert "00000002 is damaged (its manifest and its files differ in discriminator.safetensors)" in caplog.text
    (tmp_path / "00000001" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        store.load_latest()


def test_written_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(tmp_path / "m.safetensors", tensors(1), CONFIG)
        filled(tmp_path / "c", 1)
        atomic_write(tmp_path / "a.json", b"{}")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_sigterm_ends_a_command_as_ctrl_c_does() -> None:
    def main() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            run_cli(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 130
