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

A clip of 8 blocks has 390,625 assignments, too many for a table. `method=beam` walks the tree level by level and keeps,
after each block, the `beam` prefixes of the highest partial reward of each clip: at most N * beam * m block steps. The
reward is a sum over blocks, because the distance of a block depends on its prefix alone. Its means and deviations are
those of a sample of clips under a few rows drawn uniformly, measured before the first beam. The table holds the
beam * m assignments of each clip that were walked to the end, and serves one `quality_weight`.

Letters: B clips, A assignments (rows), R measured rows of a clip, N blocks, m levels, F images.
"""

from __future__ import annotations

from tokenizer.common.cli import answer_help, work_parser

ABOUT = "Stage 2: quality of every clip under every assignment, by the proxy."


if __name__ == "__main__":
    answer_help(lambda: work_parser(ABOUT).parse_intermixed_args())  # before torch is imported

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.clip_shape import check_same_shape
from tokenizer.common.config import from_dict, to_dict
from tokenizer.common.device import autocast, generator_for, pick_device, pick_dtype, to_video
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.image_quality import psnr_of_mse
from tokenizer.common.schema import read_json
from tokenizer.common.work_units import WorkUnits, claim_folder, lock
from tokenizer.data.clips import NO_FILE, ClipDataset, ClipSample, DataConfig, build_dataset
from tokenizer.losses.perceptual import PerceptualDistance, check_frames_fit, load_perceptual
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.reward import TOTAL_WEIGHT, QualityTable, RewardStats, reward, stats_of, stats_of_sample
from tokenizer.streaming import ClipPatches, Past, read_patches, step_block
from tokenizer.training.cli import parse_work_arguments

Scores = tuple[Tensor, Tensor, Tensor]
"""(perceptual distance, PSNR in dB, MSE), float32 [B, A] each, on the CPU; of a beam [B, R]."""

STATS_CLIPS, STATS_ROWS = 128, 4  # the sample that standardises the reward of a beam: clips, and rows of each


@dataclass(frozen=True, eq=False)
class _Node:
    """A prefix, and the clips whose beams hold it. Sums over its blocks: distance and MSE, float [B]."""

    row: int  # of the prefix, in base m
    tokens: int
    clip_B: Tensor  # int64, ascending
    past: Past
    distance_B: Tensor
    mse_B: Tensor

    def of_clips(self, index: Tensor) -> _Node:
        return replace(
            self,
            clip_B=self.clip_B[index],
            past=self.past.of_clips(index),
            distance_B=self.distance_B[index],
            mse_B=self.mse_B[index],
        )


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
        num = len(video_BCTHW)
        return _collect([self.under(video_BCTHW, length_N.expand(num, -1)) for length_N in self.space.table_AN])

    @torch.inference_mode()
    def under(self, video_BCTHW: Tensor, length_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Distance and MSE, [B] each, of every clip under its own assignment."""
        ours = self.tokenizer(video_BCTHW, length_BN).video_BCTHW.clamp(0, 1)
        pairs = zip(*(x.chunk(self.space.num_blocks, dim=2) for x in (ours, video_BCTHW)), strict=True)
        per_block = [self.perceptual(self._images(a), self._images(b)).view(len(a), -1).mean(dim=1) for a, b in pairs]
        return torch.stack(per_block).mean(dim=0), _mse(ours, video_BCTHW)

    @torch.inference_mode()
    def beam(self, video_BCTHW: Tensor, width: int, quality_weight: float, stats: RewardStats) -> tuple[Tensor, Scores]:
        """The assignments that a beam of `width` prefixes reaches: row_BR, ascending, and their scores.

        Every child of a prefix that is kept is measured; the children after the last block are returned.
        """
        blocks, device = video_BCTHW.chunk(self.space.num_blocks, dim=2), video_BCTHW.device
        patches = read_patches(self.tokenizer, video_BCTHW)
        nothing_B = torch.zeros(len(video_BCTHW), device=device)
        clip_B = torch.arange(len(video_BCTHW), device=device)
        nodes = [_Node(0, 0, clip_B, Past.empty(self.tokenizer), nothing_B, nothing_B)]

        def reward_of(node: _Node) -> Tensor:  # so far, [B]; up to a constant
            return reward(node.distance_B / len(blocks), torch.tensor(node.tokens), quality_weight, stats)

        for t, block in enumerate(blocks):
            real = self.perceptual.features(self._images(block))
            if t > 0:
                nodes = _best(nodes, len(video_BCTHW), width, reward_of)
            nodes = [child for node in nodes for child in self._children(node, t, patches, block, real)]
        return _leaves(nodes, len(video_BCTHW), self.space.num_blocks)

    def _children(
        self, node: _Node, t: int, patches: ClipPatches, block_BCTHW: Tensor, real: list[Tensor]
    ) -> Iterator[_Node]:
        """Block t under every level, for the clips of a node in one batch."""
        own, here_BCTHW = patches.of_clips(node.clip_B), block_BCTHW[node.clip_B]
        theirs = [rearrange(x, "(B f) C H W -> B f C H W", B=len(block_BCTHW))[node.clip_B].flatten(0, 1) for x in real]
        for place, length in enumerate(self.space.levels):
            frames, after = self._step(own, t, length, node.past)
            ours = self.perceptual.features(self._images(frames))
            distance_B = self.perceptual.distance(ours, theirs).view(len(frames), -1).mean(dim=1)
            row = node.row * len(self.space.levels) + place
            sums = (node.distance_B + distance_B, node.mse_B + _mse(frames, here_BCTHW))
            yield _Node(row, node.tokens + length, node.clip_B, after, *sums)

    def _step(self, patches: ClipPatches, t: int, length: int, past: Past) -> tuple[Tensor, Past]:
        _, frames, after = step_block(self.tokenizer, patches, t, length, past)
        return frames, after

    def _images(self, block_BCTHW: Tensor) -> Tensor:
        """The frames of one block that the perceptual network looks at, [F, C, H, W]."""
        return rearrange(block_BCTHW[:, :, self.seen_frames], "B C T H W -> (B T) C H W")


