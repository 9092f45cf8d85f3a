"""The results folder of an evaluation, filled shard by shard by any number of processes, each stopped at any time.

    made_from.json          what decides a number; a folder made from something else is refused
    shards/000000...        a record for each clip of the shard, and the features of both sides
    card.json card.txt      the protocol card
    metrics.json per_clip.csv pictures/     written by the process that finds all shards done

The shards are work units (tokenizer/common/work_units.py): whoever comes first takes one. A process scores one stream
of clips and takes the next shard whenever the stream asks for more, so nothing waits for the end of a shard; a shard is
written as soon as its clips are complete. It holds what its clips give and nothing else, and all shards are summed in
the order of the list, so the numbers do not depend on how the work was shared.

Letters: S clips, F numbers in a feature.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from evaluations.metrics.clip_scores import LOWER_IS_BETTER
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.errors import UserError
from tokenizer.common.schema import check_fields, parse_json, read_json_value
from tokenizer.common.work_units import WorkUnits, claim_folder, lock

SHARD = 32  # clips; a killed process loses those of the shards that it has open
Record = dict[str, Any]
_KIND, _DIGEST = "evatok.scored_clips", "evatok.sha256"


@dataclass(frozen=True)
class Scored:
    """A clip's record and, by side (ours, real), its feature [F]."""

    record: Record
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _OpenShard:
    """A shard that this process has claimed; `held` releases it."""

    held: ExitStack
    scored: dict[int, Scored] = field(default_factory=dict)


class ShardFolder:
    """Where one evaluation of `num_clips` clips keeps its results."""

    def __init__(self, folder: str | Path, num_clips: int) -> None:
        self.folder, self.num_clips, size = Path(folder), num_clips, SHARD
        self.members = [range(i, min(i + size, num_clips)) for i in range(0, num_clips, size)]
        self.units = WorkUnits(self.folder / "shards", len(self.members))
        self._at_work = ExitStack()

    def start(self, facts: Mapping[str, Any], overwrite: bool = False) -> None:
        """Make the folder ready. `facts` decide its numbers; UserError if it holds results of others.

        Also UserError if `overwrite` would remove what another process works on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        at_work = self.folder / ".at_work.lock"
        if overwrite:
            with lock(at_work, fcntl.LOCK_NB) as alone:
                if not alone:
                    raise UserError(f"{self.folder}: another process is at work in it; stop it, or give another --out")
                for name in ("shards", "pictures"):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
                for name in ("made_from.json", "card.json", "card.txt", "metrics.json", "per_clip.csv", PRICE):
                    (self.folder / name).unlink(missing_ok=True)
        self._at_work.enter_context(lock(at_work, shared=True))
        claim_folder(self.folder, facts, "give another --out, or --overwrite")

    def work(self, score: Callable[[Iterator[int]], Iterator[Scored]], finish: Callable[[], None]) -> bool:
        """Score the clips of every shard that is free; whoever finds all done calls `finish`.

        score: takes places in the list as they are claimed, and gives each clip once, in any order. False while others
        are still at work on some shard.
        """
        claimed: dict[int, _OpenShard] = {}
        size = len(self.members[0])

        def places() -> Iterator[int]:
            for unit, held in self.units.claim():
                claimed[unit] = _OpenShard(held)
                yield from self.members[unit]

        try:
            for scored in score(places()):
                index = scored.record["index"]
                unit = index // size
                shard = claimed[unit]
                shard.scored[index] = scored
                if len(shard.scored) == len(self.members[unit]):
                    self._write(unit, [shard.scored[i] for i in self.members[unit]])
                    claimed.pop(unit).held.close()
        finally:
            for shard in claimed.values():
                shard.held.close()
        with self._at_work:
            return self.units.merge(finish)

    def _write(self, unit: int, scored: Sequence[Scored]) -> None:
        tensors: dict[str, Tensor] = {}
        for side in ("ours", "real"):
            found = [(each.record["index"], each.features[side]) for each in scored if side in each.features]
            if found:
                tensors[f"{side}.index"] = torch.tensor([index for index, _ in found])
                tensors[f"{side}.feature"] = torch.stack([feature_F for _, feature_F in found])
        write_shard(self.units.path(unit), [each.record for each in scored], tensors)

    def num_scored(self) -> int:
        """Clips of the shards that some process has finished."""
        return sum(len(members) for members, path in zip(self.members, self.units.paths, strict=True) if path.exists())

    def read(self) -> tuple[list[Record], dict[str, tuple[Tensor, Tensor]]]:
        """All records in the order of the list, and by side (int64 [S] places in the list, float32 [S, F]).

        UserError for a shard that is not as it was written.
        """
        records: list[Record] = []
        parts: list[dict[str, Tensor]] = []
        for path, members in zip(self.units.paths, self.members, strict=True):
            found, tensors = read_shard(path)
            if [record.get("index") for record in found] != list(members):
                raise UserError(f"{path}: holds other clips than its place in the list; remove it and run again")
            records += found
            parts.append(tensors)
        return records, {side: _joined(parts, side) for side in ("ours", "real")}

    def put(self, name: str, data: bytes) -> None:
        """Write one file of the folder whole."""
        atomic_write(self.folder / name, data)


def write_shard(path: Path, records: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put what JSON can hold, and tensors, into one file with their sha256; equal contents give equal bytes."""
    text = json.dumps(records, sort_keys=isinstance(records, dict), allow_nan=False)
    data = save(dict(tensors), metadata={_KIND: text, _DIGEST: _digest(text, tensors)})
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:begin]), sort_keys=True).encode()  # safetensors shuffles two keys of metadata
    header += b" " * (-len(header) % 8)
    atomic_write(path, len(header).to_bytes(8, "little") + header + data[begin:])


