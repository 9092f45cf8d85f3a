"""Stage 2, curation: how well the proxy reconstructs every clip under every assignment (paper.md section 1).

    python -m tokenizer.router.curate configs/mini/curate_train.yaml          # as many at once as there are cores

The clips are cut into units of work. Start any number of these processes, on any number of machines that share the
folder, kill them, start them again: a unit is computed under a lock, written aside and renamed, and whoever finds
all units done merges them into `table.safetensors`. The table has the same bytes however the work was shared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import to_dict
from tokenizer.common.entry import parse_work_arguments
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.runtime import pick_device
from tokenizer.common.units import WorkUnits, claim_folder
from tokenizer.data.clips import ClipDataset, DataConfig, build_dataset
from tokenizer.losses.perceptual import load_perceptual
from tokenizer.presets import load_tokenizer
from tokenizer.router.score_assignments import Scorer, Scores
from tokenizer.router.table import QualityTable


@dataclass
class CurateConfig:
    dir: str = ""  # results folder; default results/curate/<config name>
    proxy: str = ""  # the proxy tokenizer of stage 1: .safetensors file or run folder
    data: DataConfig = field(default_factory=lambda: DataConfig(augment=False))
    perceptual_net: str = "lpips_vgg"
    frames_per_block: int = 0  # frames of each block that the perceptual distance looks at, evenly spread; 0 = all
    method: str = "tree"  # or "brute_force": every assignment on its own, the oracle that the tree is checked against
    clips_per_unit: int = 16  # clips that go through the tree in lockstep
    device: str = "auto"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.data.augment:
            raise UserError("data.augment must be false: a table holds clips that can be found again")
        if self.method not in ("tree", "brute_force"):
            raise UserError(f"method = {self.method!r}: choose 'tree' or 'brute_force'")
        if not self.proxy:
            raise UserError("proxy is empty: give the tokenizer that stage 1 trained")


class Curation:
    """One table in the making."""

    def __init__(self, config: CurateConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.folder = Path(config.dir)
        device = pick_device(config.device)
        self.dataset: ClipDataset = build_dataset(config.data)
        self.tokenizer = load_tokenizer(config.proxy, device)
        self.scorer = Scorer(self.tokenizer, load_perceptual(config.perceptual_net).to(device), config.frames_per_block)
        self.units = WorkUnits(self.folder / "units", -(-len(self.dataset) // config.clips_per_unit))
        # units of another tokenizer, clip list or metric must not end up in one table
        claim_folder(self.folder, {**self._meta(), "clips_per_unit": config.clips_per_unit})

    @property
    def table_path(self) -> Path:
        return self.folder / "table.safetensors"

    def run(self) -> bool:
        """Work until no unit is free. True where the table is complete; False where others still work on units."""
        return self.units.work(self._score_unit, self.merge, f"curating {len(self.dataset)} clips")

    def merge(self) -> None:
        """Put the finished units together, in order."""
        tables = [QualityTable.load(path) for path in self.units.paths]
        names = [name for table in tables for name in table.names]
        lpips_BA, psnr_BA, mse_BA = (
            torch.cat([getattr(table, key) for table in tables]) for key in ("lpips_BA", "psnr_BA", "mse_BA")
        )
        self._table((lpips_BA, psnr_BA, mse_BA), names).save(self.table_path)
        missing = sorted(set(self.dataset.names) - set(names))
        atomic_write(self.folder / "skipped.json", json.dumps(missing, indent=1).encode())
        print(
            f"{self.table_path}: {len(names)} clips x {self.space.num_rows} assignments; {len(missing)} clips skipped"
        )

    @property
    def space(self) -> AssignmentSpace:
        return self.tokenizer.space

    def _score_unit(self, unit: int) -> None:
        self._scored(unit).save(self.units.path(unit))

    def _scored(self, unit: int) -> QualityTable:
        """Clips that cannot be read are left out here and counted when the table is merged."""
        size = self.config.clips_per_unit
        wanted = range(unit * size, min((unit + 1) * size, len(self.dataset)))
        found = ((self.dataset.names[i], self.dataset.get(i)) for i in wanted)
        clips = [clip for name, clip in found if clip.name == name]  # the data set gives the next clip for a bad one
        names = [clip.name for clip in clips]
        if not clips:
            nothing = torch.empty(0, self.space.num_rows)
            return self._table((nothing, nothing, nothing), names)
        video_BCTHW = torch.stack([clip.video_CTHW for clip in clips])
        score = self.scorer.tree if self.config.method == "tree" else self.scorer.brute_force
        return self._table(score(video_BCTHW.to(self.tokenizer.device)), names)

    def _table(self, scores: Scores, names: list[str]) -> QualityTable:
        return QualityTable(*scores, names, self.space.levels, self.space.num_blocks, self._meta())

    def _meta(self) -> dict[str, Any]:
        c, names = self.config, "\0".join(self.dataset.names).encode("utf-8", "surrogateescape")
        return {
            "tokenizer_sha256": self.tokenizer.sha256,
            "perceptual_net": c.perceptual_net,
            "frames_per_block": c.frames_per_block,
            "method": c.method,
            "data": to_dict(c.data),
            "clips_sha256": hashlib.sha256(names).hexdigest(),
        }


def main() -> None:
    description = "Stage 2: quality of every clip under every assignment, by the proxy."
    config, dry_run = parse_work_arguments(CurateConfig, "curate", description)
    curation = Curation(config)
    if dry_run:
        done, units = curation.units.num_done(), curation.units.num_units
        print(f"{len(curation.dataset)} clips in {units} units, {done} done, into {curation.table_path}")
        return
    if curation.table_path.exists():
        print(f"{curation.table_path} is complete")
    elif not curation.run():
        print(f"no unit is free; others are at work in {curation.folder}, the last of them merges the table")


if __name__ == "__main__":
    run_cli(main)
