"""Weights and resume states on disk: safetensors only, written whole or not at all, checked by sha256, loaded strictly.

A model file is one `.safetensors` with its config inside, and with a sha256 of itself: that of all its bytes, with the
digest's own 64 digits as zeros. Reading checks it, so damage shows without any file beside it. A resume state is a
folder:

    checkpoints/00000200/{model,ema,optimizer}.safetensors  state.json  manifest.json

`state.json` holds the step (never the folder's name); `manifest.json` holds the sha256 of every other file and is
written last. Both are written under a `.partial` name, synced, then renamed, so a kill leaves the old or the new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizer.common.errors import FULL_DISK, UserError, one_line
from tokenizer.common.schema import check_fields, parse_json

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

PARTIAL = ".partial"
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")
# safetensors writes several metadata keys in random order: one key keeps equal models equal in sha256
_METADATA_KEY = "model_card"
_STATE = {"step": int, "state": dict, "config": dict}  # of state.json
_MOST_BYTES = 1 << 28  # of a .json file in a checkpoint
_DIGEST_KEY = "file_sha256"
_ZEROS = "0" * 64


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A model file in memory: tensors by name, the config that builds the module, the card, and the file's sha256."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    card: dict[str, str]
    sha256: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A resume state in memory after `step` updates. `groups`: named sets of tensors, `state`: what JSON can hold."""

    step: int
    groups: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]
    config: Mapping[str, Any]


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def atomic_write(path: str | Path, data: bytes) -> None:
    """Put `data` at `path`: written aside, synced, renamed. On an OSError the old file stays as it was."""
    with written_aside(Path(path)) as aside:
        aside.write_bytes(data)


def save_model(
    path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], card: Mapping[str, str] | None = None
) -> None:
    """One `.safetensors` at `path` with `config` and `card` inside; equal contents give equal bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    inside = {"config": config, "card": dict(card or {}), _DIGEST_KEY: _ZEROS}
    with written_aside(path) as aside:
        write_tensors(aside, tensors, {_METADATA_KEY: json.dumps(inside, sort_keys=True)})
        _write_digest(aside)


def read_model(path: str | Path) -> ModelFile:
    """Read a model file, or the model of a run folder: its `final/`, else the newest good checkpoint.

    Checked are the digest inside and a sha256 in a neighbouring `SHA256SUMS` or `<file>.sha256`; a file of before the
    digest that has neither is read with a warning. Raises UserError for a missing, pickled, truncated or altered file,
    naming it.
    """
    path = Path(path)
    if path.is_dir():
        final = path / "final" / "model.safetensors"
        return read_model(final) if final.is_file() else _model_of_checkpoint(path)
    if not path.is_file():
        raise UserError(f"{path}: no such model file or run folder")
    _refuse_pickle(path)
    sha256 = file_sha256(path)
    expected = _expected_sha256(path)
    if expected is not None and expected != sha256:
        raise UserError(f"{path}: damaged: sha256 is {sha256[:12]}.., expected {expected[:12]}..; fetch it again")
    inside = _header(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({one_line(error)}); fetch it again") from error
    digest = inside.get(_DIGEST_KEY)
    if digest is not None and (len(str(digest)) != 64 or digest != _digest(path, str(digest))):
        raise UserError(f"{path}: damaged: its bytes do not have the sha256 that it states; fetch it again")
    if digest is None and expected is None:
        logger.warning("%s: no sha256 inside or beside it; damage would not show", path)
    return ModelFile(tensors, inside["config"], inside["card"], sha256)


def read_card(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(config, card) of a model file or run folder, as `read_model` has them, without reading any weights.

    Only the header is checked. Raises UserError as `read_model` does.
    """
    path = Path(path)
    if path.is_dir():
        final = path / "final" / "model.safetensors"
        return read_card(final) if final.is_file() else _card_of_checkpoint(_newest_checkpoint(path))
    if not path.is_file():
        raise UserError(f"{path}: no such model file or run folder")
    _refuse_pickle(path)
    inside = _header(path)
    return inside["config"], inside["card"]


def _header(path: Path) -> dict[str, Any]:
    """Config, card and digest inside a model file."""
    try:
        with safe_open(path, "pt") as file:
            inside = parse_json((file.metadata() or {}).get(_METADATA_KEY, "null"), str(path), "fetch it again")
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({one_line(error)}); fetch it again") from error
    if inside is None:
        raise UserError(f"{path}: holds tensors but no config of ours; save it with tokenizer.common.checkpoint")
    if not isinstance(inside, dict) or not {"config", "card"} <= inside.keys() <= {"config", "card", _DIGEST_KEY}:
        raise UserError(f"{path}: damaged: its card is not one of ours; fetch it again")
    if not isinstance(inside["config"], dict) or not isinstance(inside["card"], dict):
        raise UserError(f"{path}: damaged: its card is not one of ours; fetch it again")
    return inside


