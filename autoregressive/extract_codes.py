"""Tokenize a set of clips once, into a ragged token archive that a GPT trains on.

    python -m autoregressive.extract_codes configs/mini/extract_c2v.yaml       # as many at once as there are cores

Class-to-video: the router chooses each clip's assignment, and the clip keeps its label. Frame prediction
(`condition_lengths`): the best assignment of those that begin with these lengths, and the given frames are encoded
beside the clip. `views` draws that many crops, flips and starts of every clip.

Work is shared and resumed as in stage 2: each shard of the archive is a unit (tokenizer/common/work_units.py).
"""

from __future__ import annotations

from tokenizer.common.cli import answer_help, work_parser

ABOUT = "Stage 5a: tokenize a set of clips into an archive that a GPT trains on."


if __name__ == "__main__":
    answer_help(lambda: work_parser(ABOUT).parse_intermixed_args())  # before torch is imported

import difflib
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoregressive.condition import check_condition, class_order, encode_condition
from autoregressive.sequence import ClipCodes
from autoregressive.token_archive import ArchivedClip, ArchiveFacts, TokenArchive, save_archive, save_shard
from tokenizer.assignment import AssignmentSpace
from tokenizer.budget import Budget, parse_budget
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.clip_shape import check_same_shape
from tokenizer.common.config import defaults_of, to_dict
from tokenizer.common.device import autocast, batches_at_once, pick_device, pick_dtype, to_video
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.work_units import WorkUnits, claim_folder, map_ahead
from tokenizer.data.clips import ClipDataset, ClipSample, DataConfig, build_datasets
from tokenizer.data.video_io import VideoError
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import TrainedRouter, check_router_fits, load_router
from tokenizer.training.cli import parse_work_arguments


@dataclass
class ExtractConfig:
    dir: str = ""  # results folder; default results/extract/<config name>
    tokenizer: str = ""  # the final tokenizer of stage 4: .safetensors file or run folder
    router: str = ""  # the router of stage 3; empty for a budget that asks none
    budget: str = "router"  # or tokens:N, price:P, quality:Q, uniform:K, fixed:a,b,c,d; see tokenizer/budget.py
    trade_off: float | None = None  # w_q of a router trained with labels=quality; None: that of its training
    data: DataConfig = field(default_factory=DataConfig)
    views: int = 1  # how often every clip is drawn anew: crop, flip and start; above 1 needs data.augment
    seed: int = 0
    labels: list[str] = field(default_factory=list)  # one for each source, "" keeps the clips' own; empty keeps all
    class_names: list[str] = field(
        default_factory=list
    )  # in the order of their numbers; empty: those found, see class_order
    condition_lengths: list[int] = field(default_factory=list)  # frame prediction: tokens of each given block
    condition_frames: int = 0  # frame prediction: frames that are given, e.g. 5
    clips_per_shard: int = 1024
    batch_size: int = 8
    device: str = "auto"
    precision: str = "none"  # of the tokenizer: none (fp32), bf16 or fp16; the share of equal codes is printed
    num_threads: int | None = None
    num_workers: int = 4  # batches that are read at once, ahead of the device

    def __post_init__(self) -> None:
        pick_dtype(self.precision)
        if not self.tokenizer:
            raise UserError("tokenizer is empty: give the tokenizer that stage 4 trained")
        if min(self.views, self.clips_per_shard, self.batch_size) < 1:
            raise UserError("views, clips_per_shard and batch_size must be at least 1")
        if self.views > 1 and not self.data.augment:
            raise UserError(f"views = {self.views} would be copies: set data.augment=true or views=1")
        if self.data.repeat and len(self.data.repeat) != len(self.data.sources):
            raise UserError(f"data.repeat = {self.data.repeat} must hold one for each of data.sources")
        if self.labels and len(self.labels) != len(self.data.sources):
            raise UserError(f"labels = {self.labels} must hold one for each of {len(self.data.sources)} data.sources")
        if bool(self.condition_lengths) != bool(self.condition_frames):
            raise UserError("condition_lengths and condition_frames go together: e.g. [512, 128] and 5")
        if self.condition_lengths and (self.labels or self.class_names):
            raise UserError("labels and class_names are for class-to-video; frame prediction reads no class")


@dataclass(frozen=True)
class _Draw:
    """One clip to be tokenized: view `view` of clip `index` of a source."""

    dataset: ClipDataset
    index: int
    view: int
    label: str | None

    def read(self) -> ClipSample | None:
        """None if it cannot be read. Every draw is tried: another view may miss a damaged spot of the same file."""
        try:
            return self.dataset.get_this(self.index, epoch=self.view)
        except VideoError as error:
            print(f"skipped {error} (view {self.view})", file=sys.stderr, flush=True)
            return None


