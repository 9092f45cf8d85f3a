"""The inputs of a quality-cost job put together: which clips, which points; and its results folder.

    points.csv     a row for each setting: means over the clips
    clips.csv      a row for each clip in each setting, with the assignment
    metrics.json   both of the above's essence, the savings with their intervals, and everything that made them
    card.json card.txt   the protocol card, under --protocol
    *.svg          quality over tokens, quality over bytes

Letters: S clips of the set, A assignments (rows).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from evaluations.protocols import card_text
from evaluations.quality_cost.charts import charts
from evaluations.quality_cost.clips import CurveClips
from evaluations.quality_cost.flags import BUDGET_STRATEGIES, QUALITY_WEIGHTS, STRATEGIES, TABLE_STRATEGIES
from evaluations.quality_cost.points import CurvePoint
from evaluations.quality_cost.strategies import (
    Point,
    budget_points,
    default_budgets,
    reward_points,
    threshold_points,
    uniform_points,
)
from evaluations.quality_cost.sweep import Figures, Measure, made_once
from evaluations.summary import csv_table
from tokenizer.assignment import AssignmentSpace
from tokenizer.budget import parse_budget
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.errors import UserError
from tokenizer.router.curate import Scorer
from tokenizer.router.predict import TrainedRouter
from tokenizer.router.reward import QualityTable, RewardStats, stats_of


@dataclass
class StrategyInputs:
    """What the strategies may use. A strategy whose input is absent is left out, or refused when asked for by name."""

    space: AssignmentSpace
    clips: CurveClips
    table: QualityTable | None
    routers: Sequence[TrainedRouter]
    folder: Path  # keeps the routers' scores
    weights: Sequence[float] = QUALITY_WEIGHTS
    thresholds: Sequence[float] = ()
    budgets: Sequence[str] = ()

    def points(self, wanted: str) -> list[Point]:
        """All points of the strategies in a comma-separated list, or of `all` that the inputs allow."""
        for text in self.budgets:
            if text.partition(":")[0] not in BUDGET_STRATEGIES:
                raise UserError(
                    f"budget {text!r}: a curve takes {', '.join(f'{kind}:N' for kind in BUDGET_STRATEGIES)}"
                )
        names = STRATEGIES if wanted == "all" else tuple(dict.fromkeys(wanted.split(",")))
        made: list[Point] = []
        for name in names:
            if name not in STRATEGIES:
                raise UserError(f"strategy {name!r} is none of {', '.join(STRATEGIES)}")
            if lacks := self._lacks(name):
                if wanted == "all":
                    continue
                raise UserError(f"strategy {name!r} needs {lacks}")
            made += self._points(name)
        if not any(point.strategy == "uniform" for point in made):
            made = [*uniform_points(self.space, len(self.clips)), *made]  # what everything else is compared with
        return made

    def _lacks(self, name: str) -> str:
        if name in TABLE_STRATEGIES and self.table is None:
            return "--table"
        if name not in (*TABLE_STRATEGIES, "uniform") and not self.routers:
            return "--router-ckpt"
        if name in BUDGET_STRATEGIES and not self._budgets(name):
            return f"budgets of its form: --budgets {name}:N .."
        return ""

    def _points(self, name: str) -> list[Point]:
        if name == "uniform":
            return uniform_points(self.space, len(self.clips))
        if name == "threshold" and self.table:
            return threshold_points(self.table, self.thresholds)
        if name == "max-reward" and self.table:
            return reward_points(self.table, reward_stats(self.table), self.weights)
        if name == "router":
            labels = [f"{i + 1}" for i in range(len(self.routers))] if len(self.routers) > 1 else ["argmax"]
            return [
                Point("router", label, self.space.best_row(self.scores(router)))
                for label, router in zip(labels, self.routers, strict=True)
            ]
        for text in self._budgets(name):
            self.routers[0].check_budget(parse_budget(text, self.space))
        rated_SA = self.scores(self.routers[0], distances=name == "quality")
        return budget_points(rated_SA, self.space, self._budgets(name))

    def _budgets(self, kind: str) -> list[str]:
        if self.budgets:
            return [text for text in self.budgets if text.partition(":")[0] == kind]
        return [] if kind in ("price", "quality") else default_budgets(self.space, kind)

    def scores(self, router: TrainedRouter, distances: bool = False) -> Tensor:
        """score_SA of all clips, or negative predicted distances, kept in the folder: processes run a router once."""

        def run() -> Tensor:
            indices = tqdm(range(len(self.clips)), desc="running the router", unit="clip")
            videos = (self.clips.read(i)[None] for i in indices)
            return torch.cat([-router.distances(video) if distances else router.scores(video) for video in videos])

        kind = "-distances" if distances else ""
        return made_once(self.folder / "scores" / f"{router.sha256[:16]}{kind}.safetensors", run)


def reward_stats(table: QualityTable) -> RewardStats:
    """Those of the training table if this table carries them, else its own."""
    stored = table.meta.get("reward_stats")
    return RewardStats(**stored) if stored else stats_of(table)


def rows_of_table(
    table: QualityTable, names: Sequence[str], space: AssignmentSpace, contents: Sequence[str] = ()
) -> QualityTable:
    """The table's rows for these clips, in their order. UserError if it lacks one or has other assignments.

    contents: fingerprints of the clips' files; UserError if the table rates another file of the same name.
    """
    if tuple(table.levels) != space.levels or table.num_blocks != space.num_blocks:
        raise UserError(
            f"the table rates levels {list(table.levels)} for {table.num_blocks} blocks, the tokenizer has "
            f"{list(space.levels)} for {space.num_blocks}; use a table of this tokenizer's proxy"
        )
    place = {name: row for row, name in enumerate(table.names)}
    if absent := [name for name in names if name not in place]:
        raise UserError(
            f"the table lacks {len(absent)} of {len(names)} clips, {absent[0]} among them; --table fresh makes one"
        )
    index = torch.tensor([place[name] for name in names])
    rated = [table.files[place[name]] if table.files else "" for name in names]
    for name, theirs, ours in zip(names, rated, contents or [""] * len(names), strict=True):
        if theirs and ours and theirs != ours:
            raise UserError(f"the table rates another file of the name {name}; --table fresh makes a table of these")
    lpips_SA, psnr_SA, mse_SA = (column[index] for column in (table.lpips_BA, table.psnr_BA, table.mse_BA))
    return QualityTable(lpips_SA, psnr_SA, mse_SA, list(names), table.levels, table.num_blocks, table.meta)


def fresh_table(measure: Measure, clips: CurveClips, folder: Path) -> QualityTable:
    """A table of these clips by this very tokenizer, kept in the folder: strategies then choose by its own quality."""
    tokenizer, perceptual = measure.tokenizer, measure.scorer.perceptual
    if perceptual is None:
        raise UserError("--table fresh rates by a perceptual distance: leave --perceptual none out")
    scorer = Scorer(tokenizer, perceptual)

    def score() -> Tensor:
        indices = tqdm(range(len(clips)), desc="every assignment of every clip", unit="clip")
        scores = [scorer.tree(clips.read(i)[None].to(tokenizer.device)) for i in indices]
        return torch.stack([torch.cat(column) for column in zip(*scores, strict=True)])

    lpips_SA, psnr_SA, mse_SA = made_once(folder / "table.safetensors", score)
    space = tokenizer.space
    meta = {"tokenizer_sha256": tokenizer.sha256, "perceptual_net": perceptual.name}
    return QualityTable(lpips_SA, psnr_SA, mse_SA, clips.names, space.levels, space.num_blocks, meta)


# Results


def _clip_rows(
    points: Sequence[CurvePoint], rows: Sequence[Sequence[Figures]], names: Sequence[str], space: AssignmentSpace
) -> Iterator[dict[str, Any]]:
    """The rows of clips.csv: every clip at every point."""
    for point, mine in zip(points, rows, strict=True):
        for name, key, figures in zip(names, point.keys, mine, strict=True):
            setting = {"strategy": point.strategy, "setting": point.setting, "assignment": _assignment(key, space)}
            yield {"clip": name} | setting | figures


def write_results(
    folder: Path,
    points: Sequence[CurvePoint],
    rows: Sequence[Sequence[Figures]],
    names: Sequence[str],
    space: AssignmentSpace,
    metrics: Mapping[str, Any],
) -> None:
    """points.csv, clips.csv, metrics.json, the charts, and the protocol card. Equal measurements give equal bytes."""
    if card := metrics["card"]:
        atomic_write(folder / "card.json", json.dumps(card, indent=1).encode())
        atomic_write(folder / "card.txt", (card_text(card) + "\n").encode())
    summaries = metrics["points"]
    columns = list(dict.fromkeys(key for each in summaries for key in each))
    atomic_write(folder / "points.csv", csv_table(columns, summaries))
    columns = ["clip", "strategy", "setting", "assignment", "tokens", "bytes", *metrics["metrics"], "crf", "reached"]
    atomic_write(folder / "clips.csv", csv_table(columns, _clip_rows(points, rows, names, space)))
    for file, chart in charts(metrics, alone=True).items():
        atomic_write(folder / file, chart.encode())
    atomic_write(folder / "metrics.json", (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())


def _assignment(key: str, space: AssignmentSpace) -> str:
    kind, _, row = key.partition(":")
    return " ".join(map(str, space.table_AN[int(row)].tolist())) if kind == "row" else ""