def _digest(path: Path, stated: str) -> str:
    """The sha256 of a model file whose stated digest is replaced by zeros."""
    with open(path, "rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little")).replace(stated.encode(), _ZEROS.encode(), 1)
        digest = hashlib.sha256(size + header)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _write_digest(path: Path) -> None:
    """Put the digest of a model file in the place of its zeros."""
    digest = _digest(path, _ZEROS)
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        file.seek(8 + header.index(_ZEROS.encode(), header.rindex(_DIGEST_KEY.encode())))
        file.write(digest.encode())


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], origin: str | Path) -> None:
    """Copy `tensors` into `module`; every name and shape must agree, else UserError lists up to five differences."""
    own = module.state_dict()
    wrong = [f"missing {name} {_shape(own[name])}" for name in own if name not in tensors]
    wrong += [f"unexpected {name} {_shape(tensors[name])}" for name in tensors if name not in own]
    wrong += [
        f"{name} is {_shape(tensors[name])}, the model has {_shape(own[name])}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{origin}: does not fit the model: {'; '.join(wrong[:5])}{more}; use the config it came with")
    module.load_state_dict(dict(tensors))


def without_init(build: Callable[[], M]) -> M:
    """The module that `build` makes, with memory but without values, for weights that are loaded next."""
    with torch.device("meta"):
        module = build()
    if lost := {name for name, _ in module.named_buffers()} - module.state_dict().keys():
        raise RuntimeError(f"{', '.join(sorted(lost))}: computed when the module is built, so not in its state dict")
    return module.to_empty(device="cpu")


def init_from(module: nn.Module, path: str | Path) -> str:
    """Start from the weights of another run of the same shape -> their sha256. A run that resumes replaces them."""
    source = read_model(path)
    load_strict(module, source.tensors, f"init_from={path}")
    return source.sha256


class CheckpointStore:
    """The resume states of one run: `save`, and `load_latest` that survives a damaged newest one."""

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_every: int = 0) -> None:
        self.folder = Path(folder)
        self.keep_last = max(1, keep_last)
        self.keep_every = keep_every  # multiples of so many steps stay for good; 0: none does

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a state and drop the old ones; on an OSError those stay. Returns its folder."""
        target = self.folder / f"{checkpoint.step:08d}"
        aside = _aside(target)
        _remove(aside)
        aside.mkdir(parents=True)
        try:
            for name, tensors in checkpoint.groups.items():
                write_tensors(aside / f"{name}.safetensors", tensors)
            body = {key: getattr(checkpoint, key) for key in ("step", "state", "config")}
            (aside / "state.json").write_text(json.dumps(body, indent=1), encoding="utf-8")
            sums = {file.name: file_sha256(file) for file in sorted(aside.iterdir())}
            (aside / "manifest.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
            for file in aside.iterdir():
                _sync(file)
            _sync(aside)
        except BaseException:
            _remove(aside)
            raise
        _remove(target)  # only ever a damaged one: a good one of this step would have been resumed from
        os.replace(aside, target)
        _sync(self.folder)
        self._prune(checkpoint.step)
        return target

    def load_latest(self) -> Checkpoint | None:
        """The newest state whose files match their manifest; a damaged one is named in a warning and passed over.

        None when there is no checkpoint at all. Raises UserError when there are some and none is good.
        """
        folder = self.newest_good()
        return None if folder is None else self.read(folder)

    def read(self, folder: Path) -> Checkpoint:
        """The state in a folder that `newest_good` found, with the groups that its manifest lists."""
        body = _read_json(folder / "state.json")
        files = sorted(name for name in _read_json(folder / "manifest.json") if name.endswith(".safetensors"))
        groups = {name.removesuffix(".safetensors"): load_file(folder / name) for name in files}
        return Checkpoint(body["step"], groups, body["state"], body["config"])

    def newest_good(self) -> Path | None:
        """The folder of the newest undamaged checkpoint; see `load_latest`."""
        found = self._folders()
        for _, folder in found:
            damage = _damage(folder)
            if damage is None:
                return folder
            logger.warning("checkpoint %s is damaged (%s); trying the one before it", folder, damage)
        if found:
            raise UserError(f"{self.folder}: every checkpoint is damaged; move the folder away to start from step 0")
        return None

    def _folders(self) -> list[tuple[int, Path]]:
        """(step, folder), newest first; a folder whose state.json cannot be read comes first, with step -1."""
        folders = [p for p in self.folder.glob("*") if p.is_dir() and not p.name.endswith(PARTIAL)]
        with_step = [(_step_of(folder), folder) for folder in folders]
        return sorted(with_step, key=lambda entry: (entry[0] >= 0, -entry[0]))

    def _prune(self, step: int) -> None:
        """Keep the newest `keep_last` up to `step`. Later ones can only be the damaged ones that were passed over."""
        good = [(own, folder) for own, folder in self._folders() if 0 <= own <= step]
        kept = [folder for _, folder in good[: self.keep_last]]
        kept += [folder for own, folder in good if self.keep_every and own % self.keep_every == 0]
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder not in kept:
                _remove(folder)


def _model_of_checkpoint(run_dir: Path) -> ModelFile:
    folder = _newest_checkpoint(run_dir)
    config, card = _card_of_checkpoint(folder)
    print(f"note: {run_dir} has not ended; its newest checkpoint is taken, step {card['step']}", file=sys.stderr)
    file = folder / f"{card['weights']}.safetensors"
    return ModelFile(load_file(file), config, card, file_sha256(file))


def _newest_checkpoint(run_dir: Path) -> Path:
    folder = CheckpointStore(run_dir / "checkpoints").newest_good()
    if folder is None:
        raise UserError(f"{run_dir}: neither final/model.safetensors nor a checkpoint is in this run folder")
    return folder


def _card_of_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(config, card) of the weights that an unfinished run would ship: the moving average if there is one."""
    weights = "ema" if (folder / "ema.safetensors").is_file() else "model"
    body = _read_json(folder / "state.json")
    return body["config"], {**body["state"].get("card", {}), "weights": weights, "step": str(body["step"])}