def _best(nodes: list[_Node], num_clips: int, width: int, value_of: Callable[[_Node], Tensor]) -> list[_Node]:
    """The `width` nodes of the highest value of each clip, without the clips that keep others; ties: fewer tokens."""
    nodes = sorted(nodes, key=lambda node: (node.tokens, node.row))
    value_BK = _columns(nodes, num_clips, value_of, -torch.inf)
    rank_BK = value_BK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = ((node, (rank_BK[node.clip_B, k] < width).nonzero()[:, 0]) for k, node in enumerate(nodes))
    return [node.of_clips(index_B) for node, index_B in kept if len(index_B)]


def _leaves(nodes: list[_Node], num_clips: int, num_blocks: int) -> tuple[Tensor, Scores]:
    """Whole assignments -> row_BR and scores; every clip has as many."""
    nodes = sorted(nodes, key=lambda node: node.row)
    distance_BK, mse_BK = (
        _columns(nodes, num_clips, value_of, torch.nan)
        for value_of in (lambda node: node.distance_B / num_blocks, lambda node: node.mse_B / num_blocks)
    )
    node_BR = (~distance_BK.isnan()).nonzero()[:, 1].view(num_clips, -1)
    distance_BR, mse_BR = (x_BK.gather(1, node_BR).float().cpu() for x_BK in (distance_BK, mse_BK))
    return torch.tensor([node.row for node in nodes])[node_BR.cpu()], (distance_BR, psnr_of_mse(mse_BR), mse_BR)