def read_shard(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Records and tensors that `write_shard` wrote. UserError for a damaged or altered file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
        tensors = load_file(path)
        whole = header.get(_DIGEST) == _digest(header.get(_KIND, ""), tensors)
        records = parse_json(header[_KIND], str(path), "remove it and run again") if whole else None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({str(error)[:80]}); remove it and run again") from error
    if records is None:
        raise UserError(f"{path}: is damaged (its content does not match its sha256); remove it and run again")
    return records, tensors


def made_once(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """The tensor in `path`, made by the first process that needs it while the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_suffix(".lock")):
        if not path.is_file():
            write_shard(path, [], {"tensor": make().contiguous()})
    return read_shard(path)[1]["tensor"]


def _digest(records: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(records.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _joined(parts: Sequence[Mapping[str, Tensor]], side: str) -> tuple[Tensor, Tensor]:
    some = [part for part in parts if f"{side}.index" in part]
    if not some:
        return torch.empty(0, dtype=torch.long), torch.empty(0, 0)
    index_S, feature_SF = (torch.cat([part[f"{side}.{name}"] for part in some]) for name in ("index", "feature"))
    return index_S, feature_SF


@dataclass(frozen=True)
class RealCache:
    """Features of the real clips, kept for the next evaluation of the same clips by content, protocol and extractor."""

    path: Path

    def load(self) -> dict[int, Tensor]:
        """Place in the list -> feature; empty if nothing is kept. A damaged file counts as nothing."""
        if not self.path.is_file():
            return {}
        try:
            with safe_open(str(self.path), framework="pt") as file:
                digest = (file.metadata() or {}).get(_DIGEST)
            kept = load_file(self.path)
        except (SafetensorError, OSError):
            return {}
        if digest != _digest("", kept):
            return {}
        return dict(zip(kept["index"].tolist(), kept["feature"], strict=True))

    def save(self, index_S: Tensor, feature_SF: Tensor) -> None:
        """Keep the features of a finished evaluation."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"index": index_S, "feature": feature_SF.contiguous()}
        with lock(self.path.with_suffix(".lock")):  # evaluations of other systems may end at the same moment
            atomic_write(self.path, save(tensors, metadata={_DIGEST: _digest("", tensors)}))


# Reading finished results


@dataclass(frozen=True)
class Result:
    """One finished evaluation. `clips`: name -> metric -> value, scored clips only, in the order of the list."""

    folder: Path
    summary: dict[str, Any]
    clips: dict[str, dict[str, float]]

    @property
    def card(self) -> dict[str, Any]:
        return self.summary["card"]


PRICE = "price.safetensors"  # of average:N
RUN_AGAIN = "run the evaluation again"
_METRICS = {
    "card": {"protocol": {"name": str, "miniature": bool, "changed": list[str]}, "protocol_hash": str},
    "num_clips": int,
    "notes": list[str],
    "metrics": dict,
}
_METRIC = {"value": float, "low": float | None, "high": float | None}


def read_result(folder: str | Path) -> Result:
    """UserError if `folder` holds no finished evaluation, or its files are not as they were written."""
    folder = Path(folder)
    if not (folder / "metrics.json").exists():
        raise UserError(f"{folder}: has no metrics.json; finish the evaluation first")
    summary = check_metrics(folder / "metrics.json", read_json_value(folder / "metrics.json", RUN_AGAIN))
    table = folder / "per_clip.csv"
    try:
        with open(table, newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file, strict=True))
    except OSError as error:
        raise UserError(f"{table}: cannot be read ({error.strerror}); finish the evaluation first") from error
    except csv.Error as error:
        raise UserError(f"{table}: is no table ({error}); run the evaluation again") from error
    clips: dict[str, dict[str, float]] = {}
    for line, row in enumerate(rows, start=2):
        name = row.get("name")
        if not name or name in clips:
            raise UserError(f"{table}, row {line}: has {'the name of another row' if name else 'no name'}")
        if not row.get("skipped"):
            clips[name] = {m: _figure(table, line, m, row[m]) for m in LOWER_IS_BETTER if row.get(m)}
    if len(clips) != summary["num_clips"]:
        raise UserError(f"{table}: has {len(clips)} scored clips, metrics.json {summary['num_clips']}; run it again")
    return Result(folder, summary, clips)


def _figure(table: Path, line: int, column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{table}, row {line}: {column} is {cell[:40]!r}, not a finite number")
    return value


def check_metrics(path: Path, data: Any) -> dict[str, Any]:
    """`data` if it has the form of an evaluation's metrics.json; else UserError names the first wrong field."""
    check_fields(data, _METRICS, str(path), RUN_AGAIN)
    for name, metric in data["metrics"].items():
        check_fields(metric, _METRIC, str(path), RUN_AGAIN, f"metrics.{name}.")
    return data
