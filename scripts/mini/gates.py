"""The gates of a release: what the shipped miniature must reach, and what it reaches.

    python scripts/mini/release.py                # compute and print them for ckpts/mini

Real clips are the bundled held-out ones; test clips are those of `test_table.safetensors` (levels that no training has
seen). A gate whose data are missing is printed as not measured and counts as missed.

Letters: B clips, A assignments, N temporal blocks, C T H W.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluations.metrics.bootstrap import bootstrap
from tokenizer.common.image_quality import motion, psnr
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.video_io import to_uint8
from tokenizer.losses.perceptual import load_perceptual
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import load_router
from tokenizer.router.results import rank_correlation
from tokenizer.router.reward import QualityTable, RewardStats, reward

_BATCH = 8


@dataclass(frozen=True)
class Rated:
    """Clips with a row from the router and the reward of every row by the table."""

    video_BCTHW: Tensor
    row_B: Tensor
    tokens_B: Tensor  # of the router's rows
    reward_BA: Tensor
    best_tokens_B: Tensor
    motion_B: list[float]
    constant_row: int  # best single row, chosen on training clips if the table names it

    def gain(self, index_S: np.ndarray) -> float | None:
        """(router - constant) / (best rows - constant) over some clips; None if no row beats the constant one."""
        reward_SA, row_S = self.reward_BA[index_S], self.row_B[index_S]
        constant = reward_SA[:, self.constant_row].mean()
        possible = float(reward_SA.amax(dim=1).mean() - constant)
        realised = float(reward_SA.gather(1, row_S[:, None]).mean() - constant)
        return realised / possible if possible > 0 else None


class Miniature:
    """The files of a folder, loaded when a gate needs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder / "final.safetensors")

    @cached_property
    def router(self) -> Any:
        return load_router(self.folder / "router.safetensors")

    @cached_property
    def generation(self) -> dict[str, Any] | None:
        """figures_generation.json, None before the GPTs are measured."""
        path = self.folder / "figures_generation.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @cached_property
    def real(self) -> Rated | None:
        return self._rated("heldout_table.safetensors", "bundled/")

    @cached_property
    def test(self) -> Rated | None:
        return self._rated("test_table.safetensors", "")

    def rows_of(self, video_BCTHW: Tensor) -> Tensor:
        """The router's row of each clip."""
        scores = [self.router.scores(some) for some in video_BCTHW.split(_BATCH)]
        return self.router.space.best_row(torch.cat(scores))

    def tokens_of(self, video_BCTHW: Tensor) -> Tensor:
        """Tokens that the router gives each clip."""
        return self.router.space.tokens_A[self.rows_of(video_BCTHW)]

    @torch.inference_mode()
    def quality(self, video_BCTHW: Tensor, row_B: Tensor) -> tuple[float, float]:
        """(PSNR in dB, stlpips_alex) of the reconstructions under these rows, means over clips."""
        perceptual, decibel, distance = load_perceptual("stlpips_alex"), [], []
        for video, row in zip(video_BCTHW.split(_BATCH), row_B.split(_BATCH), strict=True):
            ours = self.tokenizer.decode(self.tokenizer.encode(video, self.tokenizer.space.lengths_of(row)))
            decibel.append(psnr(ours, video))
            distance.append(perceptual.clip_distance(ours, video))
        return float(torch.cat(decibel).mean()), float(torch.cat(distance).mean())

    def _rated(self, file: str, prefix: str) -> Rated | None:
        if not (self.folder / file).is_file():
            return None
        table = QualityTable.load(self.folder / file)
        if not table.is_whole:  # the best rows are not known
            return None
        clips = build_dataset(DataConfig(**table.meta["data"]))
        place = {name: i for i, name in enumerate(clips.names)}
        chosen = [i for i, name in enumerate(table.names) if name.startswith(prefix)]
        video = torch.stack([clips.get_this(place[table.names[i]]).video_CTHW for i in chosen])
        stats = RewardStats(**table.meta["reward_stats"])
        reward_BA = reward(table.lpips_BA, table.space.tokens_A, table.meta["quality_weight"], stats)[chosen]
        row_B, tokens_A = self.rows_of(video), table.space.tokens_A
        constant = table.meta.get("constant_row", int(reward_BA.mean(dim=0).argmax()))
        motion_B = [motion(to_uint8(clip)) for clip in video]
        best_B = tokens_A[reward_BA.argmax(dim=1)]
        return Rated(video, row_B, tokens_A[row_B], reward_BA, best_B, motion_B, constant)


