"""One router of qualities at every trade-off, on clips whose every assignment was measured.

    python scripts/mini/trade_offs.py --router-ckpt results/mini/quality --table results/mini/test/table.safetensors \\
        --single results/mini/router_0.8 results/mini/router_1.2 --out results/mini/trade_offs

Prints and writes into OUT: the reward percentile at each w_q, beside routers trained for that w_q alone (--single);
predicted against measured distances (reliability.svg); and how many clips keep quality:Q at how many tokens, beside an
oracle that knows the table. Distances are those of the tokenizer that made the table.

Letters: S clips of the table, A assignments (rows).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from evaluations.quality_cost.flags import QUALITY_WEIGHTS
from tokenizer.budget import choose_rows, keeps_quality, parse_budget
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.cli import Parser
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.clips import DataConfig
from tokenizer.router.predict import TrainedRouter, load_router
from tokenizer.router.reward import QualityTable, RewardStats, best_uniform, reward, reward_percentile
from tokenizer.router.train import TableClips
from tokenizer.viz.plots import reliability_chart, to_svg

BINS = 10  # of the reliability plot, each with as many pairs of clip and assignment
FLOORS = (0.1, 0.25, 0.5, 0.75, 0.9)  # Q: quantiles of the table's distances


def at_trade_offs(
    distance_SA: Tensor, table: QualityTable, stats: RewardStats, singles: dict[float, Tensor]
) -> list[dict[str, Any]]:
    """The reward percentile at each w_q by predicted distances, and by the rows [S] of a router of that w_q alone."""
    space = table.space
    found = []
    for weight in sorted({*QUALITY_WEIGHTS, *singles}):
        reward_SA = reward(table.lpips_BA, space.tokens_A, weight, stats)
        row_S = space.best_row(reward(distance_SA, space.tokens_A, weight, stats))
        single = singles.get(weight)
        found.append({
            "quality_weight": weight,
            "percentile": reward_percentile(reward_SA, row_S),
            "percentile_single": None if single is None else reward_percentile(reward_SA, single),
            "percentile_best_uniform": best_uniform(reward_SA, space)[1],
            "tokens": space.tokens_A[row_S].double().mean().item(),
            "tokens_best": space.tokens_A[space.best_row(reward_SA)].double().mean().item(),
        })  # fmt: skip
    return found


def at_floors(distance_SA: Tensor, table: QualityTable) -> list[dict[str, Any]]:
    """At some Q: the share of clips whose measured distance keeps it, and mean tokens, of the router and an oracle.

    The oracle applies quality:Q to the measured distances. Its share is below 1 if no assignment of a clip keeps Q.
    """
    space, measured_SA = table.space, table.lpips_BA.double()
    found = []
    for most in measured_SA.flatten().quantile(torch.tensor(FLOORS, dtype=torch.double)).tolist():
        budget = parse_budget(f"quality:{most!r}", space)
        row_S, oracle_S = choose_rows(budget, -distance_SA, space), choose_rows(budget, -measured_SA, space)
        found.append({
            "distance": most,
            "kept": keeps_quality(budget, -measured_SA, row_S).double().mean().item(),
            "kept_oracle": keeps_quality(budget, -measured_SA, oracle_S).double().mean().item(),
            "not_predicted": (~keeps_quality(budget, -distance_SA, row_S)).double().mean().item(),
            "tokens": space.tokens_A[row_S].double().mean().item(),
            "tokens_oracle": space.tokens_A[oracle_S].double().mean().item(),
        })  # fmt: skip
    return found


def reliability(distance_SA: Tensor, measured_SA: Tensor) -> list[dict[str, float]]:
    """Mean predicted and mean measured distance of equally large bins of all pairs, in the order of the prediction."""
    order = distance_SA.flatten().argsort(stable=True)
    bins = zip(distance_SA.flatten()[order].chunk(BINS), measured_SA.flatten()[order].chunk(BINS), strict=True)
    return [{"predicted": p.mean().item(), "measured": m.double().mean().item()} for p, m in bins]


def all_figures(router: TrainedRouter, singles: Sequence[TrainedRouter], path: Path) -> dict[str, Any]:
    """Run the routers over the clips of the table at `path`. UserError if it is not whole, or a router does not fit."""
    table = QualityTable.load(path)
    if not table.is_whole:
        raise UserError(f"{path} lacks assignments (children): give a table of every assignment")
    for each in (router, *singles):
        if (each.space.levels, each.space.num_blocks) != (tuple(table.levels), table.num_blocks):
            raise UserError(f"{each.origin} chooses among levels {list(each.space.levels)}, {path} has {table.levels}")
    clips = TableClips(DataConfig(**table.meta["data"]), 0, table, str(path))
    video_1 = [clips.get(i).video_CTHW[None] for i in tqdm(range(len(clips)), desc="reading clips", unit="clip")]
    distance_SA = torch.cat([router.distances(video) for video in tqdm(video_1, desc="predicting", unit="clip")])
    assert router.stats is not None  # else `distances` refuses
    rows = {
        weight_of(single): single.space.best_row(torch.cat([single.scores(video) for video in video_1]))
        for single in singles
    }
    gap_SA = distance_SA - table.lpips_BA.double()
    return {
        "router_sha256": router.sha256,
        "singles_sha256": {str(weight_of(single)): single.sha256 for single in singles},
        "num_clips": len(table),
        "perceptual_net": router.stats.perceptual_net,
        "mean_absolute_gap": gap_SA.abs().mean().item(),
        "mean_gap": gap_SA.mean().item(),
        "trade_offs": at_trade_offs(distance_SA, table, router.stats, rows),
        "floors": at_floors(distance_SA, table),
        "reliability": reliability(distance_SA, table.lpips_BA),
    }


def weight_of(single: TrainedRouter) -> float:
    """The w_q that a router of one trade-off was trained for. UserError for a router of qualities."""
    if single.quality_weight is not None:
        raise UserError(f"--single {single.origin}: it serves every w_q; give routers trained for one")
    return float(single.model.file_config["quality_weight"])


def as_markdown(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['num_clips']} clips, router {figures['router_sha256'][:12]}, {figures['perceptual_net']}.",
        "",
        "| w_q | reward percentile | of a router trained for it | best uniform | tokens a clip | of the best rows |",
        "|---|---|---|---|---|---|",
    ]
    for f in figures["trade_offs"]:
        single = "-" if f["percentile_single"] is None else f"{f['percentile_single']:.2%}"
        lines.append(
            f"| {f['quality_weight']:g} | {f['percentile']:.2%} | {single} | {f['percentile_best_uniform']:.2%} | "
            f"{f['tokens']:.1f} | {f['tokens_best']:.1f} |"
        )
    lines += ["", "| quality:Q | clips that keep it | of an oracle | not predicted | tokens a clip | of an oracle |"]
    lines += ["|---|---|---|---|---|---|"]
    for f in figures["floors"]:
        lines.append(
            f"| {f['distance']:.4f} | {f['kept']:.1%} | {f['kept_oracle']:.1%} | {f['not_predicted']:.1%} | "
            f"{f['tokens']:.1f} | {f['tokens_oracle']:.1f} |"
        )
    lines += ["", f"Predicted minus measured distance: {figures['mean_gap']:+.4f} on average, "
                  f"{figures['mean_absolute_gap']:.4f} in absolute value."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = Parser("Measure a router of qualities at every trade-off and quality floor.")
    parser.add_argument("--router-ckpt", required=True, metavar="R", help="a router trained with labels=quality")
    parser.add_argument("--table", required=True, type=Path, help="quality table of stage 2, of test clips")
    parser.add_argument("--single", nargs="*", default=[], metavar="R", help="routers trained for one w_q each")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="trade_offs.json, .md, reliability.svg")
    args: argparse.Namespace = parser.parse_args()
    figures = all_figures(load_router(args.router_ckpt), [load_router(path) for path in args.single], args.table)
    chart = reliability_chart(
        [(each["predicted"], each["measured"]) for each in figures["reliability"]],
        f"predicted distance ({figures['perceptual_net']}), {BINS} bins",
        "measured distance",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "trade_offs.json", (json.dumps(figures, indent=1) + "\n").encode())
    atomic_write(args.out / "trade_offs.md", (as_markdown(figures) + "\n").encode())
    atomic_write(
        args.out / "reliability.svg", to_svg(chart, "Predicted against measured distance", alone=True).encode()
    )
    print(as_markdown(figures))


if __name__ == "__main__":
    run_cli(main)
