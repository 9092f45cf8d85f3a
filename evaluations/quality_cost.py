"""Quality-cost curves: every strategy that shares out tokens, and codecs at the same bytes, on the same clips.

    bash scripts/test/quality_cost_curve.sh                              # the shipped miniature
    python -m evaluations.quality_cost --vq-ckpt T --router-ckpt R --table TABLE --out DIR

Writes DIR/points.csv (one row for each setting), DIR/clips.csv (one for each clip in each setting), DIR/metrics.json
(with the savings at equal quality and their intervals), the charts as SVG and report.html. Any number of processes may
run the same command at once, and a stopped one goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from autoregressive.presets import check_tokenizer_fits, load_gpt
from evaluations.curve_job import StrategyInputs, fresh_table, rows_of_table, write_results
from evaluations.curve_points import (
    CurvePoint,
    Quality,
    clip_figures,
    frechet_over_clips,
    mean_over_clips,
    of_codecs,
    of_rows,
    savings,
    summaries,
    wanted_keys,
)
from evaluations.metrics.extractors import load_extractor
from evaluations.metrics.image_quality import lower_is_better
from evaluations.protocols import MIN_CLIPS
from evaluations.report_page import write_report
from evaluations.report_tables import CURVE_KIND
from evaluations.strategies import QUALITY_WEIGHTS, STRATEGIES, Point
from evaluations.sweep import REAL, Figures, Measure, Measured, Sweep, claim
from evaluations.video_codecs import CODECS, Codec, find_codecs, pick_codecs
from tokenizer.common.arguments import Parser, at_least, positive
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.runtime import pick_device
from tokenizer.data.clips import ClipDataset, DataConfig, build_dataset
from tokenizer.data.video_io import display_name
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import check_router_fits, load_router
from tokenizer.router.reconstruct import PERCEPTUAL_ORDER, pick_perceptual
from tokenizer.router.summary import tokenizer_facts, versions
from tokenizer.router.table import QualityTable

# Redrawn sets behind an interval of a Frechet distance: each costs a decomposition for every point.
FEW_CLIPS, FRECHET_DRAWS, FEW_FRECHET_DRAWS = 128, 100, 20


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Quality-cost curves of strategies and codecs on the same clips.")
    add = parser.add_argument
    add("--vq-ckpt", help="weights of the tokenizer whose reconstructions are measured")
    add("--tok-config", help="YAML of the tokenizer, checked against its weights")
    add("--router-ckpt", action="append", default=[], help="weights of a router; again for more points (other w_q)")
    add("--table", help="quality table of a proxy on these clips, or 'fresh': made here with the tokenizer itself")
    add(
        "--sources",
        nargs="+",
        metavar="SOURCE",
        help="clips: folders, files, manifests, bundled:heldout (default: those of --table)",
    )
    add("--fps", type=positive, help="frame rate to read at (default: each file's own)")
    add("--max-clips", type=at_least(1), metavar="N", help="the first N clips only")
    add(
        "--strategies",
        default="all",
        help=f"comma-separated: {', '.join(STRATEGIES[:-1])} (default: all that the inputs allow)",
    )
    add(
        "--weights",
        type=numbers,
        default=QUALITY_WEIGHTS,
        metavar="W,W",
        help="w_q of max-reward (default: 0.4 to 2.0)",
    )
    add(
        "--thresholds",
        type=numbers,
        default=(),
        metavar="D,D",
        help="LPIPS of threshold (default: deciles of the table)",
    )
    add(
        "--budgets",
        nargs="+",
        metavar="FORM:N",
        help="budgets of the first router (default: tokens and average at the uniform totals)",
    )
    add(
        "--codecs",
        default="all",
        help=f"comma-separated: {', '.join(CODECS)}; all | none (default: all that are there)",
    )
    add("--gpt-ckpt", help="class-to-video GPT: entropy-coded size of the tokens as well")
    networks = f"lpips_vgg | lpips_alex | stlpips_vgg | stlpips_alex | auto ({' or '.join(PERCEPTUAL_ORDER)})"
    add("--perceptual", default="auto", metavar="NAME", help=networks)
    add("--extractor", default="none", help="i3d | videomae | effnet: a Frechet distance as well (default: none)")
    add("--extractor-weights", metavar="FILE", help="TorchScript of i3d or folder of videomae")
    add("--extractor-sha256", metavar="HASH", help="what those weights must have")
    add("--force", action="store_true", help=f"a Frechet distance of fewer than {MIN_CLIPS} clips")
    add("--draws", type=at_least(1), default=1000, metavar="N", help="of the bootstrap (default: 1000)")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add(
        "--batch-size",
        type=at_least(1),
        default=8,
        metavar="N",
        help="assignments that go through the tokenizer together",
    )
    add(
        "--num-threads",
        type=at_least(1),
        default=1,
        metavar="N",
        help="of each process; the last bits depend on it, and more processes are faster (default: 1)",
    )
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--out", type=Path, default=Path("results/quality_cost"), help="results folder (default: results/quality_cost)")
    return parser.parse_args()


def numbers(text: str) -> tuple[float, ...]:
    """An argparse type: numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers separated by commas") from None


