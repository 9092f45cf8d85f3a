"""Stage 3: train a router on the quality table that stage 2 made (arXiv 2603.12267).

    python -m tokenizer.router.train configs/router/router_w_lpips_1.2_raw.yaml
    python -m tokenizer.router.train configs/mini/router.yaml quality_weight=1.0 labels=soft run.dir=results/router/1.0

The table holds no labels, only the LPIPS of every (clip, assignment): the trade-off, `quality_weight`, is chosen here.
Rerun with the same run.dir to resume, to the same result. A blockwise router (model.kind=blockwise) learns from the
same tables, and from those of a beam.

Letters: B clips of a batch, S clips of a table, C T H W, A assignments (rows), R measured rows of a clip, G drawn ones.

Views of a clip under which the same assignment stays best, or nearly: what a router learns from a small table.

Everything is drawn for the whole global batch and then picked (BatchShard), so the views do not depend on the number of
processes. Letters: B clips of a batch, C T H W, K patches that are seen.
"""

from __future__ import annotations

from tokenizer.common.cli import answer_help, training_parser

ABOUT = "Stage 3: train a router on a quality table."


if __name__ == "__main__":
    answer_help(lambda: training_parser(ABOUT).parse_intermixed_args())  # before torch is imported

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.common import distributed
from tokenizer.common.checkpoint import file_sha256, init_from
from tokenizer.common.clip_shape import check_same_shape, sides
from tokenizer.common.device import generator_for
from tokenizer.common.distributed import BatchShard
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.hub import parameters_by_part
from tokenizer.data.clip_store import FrameCache
from tokenizer.data.clips import ClipDataset, ClipSample, DataConfig, build_dataset, check_used
from tokenizer.data.loader import ClipBatch, batches
from tokenizer.data.video_io import VideoError
from tokenizer.frozen.encoders import marked
from tokenizer.router.blockwise import Rule, block_targets, draw_rows, measure_rows, search
from tokenizer.router.model import Router, RouterConfig
from tokenizer.router.reward import (
    QualityTable,
    best_uniform,
    hard_labels,
    quality,
    reward,
    reward_of_quality,
    reward_percentile,
    soft_labels,
    table_stats,
    threshold_labels,
)
from tokenizer.router.stem import build_stem
from tokenizer.training.cli import parse_training_arguments, rehearse
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig, TrainState
from tokenizer.training.train_step import Values, train_step
from tokenizer.training.trainer import fit, portion, start_run


def zoom_and_turn(
    video_BCTHW: Tensor, crop_scale: float, flip: bool, turns: bool, generator: torch.Generator, shard: BatchShard
) -> Tensor:
    """Each clip zoomed into a random square and, if asked, seen in a mirror or turned; all its frames alike.

    crop_scale: the smallest side of the square as a part of the frame; 1.0 leaves the frame whole.
    flip: left to right with probability 1/2. turns: upside down and along the diagonal too; all eight views with flip.
    """
    num_clips = shard.total
    side_B = 1 - (1 - crop_scale) * torch.rand(num_clips, generator=generator)  # uniform in (crop_scale, 1]
    shift_B2 = (1 - side_B)[:, None] * (2 * torch.rand(num_clips, 2, generator=generator) - 1)
    mirrored_B2 = torch.zeros(num_clips, 2, dtype=torch.bool)  # along x and y
    if flip:
        mirrored_B2[:, 0] = torch.rand(num_clips, generator=generator) < 0.5
    swapped_B = torch.zeros(num_clips, dtype=torch.bool)
    if turns:
        mirrored_B2[:, 1] = torch.rand(num_clips, generator=generator) < 0.5
        swapped_B = torch.rand(num_clips, generator=generator) < 0.5
    if crop_scale == 1:  # whole frames: exact, and without interpolation
        return _mirror(video_BCTHW, shard.pick(mirrored_B2), shard.pick(swapped_B))
    affine_B22 = torch.eye(2).repeat(num_clips, 1, 1)
    affine_B22[swapped_B] = affine_B22[swapped_B].flip(1)
    affine_B22 = affine_B22 * side_B[:, None, None] * torch.where(mirrored_B2, -1.0, 1.0)[..., None]
    affine_B23 = shard.pick(torch.cat([affine_B22, shift_B2[..., None]], dim=2)).to(video_BCTHW.device)
    frames = video_BCTHW.flatten(1, 2)  # [B, C * T, H, W]
    grid = F.affine_grid(affine_B23, list(frames.shape), align_corners=False)  # [B, H, W, 2]
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False).view_as(video_BCTHW)


