"""The results folder of an evaluation, filled shard by shard by any number of processes, each stopped at any time.

    made_from.json       what decides a number; a folder made from something else is refused
    shards/000000.json   a record for each clip of the shard; .safetensors: the features of both sides
    card.json card.txt   the protocol card
    metrics.json per_clip.csv pictures/     written by the process that finds all shards there

Process RANK of WORLD_SIZE takes every WORLD_SIZE-th shard. A shard holds what its clips give and nothing else, and all
of them are summed in the order of the list, so the numbers do not depend on how the work was shared.

Letters: S clips, F numbers in a feature.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import differences
from tokenizer.common.errors import UserError

SHARD = 32  # clips; lost at most when a process is killed
SIDES = ("ours", "real")
Record = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def from_environment() -> Share:
        """RANK and WORLD_SIZE, as torchrun, accelerate and SLURM scripts set them; without them the only process."""
        rank, world = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if not (rank.isdecimal() and world.isdecimal()) or int(rank) >= int(world):
            raise UserError(f"RANK={rank} WORLD_SIZE={world}: give whole numbers, RANK below WORLD_SIZE")
        return Share(int(rank), int(world))


class ShardFolder:
    """Where one evaluation keeps what it has. `facts` decide its numbers."""

    def __init__(self, folder: str | Path, num_clips: int, size: int) -> None:
        self.folder, self.num_clips = Path(folder), num_clips
        self.units = [range(i, min(i + size, num_clips)) for i in range(0, num_clips, size)]

    def start(self, facts: Mapping[str, Any], overwrite: bool = False) -> None:
        """Make the folder ready. UserError where it holds results of other facts."""
        made_from = self.folder / "made_from.json"
        if overwrite:
            for name in ("shards", "pictures"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            made_from.unlink(missing_ok=True)
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        known = _read(made_from) if made_from.is_file() else None
        facts = json.loads(json.dumps(facts))
        if known is not None and (different := differences(known, facts)):
            raise UserError(
                f"{self.folder}: holds results of something else (there / now: {'; '.join(different)}); give another "
                "--out, or --overwrite"
            )
        if known is None:
            self.put("made_from.json", _json(facts))

    def to_do(self, share: Share) -> list[range]:
        """Shards of this process that are not there yet."""
        return [unit for unit in self.units[share.rank :: share.world] if not self._path(unit).is_file()]

    def add(self, unit: range, records: list[Record], features: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Write one shard: a record for each clip, and side -> index -> feature. The records come last."""
        tensors = {}
        for side, by_index in features.items():
            if by_index:
                tensors[f"{side}.index"] = torch.tensor(sorted(by_index))
                tensors[f"{side}.feature"] = torch.stack([by_index[i] for i in sorted(by_index)])
        self.put(f"shards/{unit.start:06d}.safetensors", save(tensors))
        self.put(f"shards/{unit.start:06d}.json", _json(sorted(records, key=lambda record: record["index"])))

    @property
    def complete(self) -> bool:
        return all(self._path(unit).is_file() for unit in self.units)

    def records(self) -> list[Record]:
        """Of all clips, in the order of the list."""
        return [record for unit in self.units for record in _read(self._path(unit))]

    def features(self, side: str) -> tuple[Tensor, Tensor]:
        """(int64 [S] places in the list, float32 [S, F]) of one side, in the order of the list."""
        parts = [load_file(self._path(unit).with_suffix(".safetensors")) for unit in self.units]
        parts = [part for part in parts if f"{side}.index" in part]
        if not parts:
            return torch.empty(0, dtype=torch.long), torch.empty(0, 0)
        return tuple(torch.cat([part[f"{side}.{name}"] for part in parts]) for name in ("index", "feature"))  # type: ignore[return-value]

    def put(self, name: str, data: bytes) -> None:
        """Write one file of the folder whole; several processes may, with the same contents."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_bytes(data)
        os.replace(aside, path)

    def _path(self, unit: range) -> Path:
        return self.folder / "shards" / f"{unit.start:06d}.json"


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
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        atomic_write(aside, save({"index": index_S, "feature": feature_SF.contiguous()}))
        os.replace(aside, self.path)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _json(data: Any) -> bytes:
    return json.dumps(data, indent=1, allow_nan=False).encode()