def main() -> None:
    args = parse_arguments()
    if not args.vq_ckpt:
        raise UserError("--vq-ckpt is missing: give the weights of the tokenizer to be measured")
    torch.set_num_threads(args.num_threads)
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.vq_ckpt, device, args.tok_config)
    routers = [load_router(path, device) for path in args.router_ckpt]
    for router in routers:
        check_router_fits(router, tokenizer.config)
    codecs = () if args.codecs == "none" else pick_codecs(args.codecs.split(","))
    stored = QualityTable.load(args.table) if args.table not in (None, "fresh") else None
    clips = pick_clips(args, tokenizer, stored)
    measure = pick_measure(args, tokenizer, len(clips))
    claim(args.out, clips, measure)

    table = stored and rows_of_table(stored, clips.names, tokenizer.space)
    if args.table == "fresh":
        table = fresh_table(tokenizer, measure.perceptual, clips, args.out)
    inputs = StrategyInputs(
        tokenizer.space, clips, table, routers, args.out, args.weights, args.thresholds, args.budgets or ()
    )
    chosen = inputs.points(args.strategies)
    points = curve_points(chosen, codecs, measure)
    sweep = Sweep(args.out, clips, wanted_keys(points, clips.names, [REAL]), measure)

    def finish() -> None:
        measured = sweep.measured()
        rows = [clip_figures(point, measured, clips.names) for point in points]
        qualities = list_qualities(points, rows, measured, clips.names, measure, args.draws)
        metrics = {
            **protocol_facts(args, measure, clips, table),
            "points": summaries(points, rows, qualities),
            "savings": savings(points, rows, qualities, args.seed),
        }
        write_results(args.out, points, rows, clips.names, tokenizer.space, metrics)
        page = write_report(args.out, metrics)
        print(f"{len(clips)} clips, {len(points)} points: {args.out / 'points.csv'}; report: {page}")

    if not sweep.work(finish):
        print(f"no unit is free; others are at work in {args.out}, the last of them writes the results")


def list_qualities(
    points: Sequence[CurvePoint],
    rows: Sequence[Sequence[Figures]],
    measured: Measured,
    names: Sequence[str],
    measure: Measure,
    draws: int,
) -> list[Quality]:
    """The metrics of clips, and the Frechet distance where there is an extractor."""
    found = [Quality(name, mean_over_clips(rows, name), not lower_is_better(name), draws) for name in measure.metrics]
    if measure.extractor:
        draws = min(draws, FRECHET_DRAWS if len(names) <= FEW_CLIPS else FEW_FRECHET_DRAWS)
        distances = frechet_over_clips(points, measured, names)
        found.append(Quality(measure.extractor.distance_name, distances, False, draws, percentile=False))
    return found