def _mirror(video_BCTHW: Tensor, mirrored_B2: Tensor, swapped_B: Tensor) -> Tensor:
    """Clips mirrored along x and y, then along the diagonal, each if asked."""
    for axis, flag_B in ((-1, mirrored_B2[:, 0]), (-2, mirrored_B2[:, 1])):
        if flag_B.any():
            flag_B1111 = flag_B.to(video_BCTHW.device)[:, None, None, None, None]
            video_BCTHW = torch.where(flag_B1111, video_BCTHW.flip(axis), video_BCTHW)
    if swapped_B.any():
        flag_B1111 = swapped_B.to(video_BCTHW.device)[:, None, None, None, None]
        video_BCTHW = torch.where(flag_B1111, video_BCTHW.transpose(-1, -2), video_BCTHW)
    return video_BCTHW


def recolour(video_BCTHW: Tensor, generator: torch.Generator, shard: BatchShard) -> Tensor:
    """Each clip with its three colours in a random order and, with probability 1/2, as a negative. Pixels in [0, 1]."""
    device = video_BCTHW.device
    order_B3 = shard.pick(torch.rand(shard.total, 3, generator=generator).argsort(dim=1)).to(device)
    negative_B = shard.pick(torch.rand(shard.total, generator=generator) < 0.5).to(device)
    video_BCTHW = video_BCTHW.take_along_dim(order_B3[..., None, None, None], dim=1)
    return torch.where(negative_B[:, None, None, None, None], 1 - video_BCTHW, video_BCTHW)


def draw_patches(num_patches: int, share: float, generator: torch.Generator, shard: BatchShard) -> Tensor:
    """seen_BK: numbers of the patches that each clip shows, at least one, all different, in no order."""
    num_seen = max(1, round(share * num_patches))
    return shard.pick(torch.rand(shard.total, num_patches, generator=generator).argsort(dim=1)[:, :num_seen])


WITHIN_WEIGHT = 4.0  # of the differences between a clip's rows, see quality_loss


