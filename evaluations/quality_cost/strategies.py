"""The strategies of token assignment whose quality-cost curves are drawn (arXiv 2603.12267, section 3 and appendix).

    uniform      the same level for every block of every clip
    threshold    the shortest assignment whose LPIPS in a proxy's table is under a threshold, else the longest
    max-reward   the assignment of the highest reward in that table, one point for each w_q (what routers learn)
    router       the argmax of a router's scores, one point for each router
    tokens, average, price, quality
                 a router under a budget (tokenizer/budget.py), one point for each budget

A point gives every clip a row. `threshold` and `max-reward` choose after seeing the proxy's reconstructions: an upper
bound that costs all assignments of a clip. Letters: S clips of the set, A rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from evaluations.quality_cost.clips import CurveClips
from evaluations.quality_cost.flags import BUDGET_STRATEGIES, QUALITY_WEIGHTS, STRATEGIES, TABLE_STRATEGIES
from evaluations.quality_cost.sweep import Measure
from evaluations.shards import made_once
from tokenizer.assignment import AssignmentSpace
from tokenizer.budget import Budget, Search, choose_rows, find_price, parse_budget
from tokenizer.common.errors import UserError
from tokenizer.router.curate import Scorer
from tokenizer.router.predict import TrainedRouter
from tokenizer.router.reward import QualityTable, RewardStats, reward, stats_of, threshold_labels

NUM_THRESHOLDS = 9
ARGMAX = Budget("router")


@dataclass(frozen=True, eq=False)
class Point:
    """One setting of one strategy, and the row it gives to each clip, int64 [S]."""

    strategy: str
    setting: str
    row_S: Tensor


def uniform_points(space: AssignmentSpace, num_clips: int) -> list[Point]:
    return [Point("uniform", str(k), torch.full((num_clips,), space.uniform_row(k))) for k in space.levels]


def threshold_points(table: QualityTable, thresholds: Sequence[float] = ()) -> list[Point]:
    """One point for each threshold; by default the deciles of all LPIPS values in the table."""
    lpips_SA = table.lpips_BA.double()
    if not thresholds:
        deciles = torch.linspace(0, 1, NUM_THRESHOLDS + 2)[1:-1].double()
        thresholds = lpips_SA.flatten().quantile(deciles).tolist()
    return [
        Point("threshold", f"{value:.4g}", threshold_labels(lpips_SA, table.space.tokens_A, value))
        for value in thresholds
    ]


def reward_points(table: QualityTable, stats: RewardStats, weights: Sequence[float] = QUALITY_WEIGHTS) -> list[Point]:
    """The best row of the table for each weight of quality."""
    points = []
    for weight in weights:
        reward_SA = reward(table.lpips_BA, table.space.tokens_A, weight, stats)
        points.append(Point("max-reward", f"w_q={weight:g}", table.space.best_row(reward_SA)))
    return points


def default_budgets(space: AssignmentSpace, kind: str) -> list[str]:
    """Budgets at the tokens of each uniform level; as a limit the largest would not bind, so it is left out."""
    totals = [level * space.num_blocks for level in space.levels]
    return [f"{kind}:{total}" for total in (totals[:-1] if kind == "tokens" else totals)]


def budget_points(
    score_SA: Tensor, space: AssignmentSpace, budgets: Iterable[str], search: Search | None = None
) -> list[Point]:
    """A router's choice under each budget; its strategy is the budget's form, its setting the number.

    score_SA: the router's scores, or under quality:Q its negative distances.
    """
    points = []
    for text in budgets:
        budget = parse_budget(text, space)
        form, _, value = text.partition(":")
        average = budget.average_tokens
        price = None if average is None else find_price(score_SA, space, average, search)
        points.append(Point(form, value, choose_rows(budget, score_SA, space, price, search=search)))
    return points


# The inputs of a job


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
                Point("router", label, choose_rows(ARGMAX, self.scores(router), self.space, search=router.search))
                for label, router in zip(labels, self.routers, strict=True)
            ]
        for text in self._budgets(name):
            self.routers[0].check_budget(parse_budget(text, self.space))
        rated_SA = self.scores(self.routers[0], distances=name == "quality")
        return budget_points(rated_SA, self.space, self._budgets(name), self.routers[0].search)

    def _budgets(self, kind: str) -> list[str]:
        if self.budgets:
            return [text for text in self.budgets if text.partition(":")[0] == kind]
        return [] if kind in ("price", "quality") else default_budgets(self.space, kind)

    def scores(self, router: TrainedRouter, distances: bool = False) -> Tensor:
        """score_SA of all clips, or negative predicted distances, kept in the folder: processes run a router once."""

        def run() -> Tensor:
            indices = tqdm(range(len(self.clips)), desc="running the router", unit="clip")
            videos = (self.clips.read(i)[None] for i in indices)
            rate = (lambda video: -router.distances(video)) if distances else partial(router.rate, budget=ARGMAX)
            return torch.cat([rate(video) for video in videos])

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