def _damage(folder: Path) -> str | None:
    """The damage of a checkpoint folder in words, or None."""
    try:
        sums = _read_json(folder / "manifest.json")
        if listed := sums.keys() ^ {file.name for file in folder.iterdir()} - {"manifest.json"}:
            return f"its manifest and its files differ in {', '.join(sorted(listed))}"
        for name, expected in sums.items():
            if file_sha256(folder / name) != expected:
                return f"{name} differs from its sha256"
        check_fields(_read_json(folder / "state.json"), _STATE, "state.json", "")
    except (OSError, ValueError, AttributeError, RecursionError, UserError) as error:
        return one_line(error)
    return None


def _step_of(folder: Path) -> int:
    try:
        return int(_read_json(folder / "state.json")["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return -1  # named aloud by newest_good, which finds the same damage


def _expected_sha256(path: Path) -> str | None:
    """The sha256 that a neighbouring checksum file (the format of `sha256sum`) promises for `path`."""
    for sums in (path.with_name(path.name + ".sha256"), path.with_name("SHA256SUMS")):
        for line in sums.read_text(encoding="utf-8", errors="replace").splitlines() if sums.is_file() else ():
            digest, _, name = line.strip().partition(" ")
            if name.strip(" *") in (path.name, "") and digest:
                return digest.lower()
    return None


def _refuse_pickle(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(4)
    if path.suffix.lower() in _PICKLE_SUFFIXES or start.startswith(_PICKLE_STARTS):
        raise UserError(
            f"{path}: pickled weights are refused because loading them can run code; "
            "convert: torch.load(path, weights_only=True), then tokenizer.common.checkpoint.save_model"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """One .safetensors with the permissions of any new file. OSError on a full disk."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # as the umask has it; safetensors writes for the owner alone
    try:
        save_file(plain, path, metadata=metadata)
        path.chmod(mode)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # a full disk must look like one to the caller
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@contextmanager
def written_aside(path: Path, name: str = "") -> Iterator[Path]:
    """Yields where to write; at the end the file is synced and renamed to `path`, or removed on an exception.

    name: of the file until then, beside `path`; by default hidden and ending in .partial.
    """
    aside = path.with_name(name) if name else _aside(path)
    try:
        yield aside
        _sync(aside)
        os.replace(aside, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in FULL_DISK and not error.filename:
            error.filename = str(path)
        aside.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} is no file of at most {_MOST_BYTES >> 20} MiB")
    return json.loads(path.read_bytes())  # of a state, whose loss may be NaN


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
