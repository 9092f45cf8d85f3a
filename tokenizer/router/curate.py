"""Stage 2, curation: how well the proxy reconstructs every clip under every assignment (arXiv 2603.12267).

    python -m tokenizer.router.curate configs/mini/curate_train.yaml          # as many at once as there are cores

The clips are cut into units of work. Start any number of these processes, on any machines that share the folder; rerun
the command to resume. A unit is computed under a lock, written aside and renamed; the process that finds all units done
merges them into `table.safetensors`. The table has the same bytes however the work was shared.

Perceptual distance, PSNR and MSE of clips under all assignments: as a prefix tree, and by brute force.

Everything up to block t depends only on (a_1 .. a_t), because every attention is block-causal. So the assignments are
the leaves of a tree, each node is one block under one prefix, and 625 assignments take 780 block steps instead of
2500. The clips of a batch go in lockstep, so all shapes are equal; real frames pass the perceptual network once.

With `children` below the number of levels, each node of the tree continues with that many levels, drawn anew for every
node and unit: 2 of 5 leave 16 of 625 assignments for 30 of 780 steps. The other cells of the table are NaN. A router
that learns `labels=quality` needs no whole rows, and learns more from many clips than from many assignments.

Letters: B clips, A assignments (rows), F images.
"""

from __future__ import annotations

from tokenizer.common.cli import answer_help, work_parser

ABOUT = "Stage 2: quality of every clip under every assignment, by the proxy."


if __name__ == "__main__":
    answer_help(lambda: work_parser(ABOUT).parse_intermixed_args())  # before torch is imported

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.clip_shape import check_same_shape
from tokenizer.common.config import to_dict
from tokenizer.common.device import autocast, generator_for, pick_device, pick_dtype
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.image_quality import psnr_of_mse
from tokenizer.common.work_units import WorkUnits, claim_folder
from tokenizer.data.clips import NO_FILE, ClipDataset, ClipSample, DataConfig, build_dataset, to_video
from tokenizer.losses.perceptual import PerceptualDistance, check_frames_fit, load_perceptual
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.reward import QualityTable, reward, stats_of
from tokenizer.streaming import ClipPatches, Past, read_patches, step_block
from tokenizer.training.cli import parse_work_arguments

Scores = tuple[Tensor, Tensor, Tensor]
"""(perceptual distance, PSNR in dB, MSE), float32 [B, A] each, on the CPU."""


