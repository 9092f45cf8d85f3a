"""Stage 3: train a router on the quality table that stage 2 made (paper.md sections 1 and 4).

    python -m tokenizer.router.train configs/router/router_w_lpips_1.2_raw.yaml
    python -m tokenizer.router.train configs/mini/router.yaml quality_weight=1.0 labels=soft run.dir=results/router/1.0

The table holds no labels, only the LPIPS of every (clip, assignment): the trade-off, `quality_weight`, is chosen here.
Started again with the same run.dir it resumes by itself, to the same result.

Letters: B clips of a batch, S clips of a table, C T H W, A assignments (rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.config import to_dict
from tokenizer.common.entry import parse_training_arguments, rehearse
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.loop import RunConfig, TrainState, fit, start_run
from tokenizer.common.optim import OptimConfig
from tokenizer.common.runtime import generator_for
from tokenizer.common.sharing import Places
from tokenizer.data.clips import ClipDataset, ClipSample, DataConfig, build_dataset
from tokenizer.data.loader import ClipBatch, batches
from tokenizer.model import parameters_by_part
from tokenizer.router.labels import hard_labels, soft_labels
from tokenizer.router.model import Router, RouterConfig
from tokenizer.router.reward import best_uniform, reward, reward_percentile, stats_of
from tokenizer.router.table import QualityTable

KEPT_BYTES = 1 << 29  # clips kept in memory after their first reading; all of a small table


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
    labels: str = "hard"  # "hard": the best row (the paper); "soft": softmax(reward / temperature) over all rows
    temperature: float = 1.0  # of soft labels, in units of the reward

    def __post_init__(self) -> None:
        if self.labels not in ("hard", "soft"):
            raise UserError(f"labels = {self.labels!r}: choose 'hard' or 'soft'")
        for name in ("table", "val_table"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty: give the table that scripts/train/2_curate_router_data.sh wrote")
        for name, data in (("data", self.data), ("val_data", self.val_data)):
            if (data.num_frames, data.size) != (self.model.num_frames, self.model.size):
                raise UserError(
                    f"{name} gives clips of {data.num_frames} frames of {data.size} pixels, but the model reads "
                    f"{self.model.num_frames} frames of {self.model.size} pixels"
                )


class TableClips(ClipDataset):
    """The clips that a quality table rates, in its order and exactly as they were rated: never augmented here.

    Raises UserError where the sources lack clips of the table.
    """

    def __init__(self, config: DataConfig, seed: int, table: QualityTable, origin: str) -> None:
        found = build_dataset(replace(config, augment=False), seed)
        index_of = {name: index for index, name in enumerate(found.names)}
        missing = [name for name in table.names if name not in index_of]
        if missing:
            raise UserError(
                f"{origin}: {len(missing)} of its {len(table.names)} clips, {missing[0]!r} first, are not among the "
                f"{len(found)} of {', '.join(config.sources)}; give the sources the table was made from"
            )
        super().__init__(found.cfg, seed, [found._items[index_of[name]] for name in table.names])
        self._kept: dict[int, ClipSample] = {}

    def get(self, index: int, epoch: int = 0) -> ClipSample:
        """Clip `index`, the same in every epoch. A small set is decoded once and then kept as bytes."""
        kept = self._kept.get(index)
        if kept is None:
            sample = super().get(index)
            kept = replace(sample, video_CTHW=(sample.video_CTHW * 255).round().to(torch.uint8))
            if (len(self._kept) + 1) * kept.video_CTHW.numel() <= KEPT_BYTES:
                self._kept[index] = kept
        return replace(kept, video_CTHW=kept.video_CTHW.float() / 255)


class RouterTraining:
    """One run: the model with what its steps and validations need."""

    def __init__(self, config: RouterTrainConfig) -> None:
        self.config, run = config, config.run
        self.space = config.model.space
        table, val_table = (self._read_table(path) for path in (config.table, config.val_table))
        self.clips = TableClips(config.data, run.seed, table, config.table)
        self.val_clips = TableClips(config.val_data, run.seed, val_table, config.val_table)
        stats = stats_of(table)  # those of training rate both sets, or a weight would mean two things
        self.reward_SA, self.val_reward_SA = (
            reward(each.lpips_BA, self.space.tokens_A, config.quality_weight, stats) for each in (table, val_table)
        )
        self.row_of = {name: row for row, name in enumerate(table.names)}
        start_run(run)
        self.state = TrainState.start(Router(config.model), run, config.optim, kind="router")

    def batches(self, step: int) -> Iterator[ClipBatch]:
        run = self.config.run
        return batches(self.clips, run.batch_size, run.seed, step, run.num_workers, accumulate=run.accumulate)

    def loss(self, batch: ClipBatch, step: int) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of the scores against the labels, soft or hard."""
        data, device = self.config.data, self.state.device
        video_BCTHW = batch.video_BCTHW
        if data.augment:
            generator = generator_for(self.config.run.seed, "augment", step)
            video_BCTHW = augment(video_BCTHW, data.crop_scale, data.flip, generator, batch.places)
        reward_BA = self.reward_SA[[self.row_of[name] for name in batch.names]]
        logits_BA = self.state.model(video_BCTHW.to(device)).float()
        loss = F.cross_entropy(logits_BA, self._labels(reward_BA).to(device))
        return loss, {"percentile": _percentile(logits_BA, reward_BA, self.space)}

    def validate(self, step: int) -> dict[str, float]:
        """What the router does on the clips of the validation table, see `measure`."""
        size = self.config.run.batch_size
        scores = []
        for start in range(0, len(self.val_clips), size):
            clips = [self.val_clips.get(i).video_CTHW for i in range(start, min(start + size, len(self.val_clips)))]
            scores.append(self.state.model(torch.stack(clips).to(self.state.device)).float().cpu())
        return measure(torch.cat(scores), self.val_reward_SA, self.space)

    def fit(self) -> None:
        """Train to the end of `run.steps`, from wherever `run.dir` stands."""
        config = self.config
        fit(config.run, config.optim, to_dict(config), self.state, self.batches, self.loss, self.validate)

    def rehearse(self) -> None:
        """`--dry-run`: two steps, nothing written."""
        config, parts = self.config, parameters_by_part(self.state.model)
        rehearse(config.run, config.optim, self.state, self.batches, self.loss, parts)

    def _read_table(self, path: str) -> QualityTable:
        table = QualityTable.load(path)
        if tuple(table.levels) != self.space.levels or table.num_blocks != self.space.num_blocks:
            raise UserError(
                f"{path} rates levels {list(table.levels)} for {table.num_blocks} blocks, but model.levels are "
                f"{list(self.space.levels)} for {self.space.num_blocks} blocks"
            )
        return table

    def _labels(self, reward_BA: Tensor) -> Tensor:
        """Rows int64 (B,) or probabilities float32 (B, A); cross-entropy takes either."""
        if self.config.labels == "hard":
            return hard_labels(reward_BA)
        return soft_labels(reward_BA, self.config.temperature).float()


