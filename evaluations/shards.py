"""The results folder of an evaluation, filled shard by shard by any number of processes, each stopped at any time.

    made_from.json          what decides a number; a folder made from something else is refused
    shards/000000...        a record for each clip of the shard, and the features of both sides
    card.json card.txt      the protocol card
    metrics.json per_clip.csv pictures/     written by the process that finds all shards there

The shards are work units (tokenizer/common/work_units.py): whoever comes first takes one. A shard holds what its clips
give and nothing else, and all of them are summed in the order of the list, so the numbers do not depend on how the
work was shared.

Letters: S clips, F numbers in a feature.

Read what an evaluation wrote: metrics.json with its card, and the table of clips.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.errors import UserError
from tokenizer.common.work_units import WorkUnits, claim_folder, lock

SHARD = 32  # clips; lost at most when a process is killed
_REFILLS, _MOST_SHARED = 16, 32  # of a sampler's slots; processes that such shards still keep busy
Record = dict[str, Any]
Features = dict[str, dict[int, Tensor]]
"""Side (ours, real) -> place in the list -> feature [F]."""

_KIND = "evatok.scored_clips"


def shard_size(num_clips: int, slots: int = 0) -> int:
    """Clips of a shard. A sampler of `slots` ends each with slots that stand idle, so it gets longer ones."""
    return max(SHARD, min(_REFILLS * slots, num_clips // _MOST_SHARED))


class ShardFolder:
    """Where one evaluation keeps what it has: `num_clips` clips, `size` a shard."""

    def __init__(self, folder: str | Path, num_clips: int, size: int) -> None:
        self.folder, self.num_clips = Path(folder), num_clips
        self.members = [range(i, min(i + size, num_clips)) for i in range(0, num_clips, size)]
        self.units = WorkUnits(self.folder / "shards", len(self.members))

    def start(self, facts: Mapping[str, Any], overwrite: bool = False) -> None:
        """Make the folder ready. `facts` decide its numbers; UserError where it holds results of others."""
        if overwrite:
            for name in ("shards", "pictures"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / "made_from.json").unlink(missing_ok=True)
        claim_folder(self.folder, facts, "give another --out, or --overwrite")

    def work(self, score: Callable[[range], tuple[list[Record], Features]], finish: Callable[[], None]) -> bool:
        """Score the clips of every shard that is free; whoever finds all done calls `finish`.

        False where others are still at work on some.
        """

        def do(unit: int) -> None:
            records, features = score(self.members[unit])
            tensors = {}
            for side, by_index in features.items():
                if by_index:
                    tensors[f"{side}.index"] = torch.tensor(sorted(by_index))
                    tensors[f"{side}.feature"] = torch.stack([by_index[i] for i in sorted(by_index)])
            ordered = sorted(records, key=lambda record: record["index"])
            header = {_KIND: json.dumps(ordered, allow_nan=False)}
            atomic_write(self.units.path(unit), save(tensors, metadata=header))

        return self.units.work(do, finish, title=None)

    def num_scored(self) -> int:
        """Clips of the shards that some process has finished."""
        return sum(len(members) for members, path in zip(self.members, self.units.paths, strict=True) if path.exists())

    def records(self) -> list[Record]:
        """Of all clips, in the order of the list."""
        found: list[Record] = []
        for path in self.units.paths:
            with safe_open(str(path), framework="pt") as file:
                found += json.loads(file.metadata()[_KIND])
        return found

    def features(self, side: str) -> tuple[Tensor, Tensor]:
        """(int64 [S] places in the list, float32 [S, F]) of one side, in the order of the list."""
        parts = [part for part in map(load_file, self.units.paths) if f"{side}.index" in part]
        if not parts:
            return torch.empty(0, dtype=torch.long), torch.empty(0, 0)
        index_S, feature_SF = (torch.cat([part[f"{side}.{name}"] for part in parts]) for name in ("index", "feature"))
        return index_S, feature_SF

    def put(self, name: str, data: bytes) -> None:
        """Write one file of the folder whole."""
        atomic_write(self.folder / name, data)


@dataclass(frozen=True)
class RealCache:
    """Features of the real clips, kept for the next evaluation under the same protocol, list and extractor."""

    path: Path

    def load(self) -> dict[int, Tensor]:
        """Place in the list -> feature; empty where nothing is kept."""
        if not self.path.is_file():
            return {}
        kept = load_file(self.path)
        return dict(zip(kept["index"].tolist(), kept["feature"], strict=True))

    def save(self, index_S: Tensor, feature_SF: Tensor) -> None:
        """Keep the features of a finished evaluation."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.path.with_suffix(".lock")):  # evaluations of other systems may end at the same moment
            atomic_write(self.path, save({"index": index_S, "feature": feature_SF.contiguous()}))


@dataclass(frozen=True)
class Result:
    """One finished evaluation. `clips`: name -> column -> cell, scored clips only, in the order of the list."""

    folder: Path
    summary: dict[str, Any]
    clips: dict[str, dict[str, str]]

    @property
    def card(self) -> dict[str, Any]:
        """Its protocol card."""
        return self.summary["card"]


def read_result(folder: str | Path) -> Result:
    """UserError where `folder` holds no finished evaluation."""
    folder = Path(folder)
    try:
        summary = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with open(folder / "per_clip.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: has no {Path(error.filename).name}; finish the evaluation first") from error
    except ValueError as error:
        raise UserError(f"{folder}: metrics.json is damaged ({error}); run the evaluation again") from error
    return Result(folder, summary, {row["name"]: row for row in rows if not row.get("skipped")})