class Scorer:
    def __init__(self, tokenizer: VideoTokenizer, perceptual: PerceptualDistance, frames_per_block: int = 0) -> None:
        self.tokenizer, self.perceptual, self.space = tokenizer, perceptual, tokenizer.space
        in_block = tokenizer.config.patch_frames
        wanted = min(frames_per_block or in_block, in_block)
        self.seen_frames = [(2 * i + 1) * in_block // (2 * wanted) for i in range(wanted)]  # inside each block

    @torch.inference_mode()
    def tree(self, video_BCTHW: Tensor, children: int = 0, generator: torch.Generator | None = None) -> Scores:
        """All assignments by a depth-first walk over their common prefixes.

        children: so many levels, drawn by `generator` at each node, instead of all; assignments not reached are NaN.
        """
        blocks, levels = video_BCTHW.chunk(self.space.num_blocks, dim=2), self.space.levels
        real = [self.perceptual.features(self._images(block)) for block in blocks]
        patches = read_patches(self.tokenizer, video_BCTHW)  # once for all assignments
        leaves: dict[int, tuple[Tensor, Tensor]] = {}  # row of the table -> distance and MSE of each clip

        def walk(t: int, row: int, past: Past, distance_B: Tensor, mse_B: Tensor) -> None:
            if t == self.space.num_blocks:
                leaves[row] = (distance_B / t, mse_B / t)
                return
            for place in _drawn_places(len(levels), children, generator):
                frames, after = self._step(patches, t, levels[place], past)
                ours = self.perceptual.features(self._images(frames))
                here_B = self.perceptual.distance(ours, real[t]).view(len(frames), -1).mean(dim=1)
                next_row = row * len(levels) + place  # rows are in lexicographic order
                walk(t + 1, next_row, after, distance_B + here_B, mse_B + _mse(frames, blocks[t]))

        nothing_B = torch.zeros(len(video_BCTHW), device=video_BCTHW.device)
        walk(0, 0, Past.empty(self.tokenizer), nothing_B, nothing_B)
        nan_B = torch.full_like(nothing_B, torch.nan)
        return _collect([leaves.get(row, (nan_B, nan_B)) for row in range(self.space.num_rows)])

    @torch.inference_mode()
    def brute_force(self, video_BCTHW: Tensor) -> Scores:
        """Each assignment on its own, by the tokenizer's ordinary forward: the oracle for `tree`."""
        leaves = []
        for length_N in self.space.table_AN:  # [N], for all clips
            ours = self.tokenizer(video_BCTHW, length_N.expand(len(video_BCTHW), -1)).video_BCTHW.clamp(0, 1)
            pairs = zip(*(x.chunk(self.space.num_blocks, dim=2) for x in (ours, video_BCTHW)), strict=True)
            per_block = [
                self.perceptual(self._images(a), self._images(b)).view(len(a), -1).mean(dim=1) for a, b in pairs
            ]
            leaves.append((torch.stack(per_block).mean(dim=0), _mse(ours, video_BCTHW)))
        return _collect(leaves)

    def _step(self, patches: ClipPatches, t: int, length: int, past: Past) -> tuple[Tensor, Past]:
        _, frames, after = step_block(self.tokenizer, patches, t, length, past)
        return frames, after

    def _images(self, block_BCTHW: Tensor) -> Tensor:
        """The frames of one block that the perceptual network looks at, [F, C, H, W]."""
        return rearrange(block_BCTHW[:, :, self.seen_frames], "B C T H W -> (B T) C H W")


def _drawn_places(num_levels: int, children: int, generator: torch.Generator | None) -> list[int]:
    if not 0 < children < num_levels:
        return [*range(num_levels)]
    return torch.randperm(num_levels, generator=generator)[:children].sort().values.tolist()


def _mse(ours: Tensor, real: Tensor) -> Tensor:
    return (ours - real).square().flatten(1).mean(dim=1)  # [B]


def _collect(leaves: list[tuple[Tensor, Tensor]]) -> Scores:
    # A pairs of [B] -> two [B, A]
    distance_BA, mse_BA = (torch.stack(column, dim=1).float().cpu() for column in zip(*leaves, strict=True))
    return distance_BA, psnr_of_mse(mse_BA), mse_BA


@dataclass
class CurateConfig:
    dir: str = ""  # results folder; default results/curate/<config name>
    proxy: str = ""  # the proxy tokenizer of stage 1: .safetensors file or run folder
    data: DataConfig = field(default_factory=lambda: DataConfig(augment=False))
    perceptual_net: str = "lpips_vgg"
    frames_per_block: int = 0  # frames of each block that the perceptual distance looks at, evenly spread; 0 = all
    children: int = 0  # levels drawn at random below each node of the tree; 0 = all, the whole table
    method: str = "tree"  # or "brute_force": every assignment on its own, the oracle that the tree is checked against
    clips_per_unit: int = 16  # clips that go through the tree in lockstep
    device: str = "auto"
    precision: str = "none"  # of the proxy: none (fp32), bf16 or fp16; the share of equal choices is printed
    num_threads: int | None = None
    num_workers: int = 4  # clips that are read at once, ahead of the device

    def __post_init__(self) -> None:
        pick_dtype(self.precision)
        if self.data.augment:
            raise UserError("data.augment must be false: a table holds clips that can be found again")
        if self.method not in ("tree", "brute_force"):
            raise UserError(f"method = {self.method!r}: choose 'tree' or 'brute_force'")
        if self.children < 0 or (self.children and self.method != "tree"):
            raise UserError(f"children = {self.children} must be at least 0, and goes with method = 'tree' only")
        if not self.proxy:
            raise UserError("proxy is empty: give the tokenizer that stage 1 trained")
        check_frames_fit(self.perceptual_net, self.data.size)


class Curation:
    """One table in the making."""

    def __init__(self, config: CurateConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.folder = Path(config.dir)
        self._unchecked = True  # the first unit of a process shows what a lower precision changes
        device = pick_device(config.device)
        self.dataset: ClipDataset = build_dataset(config.data)
        self.tokenizer = load_tokenizer(config.proxy, device)
        check_same_shape(config.data, "data", self.tokenizer.config, config.proxy)
        self.scorer = Scorer(self.tokenizer, load_perceptual(config.perceptual_net).to(device), config.frames_per_block)
        self.units = WorkUnits(self.folder / "units", -(-len(self.dataset) // config.clips_per_unit))
        # units of another tokenizer, clip list or metric must not end up in one table
        claim_folder(self.folder, {**self._meta(), "data": config.data, "clips_per_unit": config.clips_per_unit})

    @property
    def table_path(self) -> Path:
        return self.folder / "table.safetensors"

    def run(self) -> bool:
        """Work until no unit is free. True where the table is complete; False where others still work on units."""
        title, num_readers = f"curating {len(self.dataset)} clips", self.config.num_workers
        return self.units.work_ahead(self._members, self._read, self._score_unit, self.merge, title, num_readers)

    def merge(self) -> None:
        """Put the finished units together, in order."""
        tables = [QualityTable.load(path) for path in self.units.paths]
        names = [name for table in tables for name in table.names]
        files = [file for table in tables for file in table.files or [NO_FILE] * len(table)]
        self._check_unchanged(dict(zip(names, files, strict=True)))
        lpips_BA, psnr_BA, mse_BA = (
            torch.cat([getattr(table, key) for table in tables]) for key in ("lpips_BA", "psnr_BA", "mse_BA")
        )
        self._table((lpips_BA, psnr_BA, mse_BA), names, files).save(self.table_path)
        missing = sorted(set(self.dataset.names) - set(names))
        atomic_write(self.folder / "skipped.json", json.dumps(missing, indent=1).encode())
        print(
            f"{self.table_path}: {len(names)} clips x {self.space.num_rows} assignments; {len(missing)} clips skipped"
        )

    @property
    def space(self) -> AssignmentSpace:
        return self.tokenizer.space

    def _members(self, unit: int) -> range:
        size = self.config.clips_per_unit
        return range(unit * size, min((unit + 1) * size, len(self.dataset)))

    def _read(self, index: int) -> tuple[ClipSample, str] | None:
        """A clip and the fingerprint of its file; None if it cannot be read. In a thread, ahead of the device."""
        for _, clip in self.dataset.readable([index]):
            return clip, self.dataset.fingerprint(index)
        return None

    def _score_unit(self, unit: int, read: Iterator[tuple[ClipSample, str] | None]) -> None:
        self._scored(unit, [found for found in read if found]).save(self.units.path(unit))

    def _scored(self, unit: int, read: list[tuple[ClipSample, str]]) -> QualityTable:
        """Score one unit. Clips that cannot be read are left out here and counted when the table is merged."""
        names, files = [clip.name for clip, _ in read], [file for _, file in read]
        if not read:
            nothing = torch.empty(0, self.space.num_rows)
            return self._table((nothing, nothing, nothing), names, files)
        video_BCTHW = to_video(torch.stack([clip.frames_CTHW for clip, _ in read]), self.tokenizer.device)
        with autocast(self.tokenizer.device, self.config.precision):
            table = self._table(self._score(video_BCTHW, unit), names, files)
        if self.config.precision != "none" and self._unchecked:
            self._unchecked = False
            line = equal_choices(table, self._table(self._score(video_BCTHW, unit), names, files))
            print(f"{self.config.precision} against fp32, {line}", flush=True)
        return table

    def _score(self, video_BCTHW: Tensor, unit: int) -> Scores:
        if self.config.method == "brute_force":
            return self.scorer.brute_force(video_BCTHW)
        # of the unit alone, so that the table has the same bytes however the work was shared
        return self.scorer.tree(video_BCTHW, self.config.children, generator_for(0, "children", unit))

    def _table(self, scores: Scores, names: list[str], files: list[str]) -> QualityTable:
        return QualityTable(*scores, names, self.space.levels, self.space.num_blocks, self._meta(), files)

    def _check_unchanged(self, rated: dict[str, str]) -> None:
        """UserError if a file is not the one that was scored. rated: name -> fingerprint."""
        for index, name in enumerate(self.dataset.names):
            if rated.get(name) and self.dataset.fingerprint(index) != rated[name]:
                raise UserError(
                    f"{name} has changed since it was scored: remove {self.units.folder} and score its clips again"
                )

    def _meta(self) -> dict[str, Any]:
        c, names = self.config, "\0".join(self.dataset.names).encode("utf-8", "surrogateescape")
        return {
            "tokenizer_sha256": self.tokenizer.sha256,
            "perceptual_net": c.perceptual_net,
            "frames_per_block": c.frames_per_block,
            "method": c.method,
            **({"children": c.children} if c.children else {}),
            **({"precision": c.precision} if c.precision != "none" else {}),
            "data": to_dict(c.data),
            "clips_sha256": hashlib.sha256(names).hexdigest(),
        }


def equal_choices(ours: QualityTable, exact: QualityTable, quality_weight: float = 1.2) -> str:
    """How far the scores of the same clips in two precisions agree, in words: equal best rows, largest difference."""
    stats, tokens_A = stats_of(exact), exact.space.tokens_A
    best_B, exact_B = (
        reward(x.lpips_BA, tokens_A, quality_weight, stats).nan_to_num(-torch.inf).argmax(dim=1) for x in (ours, exact)
    )
    num, equal = len(exact_B), int((best_B == exact_B).sum())
    gap = (ours.lpips_BA - exact.lpips_BA).abs().nan_to_num().max().item()
    return (
        f"first {num} clips: equal best assignment (w_q = {quality_weight}) for {equal} ({equal / num:.0%}), "
        f"perceptual distances differ by at most {gap:.2g}"
    )


def main() -> None:
    config, dry_run = parse_work_arguments(CurateConfig, "curate", ABOUT)
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