def augment(
    video_BCTHW: Tensor, crop_scale: float, flip: bool, generator: torch.Generator, places: Places | None = None
) -> Tensor:
    """Each clip flipped left to right with probability 1/2 and zoomed into a random square, all its frames alike.

    Neither changes which assignment is best (a zoom hardly). crop_scale: the smallest side of the square as a part of
    the frame; 1.0 leaves the frame whole. places: where the clips stand in the global batch, if they are not all of it.
    """
    places = places or Places(list(range(len(video_BCTHW))), len(video_BCTHW))
    num_clips = places.total
    side_B = 1 - (1 - crop_scale) * torch.rand(num_clips, generator=generator)
    shift_B2 = (1 - side_B)[:, None] * (2 * torch.rand(num_clips, 2, generator=generator) - 1)
    sign_B = torch.where(torch.rand(num_clips, generator=generator) < 0.5, -1.0, 1.0) if flip else torch.ones(num_clips)
    affine_B23 = torch.zeros(num_clips, 2, 3)
    affine_B23[:, 0, 0], affine_B23[:, 1, 1], affine_B23[:, :, 2] = side_B * sign_B, side_B, shift_B2
    frames = video_BCTHW.flatten(1, 2)  # B C*T H W
    grid = F.affine_grid(places.pick(affine_B23), list(frames.shape), align_corners=False)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False).view_as(video_BCTHW)


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
    config, dry = parse_training_arguments(RouterTrainConfig, "router", "Stage 3: train a router on a quality table.")
    training = RouterTraining(config)
    training.rehearse() if dry else training.fit()


if __name__ == "__main__":
    run_cli(main)