def only_block_moves(video_BCTHW: Tensor, block: int, num_blocks: int) -> Tensor:
    """The clips with motion in one block alone: before it their first frame, after it the block's last frame."""
    num_frames = video_BCTHW.shape[2] // num_blocks
    index_T = torch.arange(video_BCTHW.shape[2])
    start, end = block * num_frames, (block + 1) * num_frames
    index_T = torch.where(index_T < start, 0, torch.where(index_T < end, index_T, end - 1))
    return video_BCTHW[:, :, index_T]


# The measured figures: None if their data are missing


def _real_quality(mini: Miniature) -> dict[str, float] | None:
    if mini.real is None:
        return None
    decibel, distance = mini.quality(mini.real.video_BCTHW, mini.real.row_B)
    return {"tokens": float(mini.real.tokens_B.double().mean()), "psnr": decibel, "stlpips_alex": distance}


def _test_quality(mini: Miniature) -> dict[str, float] | None:
    if mini.test is None:
        return None
    row_B = torch.full_like(mini.test.row_B, mini.tokenizer.space.uniform_row(128))
    return dict(zip(("psnr", "stlpips_alex"), mini.quality(mini.test.video_BCTHW, row_B), strict=True))


def _gain(rated: Rated | None) -> dict[str, float] | None:
    if rated is None:
        return None
    num_clips = len(rated.row_B)
    share = rated.gain(np.arange(num_clips))
    (interval,) = bootstrap(lambda index_S: [rated.gain(index_S)], num_clips)
    if share is None or interval.low is None or interval.high is None:
        return None
    return {"share": share, "low": interval.low, "high": interval.high}


def _rows(rated: Rated | None, most: int) -> dict[str, float] | None:
    if rated is None:
        return None
    counts = Counter(rated.row_B[:most].tolist())
    return {"clips": counts.total(), "distinct": len(counts), "commonest": max(counts.values()) / counts.total()}


def _token_rank(rated: Rated | None) -> dict[str, float] | None:
    rank = None if rated is None else rank_correlation(rated.tokens_B.tolist(), rated.best_tokens_B.tolist())
    return None if rank is None else {"rank": rank}


def _motion_rank(rated: Rated | None) -> dict[str, float] | None:
    if rated is None:
        return None
    ranks = [rank_correlation(rated.motion_B, side.tolist()) for side in (rated.tokens_B, rated.best_tokens_B)]
    return None if None in ranks else {"router": ranks[0] or 0.0, "table": ranks[1] or 0.0}


def _moving_block(mini: Miniature) -> dict[str, float] | None:
    """Share of (clip, block) pairs in which the only moving block gets more than the mean of the other later ones."""
    if mini.real is None:
        return None
    num_blocks, wins = mini.router.space.num_blocks, []
    for block in range(1, num_blocks):
        row_B = mini.rows_of(only_block_moves(mini.real.video_BCTHW, block, num_blocks))
        length_BN = mini.router.space.lengths_of(row_B).double()
        others = [n for n in range(1, num_blocks) if n != block]
        wins.append(length_BN[:, block] > length_BN[:, others].mean(dim=1))
    return {"router": float(torch.cat(wins).double().mean())}


def _still(mini: Miniature) -> dict[str, float] | None:
    if mini.real is None:
        return None
    still_B = mini.tokens_of(mini.real.video_BCTHW[:, :, :1].expand_as(mini.real.video_BCTHW))
    moving_B = mini.real.tokens_B
    return {"above": float((still_B > moving_B).double().mean()), "mean": float(still_B.double().mean()),
            "moving_mean": float(moving_B.double().mean())}  # fmt: skip


