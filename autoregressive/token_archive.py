"""The ragged token archive: a set of clips, tokenized once. The GPT trains on it and never sees a pixel.

    archive.json               what made it (ArchiveFacts); of each shard name, clips, tokens, sha256; its own sha256
    shards/000000.safetensors  code_L uint16: of each clip its condition's codes, then its own, clip after clip
                               offset_S int64 [S + 1], length_SN int32, label_S int32 (-1: none), view_S int32
                               and in the header the name of each clip's source

Shards are memory-mapped and read at random. Lengths and labels of all clips are kept in memory, because batches are
planned by them. Each shard is compared with its sha256 before its first clip is read. `archive.json` is written last: a
folder without it is not finished.

    python -m autoregressive.token_archive check DIR

Letters: S clips of a set, N temporal blocks, L tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizer.common.cli import Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Look at a token archive.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    about = "read all of it, with sha256 and facts; exit 1 if anything is wrong"
    check = commands.add_parser("check", description=about, help=about)
    check.add_argument("folder", type=Path, help="what scripts/train/5a_extract_codes.sh wrote")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from autoregressive.sequence import ClipCodes
from tokenizer.assignment import AssignmentSpace
from tokenizer.common.checkpoint import atomic_write, file_sha256
from tokenizer.common.clip_shape import plain_size
from tokenizer.common.config import from_dict, to_dict
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.schema import check_fields, check_inside, fits, parse_json, read_json

MOST_CODES = 1 << 16  # of uint16
FOUND_PROBLEMS = 1
_KIND = "evatok.token_shard"
_NO_LABEL = -1
_TABLES = {"offset_S": ("int64", 1), "length_SN": ("int32", 2), "label_S": ("int32", 1), "view_S": ("int32", 1)}
_ENTRY = {"file": str, "num_clips": int, "num_tokens": int, "sha256": str}
_AGAIN = "remove the file and run scripts/train/5a_extract_codes.sh again"


@dataclass
class ArchiveFacts:
    """What made the tokens, and what a model must agree with to read them."""

    codebook_size: int
    levels: list[int]
    num_blocks: int
    num_frames: int
    size: Any  # pixels: of a square, or [height, width]
    tokenizer_sha256: str
    router_sha256: str = ""  # empty for a budget without router
    budget: str = "router"
    trade_off: float | None = None  # w_q, of a router that predicts qualities
    class_names: list[str] = field(default_factory=list)  # class number -> name; empty without labels
    condition_lengths: list[int] = field(default_factory=list)  # frame prediction: tokens of each given block
    condition_frames: int = 0  # frame prediction: frames that are given
    precision: str = "none"  # that the tokenizer ran in

    def __post_init__(self) -> None:
        self.size = plain_size(self.size, "size")
        if self.codebook_size > MOST_CODES:
            raise UserError(f"codebook_size = {self.codebook_size}: an archive holds codes below {MOST_CODES}")

    @property
    def space(self) -> AssignmentSpace:
        return AssignmentSpace(tuple(self.levels), self.num_blocks)

    @property
    def condition_tokens(self) -> int:
        return sum(self.condition_lengths)


@dataclass(frozen=True)
class ArchivedClip:
    """One clip on its way into a shard. `name`: of its source; `view`: which crop, flip and start of it."""

    codes: ClipCodes
    name: str
    view: int = 0


def save_shard(path: Path, clips: Sequence[ArchivedClip], facts: ArchiveFacts) -> None:
    """Write one shard, aside and renamed; equal clips give equal bytes. A shard may be empty."""
    parts = [torch.cat([clip.codes.condition_L, clip.codes.code_L]) for clip in clips]
    lengths = [clip.codes.lengths for clip in clips]
    labels = [_NO_LABEL if clip.codes.label is None else clip.codes.label for clip in clips]
    tensors: dict[str, np.ndarray] = {
        "code_L": (torch.cat(parts) if parts else torch.empty(0)).numpy().astype(np.uint16),
        "offset_S": np.cumsum([0, *map(len, parts)], dtype=np.int64),
        "length_SN": np.array(lengths, dtype=np.int32).reshape(len(clips), facts.num_blocks),
        "label_S": np.array(labels, dtype=np.int32),
        "view_S": np.array([clip.view for clip in clips], dtype=np.int32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(tensors, metadata={_KIND: json.dumps([clip.name for clip in clips])}))


def save_archive(folder: Path, facts: ArchiveFacts, shards: Sequence[Path]) -> None:
    """Declare the finished `shards`, which lie below `folder`, to be the archive, in this order."""
    listed = [
        {
            "file": path.relative_to(folder).as_posix(),
            "num_clips": len(shard),
            "num_tokens": int(shard.length_SN.sum()),
            "sha256": file_sha256(path),
        }
        for path, shard in ((path, _Shard(path)) for path in shards)
    ]
    body = {"facts": to_dict(facts), "shards": listed, "sha256": _digest(to_dict(facts), listed)}
    atomic_write(folder / "archive.json", json.dumps(body, indent=1).encode())


class TokenArchive:
    """A finished archive, open for reading. Raises UserError for a folder that is none or lacks a shard."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.facts, self.shards = _read_archive_json(self.folder)
        self._open = [_Shard(self.folder / entry["file"], entry["sha256"]) for entry in self.shards]
        for shard, entry in zip(self._open, self.shards, strict=True):
            if problem := next(shard.table_problems(self.facts, entry["num_clips"]), None):
                raise UserError(f"{shard.path}: {problem}; {_AGAIN}")
        self._ends = np.cumsum([len(shard) for shard in self._open])
        empty = np.empty((0, self.facts.num_blocks), dtype=np.int32)
        self.length_SN = torch.from_numpy(np.concatenate([empty, *(s.length_SN for s in self._open)])).long()
        self.label_S = torch.from_numpy(np.concatenate([empty[:, 0], *(s.label_S for s in self._open)])).long()

    def __len__(self) -> int:
        return len(self.length_SN)

    @cached_property
    def sha256(self) -> str:
        """Of archive.json, which holds the sha256 of every shard."""
        return file_sha256(self.folder / "archive.json")

    def clip(self, index: int) -> ClipCodes:
        """Clip `index`, in the order of the archive.

        The first clip of each shard reads the whole file once, to compare it with its sha256. Raises UserError if they
        differ.
        """
        shard, place = self._find(index)
        shard.verify()
        code_L = torch.from_numpy(shard.codes(place).astype(np.int64))
        condition_L, code_L = code_L.tensor_split([self.facts.condition_tokens])
        label = int(self.label_S[index])
        return ClipCodes(
            code_L, tuple(self.length_SN[index].tolist()), None if label == _NO_LABEL else label, condition_L
        )

    def source(self, index: int) -> tuple[str, int]:
        """(name, view) of what clip `index` was made from."""
        shard, place = self._find(index)
        return shard.names[place], int(shard.view_S[place])

    def check(self) -> Iterator[str]:
        """Read everything; one line for each thing that is wrong."""
        for shard, entry in zip(self._open, self.shards, strict=True):
            if file_sha256(shard.path) != entry["sha256"]:
                yield f"{entry['file']}: differs from its sha256; {_AGAIN}"
            elif problem := shard.code_problem(self.facts):
                yield f"{entry['file']}: {problem}"

    def summary(self) -> str:
        """Clips, tokens, classes, and who made them, in one line."""
        tokens, facts = int(self.length_SN.sum()), self.facts
        condition = f", condition {facts.condition_lengths}" if facts.condition_lengths else ""
        return (
            f"{self.folder}: {len(self)} clips, {tokens} tokens ({tokens / max(1, len(self)):.1f} a clip), "
            f"{len(facts.class_names)} classes{condition}, {len(self.shards)} shards; "
            f"tokenizer {facts.tokenizer_sha256[:12]}, budget {facts.budget}"
        )

    def _find(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._open[number], index - int(self._ends[number] - len(self._open[number]))


class _Shard:
    """One file of an archive, memory-mapped; only the codes stay on the disk. `sha256`: what its bytes must have."""

    def __init__(self, path: Path, sha256: str = "") -> None:
        self.path, self._sha256 = path, sha256
        if not path.is_file():
            raise UserError(f"{path}: this shard of the archive is missing; {_AGAIN}")
        try:
            self._file = safe_open(str(path), framework="np")
            self._code_L = self._file.get_slice("code_L")
            arrays = {name: self._file.get_tensor(name) for name in _TABLES}
            self.names: list[str] = parse_json((self._file.metadata() or {})[_KIND], str(path), _AGAIN)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged, or no shard of a token archive ({error}); {_AGAIN}") from error
        if not fits(self.names, list[str]):
            raise UserError(f"{path}: damaged: the names of its clips are no list of texts; {_AGAIN}")
        for name, array in arrays.items():
            if (str(array.dtype), array.ndim) != _TABLES[name]:
                raise UserError(f"{path}: {name} holds {array.dtype} in {array.ndim} dimensions; {_AGAIN}")
        if self._code_L.get_dtype() != "U16" or len(self._code_L.get_shape()) != 1:
            raise UserError(f"{path}: code_L holds {self._code_L.get_dtype()}, not a row of uint16; {_AGAIN}")
        self.offset_S, self.length_SN = arrays["offset_S"], arrays["length_SN"]
        self.label_S, self.view_S = arrays["label_S"], arrays["view_S"]

    def __len__(self) -> int:
        return len(self.length_SN)

    def verify(self) -> None:
        """Compare the file with its sha256, the first time."""
        if self._sha256 and file_sha256(self.path) != self._sha256:
            raise UserError(f"{self.path}: damaged: differs from its sha256 in archive.json; {_AGAIN}")
        self._sha256 = ""

    def codes(self, place: int) -> np.ndarray:
        """uint16, the condition's and the clip's."""
        return self._code_L[int(self.offset_S[place]) : int(self.offset_S[place + 1])]

    def table_problems(self, facts: ArchiveFacts, num_clips: int) -> Iterator[str]:
        """How the tables, which are read whole when the archive is opened, contradict the facts or one another."""
        if len(self) != num_clips:
            yield f"has {len(self)} clips, archive.json says {num_clips}"
        elif self.length_SN.shape[1] != facts.num_blocks:
            yield f"has lengths of {self.length_SN.shape[1]} blocks, archive.json says {facts.num_blocks}"
        elif not len(self) == len(self.label_S) == len(self.view_S) == len(self.names) == len(self.offset_S) - 1:
            yield "its tables are of different lengths"
        elif not np.isin(self.length_SN, facts.levels).all():
            yield f"has lengths that are none of the levels {facts.levels}"
        else:
            num_S = self.length_SN.sum(axis=1, dtype=np.int64) + facts.condition_tokens
            if (
                not np.array_equal(np.cumsum([0, *num_S]), self.offset_S)
                or [self.offset_S[-1]] != self._code_L.get_shape()
            ):
                yield "codes, lengths and offsets do not fit together"
            if len(self) and not (self.label_S.min() >= _NO_LABEL and self.label_S.max() < len(facts.class_names)):
                yield f"has labels outside the {len(facts.class_names)} classes"

    def code_problem(self, facts: ArchiveFacts) -> str | None:
        """Codes outside the codebook; reads all of them."""
        (num_codes,) = self._code_L.get_shape()
        if num_codes and int(self._code_L[:].max()) >= facts.codebook_size:
            return f"has codes that are not below the codebook's size {facts.codebook_size}"
        return None


def _read_archive_json(folder: Path) -> tuple[ArchiveFacts, list[dict[str, Any]]]:
    """The facts, and the list of shards: file, num_clips, num_tokens, sha256."""
    path = folder / "archive.json"
    if not path.exists():
        raise UserError(f"{folder}: no finished token archive (no archive.json); scripts/train/5a_extract_codes.sh")
    body = read_json(path, {"facts": dict, "shards": list}, _AGAIN)
    digest = body.get("sha256")
    if digest is not None and digest != _digest(body["facts"], body["shards"]):
        raise UserError(f"{path}: damaged: its contents differ from their sha256; {_AGAIN}")
    for entry in body["shards"]:
        check_fields(entry, _ENTRY, str(path), _AGAIN)
        check_inside(entry["file"], str(path), _AGAIN)
    return from_dict(ArchiveFacts, body["facts"], str(path)), body["shards"]


def _digest(facts: dict[str, Any], shards: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([facts, shards], sort_keys=True).encode()).hexdigest()


def main() -> int:
    args = parse_arguments()
    archive = TokenArchive(args.folder)
    print(archive.summary())
    problems = list(archive.check())
    print("\n".join(problems) or "no problem found")
    return FOUND_PROBLEMS if problems else 0


if __name__ == "__main__":
    run_cli(main)