_Read = list[tuple[_Draw, ClipSample]]


def _read_batch(batch: list[_Draw]) -> _Read:
    """Those that can be read. In a thread, ahead of the device."""
    return [(draw, sample) for draw in batch if (sample := draw.read()) is not None]


class Extraction:
    """One archive in the making."""

    def __init__(self, config: ExtractConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config, self.folder = config, Path(config.dir)
        device = pick_device(config.device)
        self.tokenizer = load_tokenizer(config.tokenizer, device)
        self._check_fits()
        self.budget = parse_budget(config.budget, self.tokenizer.space, config.trade_off)
        self.router = self._load_router(device)
        self.draws = list(self._list_draws())
        self.facts = self._facts()
        self._unchecked = config.precision != "none"  # the first batch of a process shows what it changes
        self.units = WorkUnits(self.folder / "shards", -(-len(self.draws) // config.clips_per_shard))

    def run(self) -> bool:
        """Work until no shard is free. True if the archive is complete; False if others still work on shards."""
        claim_folder(self.folder, self._made_from(), defaults=defaults_of(ArchiveFacts))
        title, num_readers = f"tokenizing {len(self.draws)} clips", self.config.num_workers
        return self.units.work_ahead(self._batches, _read_batch, self._extract_shard, self.finish, title, num_readers)

    def finish(self) -> None:
        """All shards are there: declare them to be the archive."""
        save_archive(self.folder, self.facts, self.units.paths)
        archive = TokenArchive(self.folder)
        done = {archive.source(i) for i in range(len(archive))}
        lost = sorted({(d.dataset.names[d.index], d.view) for d in self.draws} - done)
        atomic_write(
            self.folder / "skipped.json",
            json.dumps([{"name": name, "view": view} for name, view in lost], indent=1).encode(),
        )
        sources = len({name for name, _ in lost})
        print(f"{archive.summary()}; {len(lost)} clips of {sources} sources skipped", flush=True)

    def _batches(self, unit: int) -> Iterator[list[_Draw]]:
        size, batch = self.config.clips_per_shard, self.config.batch_size
        mine = self.draws[unit * size : (unit + 1) * size]
        return (mine[start : start + batch] for start in range(0, len(mine), batch))

    def _extract_shard(self, unit: int, batches: Iterator[_Read]) -> None:
        made = map_ahead(self._tokenize, filter(None, batches), batches_at_once(self.tokenizer.device))
        with closing(made):
            save_shard(self.units.path(unit), [clip for clips in made for clip in clips], self.facts)

    def _tokenize(self, read: _Read) -> list[ArchivedClip]:
        """A batch; clips that could not be read are missing here and named when the archive is finished."""
        video_BCTHW = to_video(torch.stack([sample.frames_CTHW for _, sample in read]), self.tokenizer.device)
        c, names = self.config, self.facts.class_names
        with autocast(self.tokenizer.device, c.precision):
            length_BN = choose_lengths(video_BCTHW, self.tokenizer.space, self.budget, self.router, c.condition_lengths)
            code_L = self.tokenizer.encode(video_BCTHW, length_BN).code_L
            condition_BL = torch.empty(len(read), 0, dtype=torch.long)
            if c.condition_lengths:
                condition_BL = encode_condition(self.tokenizer, video_BCTHW, c.condition_frames, c.condition_lengths)
        if self._unchecked:
            self._unchecked = False
            same = (self.tokenizer.encode(video_BCTHW, length_BN).code_L == code_L).float().mean()
            print(f"{c.precision} against fp32, first {len(read)} clips: {same:.2%} of the codes are equal", flush=True)
        clips = []
        for (draw, sample), own_L, lengths, condition_L in zip(
            read, code_L.split(length_BN.sum(dim=1).tolist()), length_BN.tolist(), condition_BL, strict=True
        ):
            label = names.index(draw.label) if names and draw.label else None
            clips.append(ArchivedClip(ClipCodes(own_L, tuple(lengths), label, condition_L), sample.name, draw.view))
        return clips

    # --- the work to do, checked before it begins ------------------------------------------------------------------

    def _list_draws(self) -> Iterator[_Draw]:
        """View by view, source by source, so that the first part of an archive is a whole set."""
        c = self.config
        labels = c.labels or [""] * len(c.data.sources)
        parts = list(zip(build_datasets(c.data, c.seed), labels, strict=True))
        for view in range(c.views):
            for dataset, label in parts:
                for index, own in enumerate(dataset.labels):
                    yield _Draw(dataset, index, view, None if c.condition_lengths else label or own)

    def _facts(self) -> ArchiveFacts:
        t, c = self.tokenizer.config, self.config
        return ArchiveFacts(
            codebook_size=t.codebook_size,
            levels=list(t.levels),
            num_blocks=t.num_blocks,
            num_frames=t.num_frames,
            size=t.size,
            tokenizer_sha256=self.tokenizer.sha256,
            router_sha256=self.router.sha256 if self.router else "",
            budget=c.budget,
            trade_off=self.router.trade_off(self.budget) if self.router else None,
            class_names=self._class_names(),
            condition_lengths=c.condition_lengths,
            condition_frames=c.condition_frames,
            precision=c.precision,
        )

    def _class_names(self) -> list[str]:
        """Raises UserError for labels outside the given names, and if only some clips have labels."""
        found = {draw.label for draw in self.draws if draw.label is not None}
        names = self.config.class_names or class_order(found)
        for strange in sorted(found - set(names)):
            near = difflib.get_close_matches(strange, names, n=1) or names[:1]
            raise UserError(f"class_names has no {strange!r}, the label of some clips; the nearest is {near[0]!r}")
        without = next((draw for draw in self.draws if draw.label is None), None)
        if names and without is not None:
            name = without.dataset.names[without.index]
            raise UserError(f"{name} has no label; give one to its source: labels=[..], one for each of data.sources")
        return names

    def _check_fits(self) -> None:
        c, t = self.config, self.tokenizer.config
        if not t.is_discrete:
            raise UserError(
                f"{c.tokenizer} has model.bottleneck = {t.bottleneck!r}, which is continuous: a GPT needs codes, "
                "so give a tokenizer with 'vq' or 'fsq'"
            )
        check_same_shape(c.data, "data", t, c.tokenizer)
        if c.condition_lengths:
            check_condition(t, c.condition_frames, c.condition_lengths)

    def _load_router(self, device: torch.device) -> TrainedRouter | None:
        c = self.config
        if self.budget.average_tokens is not None:
            raise UserError(f"budget = {c.budget!r} needs the whole set at once; use price:P or tokens:N here")
        if bool(c.router) != self.budget.needs_router:
            raise UserError(
                f"budget = {c.budget!r} needs a router: give router=FILE"
                if self.budget.needs_router
                else f"router is set, but budget = {c.budget!r} does not ask it"
            )
        if not c.router:
            return None
        router = load_router(c.router, device, quality_weight=c.trade_off)
        check_router_fits(router, self.tokenizer.config)
        router.check_budget(self.budget)
        return router

    def _made_from(self) -> dict[str, Any]:
        names = "\0".join(f"{d.dataset.names[d.index]}\0{d.label}" for d in self.draws)
        keys = ("views", "seed", "clips_per_shard", "batch_size")
        return {
            **to_dict(self.facts),
            **{key: getattr(self.config, key) for key in keys},
            "data": self.config.data,
            "clips_sha256": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
        }


def choose_lengths(
    video_BCTHW: Tensor,
    space: AssignmentSpace,
    budget: Budget,
    router: TrainedRouter | None,
    prefix: list[int],
) -> Tensor:
    """length_BN: the budget's choice for each clip; with a prefix, the best of the assignments that begin with it.

    Warns of clips for which no assignment is predicted to keep quality:Q.
    """
    if router is None:
        assert budget.fixed_row is not None
        length_BN = space.lengths_of(torch.full((len(video_BCTHW),), budget.fixed_row))
        if length_BN[0, : len(prefix)].tolist() != prefix:
            raise UserError(f"budget {budget.text!r} does not begin with condition_lengths = {prefix}")
        return length_BN
    return router.assign(video_BCTHW, budget, prefix=prefix)


def main() -> None:
    config, dry_run = parse_work_arguments(ExtractConfig, "extract", ABOUT)
    extraction = Extraction(config)
    if dry_run:
        done, units = extraction.units.num_done(), extraction.units.num_units
        print(f"{len(extraction.draws)} clips in {units} shards, {done} done, into {config.dir}")
    elif not extraction.run():
        print(f"no shard is free; others are at work in {config.dir}, the last of them finishes the archive")


if __name__ == "__main__":
    run_cli(main)