def _classes(mini: Miniature) -> dict[str, float] | None:
    figures = mini.generation and mini.generation["class_to_video"]
    if not figures:
        return None
    rank = figures["rank_correlation_of_tokens"]
    return {"recognised": figures["accuracy"]["generated"]["all"], "rank": -1.0 if rank is None else rank}


def _frames(mini: Miniature) -> dict[str, float] | None:
    """Relative distance of the predicted frames to the repeated last one: over all moving clips, and the worst kind."""
    if not mini.generation:
        return None
    ways = mini.generation["frame_prediction"]["ways"]
    ours, repeated = ways["predicted"], ways["last frame repeated"]
    change = {kind: ours[kind]["lpips"] / repeated[kind]["lpips"] - 1 for kind in ours}
    return {"all": change["all"], "worst": max(change.values())}


@dataclass(frozen=True)
class Gate:
    """One line of the table. `measure` gives the figures, `holds` judges them."""

    name: str
    goal: str
    measure: Callable[[Miniature], dict[str, float] | None]
    holds: Callable[[dict[str, float]], bool]


GATES = (
    Gate("real clips, router", "tokens <= 296, PSNR >= 22.0, stlpips_alex <= 0.16", _real_quality,
         lambda f: f["tokens"] <= 296 and f["psnr"] >= 22 and f["stlpips_alex"] <= 0.16),
    Gate("test levels, 128 tokens a block", "PSNR >= 24.5, stlpips_alex <= 0.10", _test_quality,
         lambda f: f["psnr"] >= 24.5 and f["stlpips_alex"] <= 0.1),
    Gate("realised share of the possible gain, test levels", ">= 0.5", lambda m: _gain(m.test),
         lambda f: f["share"] >= 0.5),
    Gate("realised share of the possible gain, real clips", ">= 0.25, interval above 0", lambda m: _gain(m.real),
         lambda f: f["share"] >= 0.25 and f["low"] > 0),
    Gate("rows of 100 test clips", ">= 15 distinct, commonest <= 35 %", lambda m: _rows(m.test, 100),
         lambda f: f["distinct"] >= 15 and f["commonest"] <= 0.35),
    Gate("rows of 50 real clips", ">= 15 distinct, commonest <= 35 %", lambda m: _rows(m.real, 50),
         lambda f: f["distinct"] >= 15 and f["commonest"] <= 0.35),
    Gate("tokens of router and best rows, test levels", "rank correlation >= 0.6", lambda m: _token_rank(m.test),
         lambda f: f["rank"] >= 0.6),
    Gate("tokens of router and best rows, real clips", "rank correlation >= 0.4", lambda m: _token_rank(m.real),
         lambda f: f["rank"] >= 0.4),
    Gate("motion and tokens, real clips", "rank correlation >= the table's own - 0.1", lambda m: _motion_rank(m.real),
         lambda f: f["router"] >= f["table"] - 0.1),
    Gate("only one block moves: it gets more tokens", "router >= 40 % (the table's own best rows: >= 50 %)",
         _moving_block, lambda f: f["router"] >= 0.4),
    Gate("one frame repeated", "never above its moving original, below the mean", _still,
         lambda f: f["above"] == 0 and f["mean"] < f["moving_mean"]),
    Gate("class-to-video", "recognised >= 80 %, rank correlation of lengths >= 0.8", _classes,
         lambda f: f["recognised"] >= 0.8 and f["rank"] >= 0.8),
    Gate("frame prediction against the repeated last frame", "wins every kind, >= 20 % lower over all", _frames,
         lambda f: f["worst"] < 0 and f["all"] <= -0.2),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A gate with its figures; None: not measured."""

    gate: Gate
    figures: dict[str, float] | None

    @property
    def holds(self) -> bool:
        return self.figures is not None and self.gate.holds(self.figures)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Name, goal, figures, verdict."""
        shown = "not measured"
        if self.figures is not None:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        return self.gate.name, self.gate.goal, shown, "yes" if self.holds else "no"


HEADER = ("gate", "goal", "measured", "holds")


def measure_gates(folder: Path) -> list[Measured]:
    """All gates of the miniature in `folder`."""
    mini = Miniature(folder)
    return [Measured(gate, gate.measure(mini)) for gate in GATES]