@dataclass
class RouterTrainConfig:
    run: RunConfig = field(default_factory=RunConfig)
    model: RouterConfig = field(default_factory=RouterConfig)
    data: DataConfig = field(default_factory=DataConfig)  # the sources that `table` was made from
    val_data: DataConfig = field(default_factory=lambda: DataConfig(sources=["bundled:heldout"], augment=False))
    optim: OptimConfig = field(default_factory=OptimConfig)
    table: str = ""  # the quality table of `data`, from stage 2
    val_table: str = ""  # the quality table of `val_data`
    quality_weight: float = 1.2  # w_q; the length weighs 2 - w_q
    labels: str = "hard"  # "hard": the best row (the paper); "soft": softmax(reward / temperature); "threshold"; or
    # "quality": the standardised quality of every row that was measured; one router for every quality_weight
    temperature: float = 1.0  # of soft labels, in units of the reward
    threshold: float = 0.0  # of labels "threshold", a baseline: the fewest tokens at this LPIPS or less, else the most
    turns: bool = False  # small tables: clips also upside down and along the diagonal
    colours: bool = False  # small tables: colours in any order, and negatives
    prefixes: int = 16  # of model.kind "blockwise": measured rows of a clip that a step learns from
    seen_patches: float = 1.0  # share of the patches that a training step shows; small tables: 0.1 to 0.25
    feature_cache: str = ""  # with model.stem = vjepa2: a folder for the features, 4 MiB a clip
    clip_cache: str = ""  # folder for the decoded clips, 768 KiB each at 16x128x128; default run.dir/clips
    init_from: str = ""  # another router to start from, of the same shape: .safetensors file or run folder
    table_sha256: str = ""  # of `table`; a run fills it in, so that it never resumes with other labels

    def __post_init__(self) -> None:
        if self.labels not in ("hard", "soft", "threshold", "quality"):
            raise UserError(f"labels = {self.labels!r}: choose 'hard', 'soft', 'threshold' or 'quality'")
        if self.model.kind == "blockwise" and self.labels == "threshold":
            raise UserError("labels = 'threshold' needs model.kind = 'table': choose 'hard', 'soft' or 'quality'")
        if self.run.compile and self.model.kind == "blockwise":
            raise UserError(
                "run.compile compiles whole passes, and model.kind = 'blockwise' goes block by block: leave it"
            )
        if self.temperature <= 0:
            raise UserError(f"temperature = {self.temperature} must be above 0")
        if self.prefixes < 1 or (self.model.kind != "blockwise" and self.prefixes != 16):
            raise UserError(
                f"prefixes = {self.prefixes} must be at least 1, and goes with model.kind = 'blockwise' only"
            )
        if (self.threshold > 0) != (self.labels == "threshold"):
            raise UserError(f"threshold = {self.threshold} goes with labels = 'threshold', not {self.labels!r}")
        if not 0 < self.seen_patches <= 1:
            raise UserError(f"seen_patches = {self.seen_patches} must lie within (0, 1]")
        if self.turns and not isinstance(self.model.size, int):
            raise UserError(f"turns = true exchanges height and width, but model.size = {self.model.size} is no square")
        if (self.turns or self.colours) and not self.data.augment:
            raise UserError("turns and colours change the clips, but data.augment = false: set data.augment=true")
        if self.feature_cache and (self.model.stem != "vjepa2" or self.data.augment):
            raise UserError(
                "feature_cache needs model.stem=vjepa2 and data.augment=false: clips that come again unchanged"
            )
        check_used(self.data, self.val_data)
        for name in ("table", "val_table"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: give the table that scripts/train/2_curate_router_data.sh wrote")
        for name, data in (("data", self.data), ("val_data", self.val_data)):
            check_same_shape(data, name, self.model, "the model")


class TableClips(ClipDataset):
    """The clips that a quality table rates, in its order and exactly as they were rated: never augmented here.

    A file whose content is not the one that was rated counts as unreadable. Raises UserError if the sources lack clips
    of the table.
    """

    def __init__(self, config: DataConfig, seed: int, table: QualityTable, origin: str) -> None:
        found = build_dataset(replace(config, augment=False), seed)
        wanted = set(table.names)
        index_of = {name: index for index, name in enumerate(found.names) if name in wanted}
        missing = [name for name in table.names if name not in index_of]
        if missing:
            raise UserError(
                f"{origin}: {len(missing)} of its {len(table.names)} clips, {missing[0]!r} first, are not among the "
                f"{len(found)} of {', '.join(config.sources)}; give the sources the table was made from"
            )
        super().__init__(found.cfg, seed, found._parts, np.array([index_of[name] for name in table.names]))
        self._files, self._facts = table.files, {"names": list(table.names), "files": table.files}
        self._cache: FrameCache | None = None

    def keep_in(self, folder: Path) -> None:
        """Decode each clip once and keep it in `folder`, for later epochs and other processes."""
        shape = (3, self.cfg.num_frames, *sides(self.cfg.size))
        facts = {**self._facts, "fps": self.cfg.fps, "backend": self.cfg.backend, "sources": self.cfg.sources}
        self._cache = FrameCache(folder, len(self), shape, facts)

    def _read(self, index: int, epoch: int, unreadable: dict[str, str]) -> ClipSample:
        kept = None if self._cache is None else self._cache.get(index)
        if kept is not None:
            frames_CTHW = torch.from_numpy(kept)
            return ClipSample(frames_CTHW, self.names[index], self.labels[index], None, unreadable)
        if self._files and self._files[index] and self.fingerprint(index) != self._files[index]:
            raise VideoError(self.names[index], "is not the file that was rated: its content has changed")
        sample = super()._read(index, epoch, unreadable)
        if self._cache is not None:
            self._cache.put(index, sample.frames_CTHW.numpy())
        return sample


class RouterTraining:
    """One run: the model with what its steps and validations need."""

    def __init__(self, config: RouterTrainConfig) -> None:
        self.config, run = config, config.run
        self.space = config.model.space
        table, val_table = (self._read_table(path) for path in (config.table, config.val_table))
        found = file_sha256(config.table)
        if config.table_sha256 not in ("", found):
            raise UserError(f"table_sha256={config.table_sha256} is not that of {config.table}, {found}")
        config.table_sha256 = found
        self.clips = TableClips(config.data, run.seed, table, config.table)
        self.val_clips = TableClips(config.val_data, run.seed, val_table, config.val_table)
        check_rows(config, table, val_table)
        # those of training rate both sets, or a weight would mean two things
        self.table_stats = stats = table_stats(table)
        self.val_rows, self.rows_SR = val_table.rows(), table.rows()
        self.reward_SA, self.val_reward_SA = (
            reward(each.lpips_BA, self.space.tokens_of(each.rows()), config.quality_weight, stats)
            for each in (table, val_table)
        )
        self.lpips_SA, self.quality_SA = table.lpips_BA, quality(table.lpips_BA, stats).float()
        self.row_of = {name: row for row, name in enumerate(table.names)}
        self.stem = build_stem(config.model, start_run(run), config.feature_cache)
        router = Router.build(config.model)
        self.source_sha256 = init_from(router, config.init_from) if config.init_from else ""
        self.stem.sign(router)
        kind = marked("router", ["V-JEPA 2"] if self.stem.is_random else [])
        self.state = TrainState.start(router, run, config.optim, kind)

    def batches(self, step: int) -> Iterator[ClipBatch]:
        run = self.config.run
        return batches(self.clips, run.batch_size, run.seed, step, run.num_workers, accumulate=run.accumulate)

    def train_step(self, batch: ClipBatch) -> Values:
        return train_step(self.config.run, self.state, batch, self.loss)

    def loss(self, batch: ClipBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of the scores against the labels, soft or hard; of qualities the mean squared error."""
        config, data, device = self.config, self.config.data, self.state.device
        video_BCTHW = batch.video(device)
        generator, shard = generator_for(config.run.seed, "augment", step), batch.shard
        if data.augment:
            video_BCTHW = zoom_and_turn(video_BCTHW, data.crop_scale, data.flip, config.turns, generator, shard)
        if config.colours:
            video_BCTHW = recolour(video_BCTHW, generator, shard)
        seen_BK = None
        if config.seen_patches < 1:
            seen_BK = draw_patches(config.model.num_places, config.seen_patches, generator, shard).to(device)
        clip_B = [self.row_of[name] for name in batch.names]
        if config.model.kind == "blockwise":
            random_BR = shard.pick(torch.rand(shard.total, self.rows_SR.shape[1], generator=generator))
            loss, agreement = self._block_loss(video_BCTHW, seen_BK, clip_B, random_BR)
            return loss, {"agreement": agreement}
        logits_BA = self.state.model(self.stem(video_BCTHW), seen_BK).float()
        if config.labels == "quality":
            return quality_loss(logits_BA, self.quality_SA[clip_B].to(device)), {**self.mark}
        loss = F.cross_entropy(logits_BA, self._labels(clip_B).to(device))
        figures = {"percentile": _percentile(logits_BA, self.reward_SA[clip_B], self.space)}
        return loss, figures | self.mark

    def _block_loss(
        self, video_BCTHW: Tensor, seen_BK: Tensor | None, clip_B: list[int], random_BR: Tensor
    ) -> tuple[Tensor, float]:
        """The loss of a blockwise router, and how often its best level is that of the labels."""
        config, device, num_levels = self.config, self.state.device, len(self.space.levels)
        place_BRN = self.space.places_of(self.rows_SR[clip_B])
        measured_BR = ~self.quality_SA[clip_B].isnan()
        index_BG = draw_rows(measured_BR, config.prefixes, random_BR)
        drawn_BGN = place_BRN.take_along_dim(index_BG[..., None], dim=1)
        if config.labels == "quality":
            value_BR, reduce = self.quality_SA[clip_B], "mean"
        else:
            value_BR, reduce = self.reward_SA[clip_B], "max"
            if config.labels == "soft":
                value_BR, reduce = value_BR / config.temperature, "logsumexp"
        target_BGNm = block_targets(value_BR, place_BRN, index_BG, num_levels, reduce).to(device)
        out_BGNm = self.state.model(self.stem(video_BCTHW), seen_BK, drawn_BGN.to(device)).float()
        wanted_BGN = target_BGNm.nan_to_num(-torch.inf).argmax(dim=-1)
        agreement = (out_BGNm.argmax(dim=-1) == wanted_BGN).float().mean().item()
        if config.labels == "quality":
            return quality_loss(out_BGNm.flatten(1), target_BGNm.float().flatten(1)), agreement
        labels = wanted_BGN.flatten() if reduce == "max" else target_BGNm.softmax(dim=-1).float().flatten(0, 2)
        return F.cross_entropy(out_BGNm.flatten(0, 2), labels), agreement

    def validate(self, step: int) -> dict[str, float]:
        """What the router does on the clips of the validation table, see `measure`."""
        num, at_once = len(self.val_clips), portion(self.config.run)
        own = distributed.own_part(num)
        readable: list[int] = []
        scores: list[Tensor] = []
        for start in range(own.start, own.stop, at_once):
            clips = self._validation_clips(range(start, min(start + at_once, own.stop)))
            if clips:
                readable += clips
                seen = self.stem(torch.stack([*clips.values()]).to(self.state.device))
                scores.append(self.state.model(seen).float().cpu())
        c = self.config.model
        shape = (c.num_blocks, c.width) if c.kind == "blockwise" else (self.space.num_rows,)
        score_SA = distributed.rows_of_all(torch.cat([torch.zeros(0, *shape), *scores]))  # [own clips, ..] -> [S, ..]
        readable = distributed.rows_of_all(torch.tensor(readable, dtype=torch.long)).tolist()
        if not readable:
            raise UserError(f"val_data: not one of {num} clips can be read; make it name the clips of val_table")
        lost = {"unreadable": float(num - len(readable))} if len(readable) < num else {}
        reward_SA = self.val_reward_SA[readable]
        if c.kind == "blockwise":
            return measure_rows(self._best_rows(score_SA), self.val_rows[readable], reward_SA, self.space) | lost
        if self.config.labels == "quality":
            score_SA = reward_of_quality(score_SA, self.space, self.config.quality_weight)
        return measure(score_SA, reward_SA, self.space) | lost | self.mark

    def _best_rows(self, state_SND: Tensor) -> Tensor:
        """row_S of a blockwise router, each block decided without look-ahead."""
        w_q = self.config.quality_weight if self.config.labels == "quality" else None
        head: Any = copy.deepcopy(self.state.model.head)
        return search(state_SND, head.double().cpu(), Rule(self.space, w_q), width=1)[:, 0]

    def fit(self) -> None:
        """Train to `run.steps`, from the newest checkpoint in `run.dir` if there is one."""
        config = self.config
        for clips in (self.clips, self.val_clips):
            clips.keep_in(Path(config.clip_cache or f"{config.run.dir}/clips"))
        noted: dict[str, Any] = {"init_from_sha256": self.source_sha256} if self.source_sha256 else {}
        if config.labels == "quality":
            noted["table_stats"] = asdict(self.table_stats)  # so that predictions can be read as distances
        fit(config.run, config, self.state, self.batches, self.train_step, self.validate, noted=noted)

    def rehearse(self) -> None:
        config, parts = self.config, parameters_by_part(self.state.model)
        rehearse(config.run, self.state, self.batches, self.train_step, parts)

    @property
    def mark(self) -> dict[str, float]:
        """What every log line adds if V-JEPA 2 has random weights."""
        return {"random_frozen_encoders": 1.0} if self.stem.is_random else {}

    def _validation_clips(self, places: range) -> dict[int, Tensor]:
        """Those that can be read, by their place in the table; another clip would be rated by the wrong row."""
        return {place: clip.video_CTHW for place, clip in self.val_clips.readable(places)}

    def _read_table(self, path: str) -> QualityTable:
        table = QualityTable.load(path, beam=self.config.model.kind == "blockwise")
        if tuple(table.levels) != self.space.levels or table.num_blocks != self.space.num_blocks:
            raise UserError(
                f"{path} rates levels {list(table.levels)} for {table.num_blocks} blocks, but model.levels are "
                f"{list(self.space.levels)} for {self.space.num_blocks} blocks"
            )
        return table

    def _labels(self, clip_B: list[int]) -> Tensor:
        """Rows int64 (B,) or probabilities float32 (B, A), of these clips of the table; cross-entropy takes either."""
        if self.config.labels == "threshold":
            return threshold_labels(self.lpips_SA[clip_B], self.space.tokens_A, self.config.threshold)
        if self.config.labels == "hard":
            return hard_labels(self.reward_SA[clip_B])
        return soft_labels(self.reward_SA[clip_B], self.config.temperature).float()


def quality_loss(quality_BA: Tensor, wanted_BA: Tensor) -> Tensor:
    """Mean squared error over the measured assignments (the others are NaN), of each clip's mean and of the rest.

    The rest, how the rows of a clip differ, is all that a choice looks at, but it varies less than clips do.
    """
    there_BA = ~wanted_BA.isnan()
    gap_BA = torch.where(there_BA, quality_BA - wanted_BA, 0.0)
    num_B1 = there_BA.sum(dim=1, keepdim=True)
    mean_B1 = gap_BA.sum(dim=1, keepdim=True) / num_B1
    within = (torch.where(there_BA, gap_BA - mean_B1, 0.0).square().sum(dim=1, keepdim=True) / num_B1).mean()
    return WITHIN_WEIGHT * within + mean_B1.square().mean()


def check_rows(config: RouterTrainConfig, table: QualityTable, val_table: QualityTable) -> None:
    """Raises UserError if a table lacks rows that the labels or the validation need."""
    thinned = (table.row_BR is None and not table.is_whole, val_table.row_BR is None and not val_table.is_whole)
    if (thinned[0] and config.labels != "quality") or thinned[1]:
        path = config.val_table if thinned[1] else config.table
        raise UserError(f"{path} lacks assignments (children): only the training table of labels=quality may")
    if table.row_BR is None:
        return
    if config.labels == "quality":
        raise UserError(f"{config.table} holds the best assignments alone (method=beam): choose labels=soft or hard")
    if (steered := table.meta.get("quality_weight")) != config.quality_weight:
        raise UserError(
            f"{config.table} was curated by a beam at quality_weight = {steered}, not {config.quality_weight}: curate "
            "it again, or change quality_weight"
        )


def measure(score_SA: Tensor, reward_SA: Tensor, space: AssignmentSpace) -> dict[str, float]:
    """The argmax router against the best rows: top-1, top-5, reward percentile, mean tokens, and what it must beat.

    `best_uniform` gives every block of every clip the same level, the one that does best on these very clips.
    """
    best_S = reward_SA.argmax(dim=1)
    top5_S5 = score_SA.topk(min(5, space.num_rows), dim=1).indices
    return {
        "top1": (space.best_row(score_SA) == best_S).double().mean().item(),
        "top5": (top5_S5 == best_S[:, None]).any(dim=1).double().mean().item(),
        "percentile": _percentile(score_SA, reward_SA, space),
        "best_uniform": best_uniform(reward_SA, space)[1],
        "mean_tokens": space.tokens_A[space.best_row(score_SA)].double().mean().item(),
        "best_tokens": space.tokens_A[best_S].double().mean().item(),
    }


def _percentile(score_BA: Tensor, reward_BA: Tensor, space: AssignmentSpace) -> float:
    return reward_percentile(reward_BA, space.best_row(score_BA.detach()))


def main() -> None:
    config, dry = parse_training_arguments(RouterTrainConfig, "router", ABOUT)
    training = RouterTraining(config)
    training.rehearse() if dry else training.fit()


if __name__ == "__main__":
    run_cli(main)