def _columns(nodes: list[_Node], num_clips: int, value_of: Callable[[_Node], Tensor], absent: float) -> Tensor:
    """[B, K]: a column for each node, `absent` for the clips that it does not hold."""
    value_BK = torch.full((num_clips, len(nodes)), absent, dtype=torch.double, device=nodes[0].clip_B.device)
    for k, node in enumerate(nodes):
        value_BK[node.clip_B, k] = value_of(node).double()
    return value_BK


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
    method: str = "tree"  # or "brute_force": every assignment on its own, the oracle that the tree is checked against;
    # or "beam": the best prefixes of each clip alone, for clips of many blocks
    beam: int = 16  # of method "beam": prefixes that a clip keeps after each block
    quality_weight: float = 1.2  # of method "beam": w_q of the reward that steers it
    stats: str = ""  # of method "beam": another table, whose means and deviations to use; else those of a sample
    clips_per_unit: int = 16  # clips that go through the tree in lockstep
    device: str = "auto"
    precision: str = "none"  # of the proxy: none (fp32), bf16 or fp16; the share of equal choices is printed
    num_threads: int | None = None
    num_workers: int = 4  # clips that are read at once, ahead of the device

    def __post_init__(self) -> None:
        pick_dtype(self.precision)
        if self.data.augment:
            raise UserError("data.augment must be false: a table holds clips that can be found again")
        if self.method not in ("tree", "brute_force", "beam"):
            raise UserError(f"method = {self.method!r}: choose 'tree', 'brute_force' or 'beam'")
        if self.method != "beam" and (self.beam, self.quality_weight, self.stats) != (16, 1.2, ""):
            raise UserError(f"beam, quality_weight and stats are read by method = 'beam' alone, not {self.method!r}")
        if self.beam < 1 or not 0 <= self.quality_weight <= TOTAL_WEIGHT:
            raise UserError(
                f"beam = {self.beam} must be at least 1, and quality_weight = {self.quality_weight} within "
                f"[0, {TOTAL_WEIGHT:g}]"
            )
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
        if config.method != "beam":
            self.space.check_table(self.space.num_rows)
        self.units = WorkUnits(self.folder / "units", -(-len(self.dataset) // config.clips_per_unit))
        # units of another tokenizer, clip list or metric must not end up in one table
        claim_folder(self.folder, {**self._meta(), "data": config.data, "clips_per_unit": config.clips_per_unit})

    @property
    def table_path(self) -> Path:
        return self.folder / "table.safetensors"

    def run(self) -> bool:
        """Work until no unit is free. True if the table is complete; False if others still work on units."""

        def score(unit: int, read: Iterator[tuple[ClipSample, str] | None]) -> None:
            self._scored(unit, [found for found in read if found]).save(self.units.path(unit))

        title, num_readers = f"curating {len(self.dataset)} clips", self.config.num_workers
        return self.units.work_ahead(self._members, self._read, score, self.merge, title, num_readers)

    def merge(self) -> None:
        tables = [QualityTable.load(path, beam=True) for path in self.units.paths]
        names = [name for table in tables for name in table.names]
        files = [file for table in tables for file in table.files or [NO_FILE] * len(table)]
        self._check_unchanged(dict(zip(names, files, strict=True)))
        lpips_BA, psnr_BA, mse_BA = (
            torch.cat([getattr(table, key) for table in tables]) for key in ("lpips_BA", "psnr_BA", "mse_BA")
        )
        rows = [table.row_BR for table in tables if table.row_BR is not None]
        row_BR = torch.cat(rows) if rows else None
        self._table((lpips_BA, psnr_BA, mse_BA), names, files, row_BR).save(self.table_path)
        missing = sorted(set(self.dataset.names) - set(names))
        atomic_write(self.folder / "skipped.json", json.dumps(missing, indent=1).encode())
        print(f"{self.table_path}: {len(names)} clips x {lpips_BA.shape[1]} assignments; {len(missing)} clips skipped")

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

    def _scored(self, unit: int, read: list[tuple[ClipSample, str]]) -> QualityTable:
        """Score one unit. Clips that cannot be read are left out here and counted when the table is merged."""
        names, files = [clip.name for clip, _ in read], [file for _, file in read]
        if not read:
            is_beam = self.config.method == "beam"
            num_rows = beam_rows(self.space, self.config.beam) if is_beam else self.space.num_rows
            nothing = torch.empty(0, num_rows)
            return self._table((nothing, nothing, nothing), names, files, nothing.long() if is_beam else None)
        video_BCTHW = to_video(torch.stack([clip.frames_CTHW for clip, _ in read]), self.tokenizer.device)
        with autocast(self.tokenizer.device, self.config.precision):
            table = self._score(video_BCTHW, unit, names, files)
        if self.config.precision != "none" and self._unchecked:
            self._unchecked = False
            line = equal_choices(table, self._score(video_BCTHW, unit, names, files), self.config.quality_weight)
            print(f"{self.config.precision} against fp32, {line}", flush=True)
        return table

    def _score(self, video_BCTHW: Tensor, unit: int, names: list[str], files: list[str]) -> QualityTable:
        c, row_BR = self.config, None
        if c.method == "brute_force":
            scores = self.scorer.brute_force(video_BCTHW)
        elif c.method == "beam":
            row_BR, scores = self.scorer.beam(video_BCTHW, c.beam, c.quality_weight, self.reward_stats)
        else:
            # of the unit alone, so that the table has the same bytes however the work was shared
            scores = self.scorer.tree(video_BCTHW, c.children, generator_for(0, "children", unit))
        return self._table(scores, names, files, row_BR)

    def _table(self, scores: Scores, names: list[str], files: list[str], row_BR: Tensor | None) -> QualityTable:
        meta = self._meta()
        if row_BR is not None:
            meta["reward_stats"] = asdict(self.reward_stats)
        return QualityTable(*scores, names, self.space.levels, self.space.num_blocks, meta, files, row_BR)

    @cached_property
    def reward_stats(self) -> RewardStats:
        """The statistics that steer a beam: of `stats`, or of a sample, measured by the first process that asks."""
        c = self.config
        if c.stats:
            return stats_of(QualityTable.load(c.stats, beam=True))
        path = self.folder / "reward_stats.json"
        with lock(self.folder / ".reward_stats.lock"):
            if not path.exists():
                atomic_write(path, json.dumps(asdict(self._measured_stats())).encode())
        return from_dict(RewardStats, read_json(path, {}, f"remove it and {self.units.folder}"), str(path))

    def _measured_stats(self) -> RewardStats:
        """Of up to STATS_CLIPS clips spread over the set, each under STATS_ROWS rows drawn uniformly."""
        num = min(STATS_CLIPS, len(self.dataset))
        generator, distances = generator_for(0, "reward_stats"), []
        for _, clip in self.dataset.readable([i * len(self.dataset) // num for i in range(num)]):
            length_BN = self.space.lengths_of(self.space.draw_rows(STATS_ROWS, generator))
            video_BCTHW = clip.video_CTHW.to(self.tokenizer.device).expand(STATS_ROWS, -1, -1, -1, -1)
            distances.append(self.scorer.under(video_BCTHW, length_BN)[0].cpu())
        if not distances:
            raise UserError(f"not one of {num} clips of {', '.join(self.config.data.sources)} can be read")
        return stats_of_sample(torch.cat(distances), self.space)

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
            **({"beam": c.beam, "quality_weight": c.quality_weight, "stats": c.stats} if c.method == "beam" else {}),
            **({"precision": c.precision} if c.precision != "none" else {}),
            "data": to_dict(c.data),
            "clips_sha256": hashlib.sha256(names).hexdigest(),
        }


def beam_rows(space: AssignmentSpace, width: int) -> int:
    """R, the assignments of a clip that a beam measures: all children of the prefixes kept before the last block."""
    return min(width, len(space.levels) ** (space.num_blocks - 1)) * len(space.levels)


def equal_choices(ours: QualityTable, exact: QualityTable, quality_weight: float = 1.2) -> str:
    """How far the scores of the same clips in two precisions agree, in words: equal best rows, largest difference."""
    stats = stats_of(exact)
    rewards = [reward(x.lpips_BA, x.space.tokens_of(x.rows()), quality_weight, stats) for x in (ours, exact)]
    best_B, exact_B = (
        x.rows().gather(1, reward_BA.nan_to_num(-torch.inf).argmax(dim=1, keepdim=True))
        for x, reward_BA in zip((ours, exact), rewards, strict=True)
    )
    num, equal = len(exact_B), int((best_B == exact_B).sum())
    both_BA = ours.rows() == exact.rows()  # beams may hold different rows
    gap = (ours.lpips_BA - exact.lpips_BA).abs().where(both_BA, 0).nan_to_num().max().item()
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