def pick_clips(args: argparse.Namespace, tokenizer: VideoTokenizer, stored: QualityTable | None) -> ClipDataset:
    """Those of --sources, else those that the stored table names."""
    config = tokenizer.config
    if args.sources:
        data = DataConfig(list(args.sources), config.num_frames, config.size, args.fps, augment=False)
    elif stored and "data" in stored.meta:
        data = DataConfig(**stored.meta["data"])
    else:
        raise UserError("no clips: give --sources, or a --table that says which clips it rates")
    if (data.num_frames, data.size) != (config.num_frames, config.size):
        raise UserError(
            f"the table's clips are {data.num_frames}x{data.size}x{data.size}, the tokenizer's "
            f"{config.num_frames}x{config.size}x{config.size}; give --sources and --table fresh"
        )
    clips = build_dataset(data)
    return clips if args.max_clips is None else clips.first(args.max_clips)


def pick_measure(args: argparse.Namespace, tokenizer: VideoTokenizer, num_clips: int) -> Measure:
    """The metrics, and the GPT where the tokens are to be entropy-coded."""
    perceptual, reason = pick_perceptual(args.perceptual, tokenizer.device)
    if perceptual is None:
        raise UserError(f"no perceptual distance: {reason}")
    gpt = load_gpt(args.gpt_ckpt, tokenizer.device) if args.gpt_ckpt else None
    if gpt:
        check_tokenizer_fits(gpt, tokenizer)
    extractor = None
    if args.extractor != "none":
        if num_clips < MIN_CLIPS and not args.force:
            raise UserError(
                f"a Frechet distance of {num_clips} clips says little (at least {MIN_CLIPS}): --force computes it "
                "all the same and the results say so, --extractor none leaves it out"
            )
        extractor = load_extractor(args.extractor, args.extractor_weights, args.extractor_sha256, tokenizer.device)
    return Measure(tokenizer, perceptual, extractor, gpt, args.batch_size)


def curve_points(chosen: list[Point], codecs: tuple[Codec, ...], measure: Measure) -> list[CurvePoint]:
    """The strategies' points, then each codec at the bytes of every uniform level and of the routers."""
    tokenizer = measure.tokenizer
    targets = [point for point in chosen if point.strategy in ("uniform", "router")]
    names = [codec.name for codec in codecs]
    coded = of_codecs(names, targets, tokenizer.space, tokenizer.config.codebook_size)
    return [*of_rows(chosen, measure.gpt is not None), *coded]


def protocol_facts(
    args: argparse.Namespace, measure: Measure, clips: ClipDataset, table: QualityTable | None
) -> dict[str, Any]:
    """What a reader of the figures must know."""
    tokenizer = measure.tokenizer
    there, missing = find_codecs()
    return {
        "kind": CURVE_KIND,
        "num_clips": len(clips),
        "data": to_dict(clips.cfg),
        "metrics": list(measure.metrics),
        "frechet": [measure.extractor.distance_name] if measure.extractor else [],
        "extractor": measure.facts()["extractor"],
        "few_clips": len(clips) < MIN_CLIPS,
        "tokenizer": {"weights": display_name(args.vq_ckpt), **tokenizer_facts(tokenizer)},
        "routers": [display_name(path) for path in args.router_ckpt],
        "gpt": measure.gpt and {"weights": display_name(args.gpt_ckpt), "sha256": measure.gpt.sha256},
        "table": table and {"file": display_name(args.table), "proxy_sha256": table.meta.get("tokenizer_sha256"),
                            "perceptual": table.meta.get("perceptual_net")},
        "codecs": {codec.name: {"encoder": codec.encoder, "options": codec.options} for codec in there},
        "missing_codecs": list(missing),
        "bootstrap": {"draws": args.draws, "seed": args.seed},
        "versions": versions(),
    }  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
