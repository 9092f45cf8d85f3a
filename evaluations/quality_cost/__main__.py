"""Quality-cost curves: every strategy that shares out tokens, and codecs at the same bytes, on the same clips.

    bash scripts/test/quality_cost_curve.sh                              # the shipped miniature
    python -m evaluations.quality_cost --vq-ckpt T --router-ckpt R --table TABLE --out DIR
    python -m evaluations.quality_cost --protocol ucf101-recon-train --vq-ckpt T --router-ckpt R --out DIR

With --protocol the clips and the metrics are those of a named protocol. Writes into DIR points.csv (one row for each
setting), clips.csv (one for each clip in each setting), metrics.json (with the savings at equal quality and their
intervals), the charts as SVG, report.html and, under a protocol, its card. Any number of processes may run the same
command at once; rerun it to resume.
"""

from __future__ import annotations

from evaluations.quality_cost.flags import parse_arguments
from tokenizer.common.cli import answer_help

if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autoregressive.presets import check_tokenizer_fits, load_gpt
from evaluations.flags import MIN_CLIPS
from evaluations.job import check_tokenizer, code_version
from evaluations.metrics.clip_scores import lower_is_better
from evaluations.metrics.extractors import load_extractor
from evaluations.protocols import Protocol, card_of, card_text
from evaluations.quality_cost.charts import charts
from evaluations.quality_cost.clips import CurveClips, clips_of_flags, clips_of_protocol, settle_protocol
from evaluations.quality_cost.points import (
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
from evaluations.quality_cost.strategies import Point, StrategyInputs, fresh_table, rows_of_table
from evaluations.quality_cost.sweep import REAL, Figures, Measure, Measured, Sweep, claim
from evaluations.quality_cost.video_codecs import Codec, find_codecs, pick_codecs
from evaluations.report import CURVE_KIND, write_report
from evaluations.scoring import Scorer, load_scorer, trained_as
from evaluations.summary import csv_table
from tokenizer.assignment import AssignmentSpace
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import to_dict
from tokenizer.common.device import float32_mode, pick_device
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.video_io import display_name
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import TrainedRouter, check_router_fits, load_router
from tokenizer.router.reconstruct import pick_perceptual
from tokenizer.router.results import tokenizer_facts, versions
from tokenizer.router.reward import QualityTable


def main() -> None:
    args = parse_arguments()
    if not args.vq_ckpt:
        raise UserError("--vq-ckpt is missing: give the weights of the tokenizer to be measured")
    protocol = settle_protocol(args)
    torch.set_num_threads(args.num_threads)
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.vq_ckpt, device, args.tok_config)
    routers = load_routers(args, tokenizer)
    codecs = () if args.codecs == "none" else pick_codecs(args.codecs.split(","))
    stored = QualityTable.load(args.table) if args.table not in (None, "fresh") else None
    if protocol is None:
        clips = clips_of_flags(args, tokenizer.config, stored)
    else:
        check_tokenizer(protocol, tokenizer)
        clips = clips_of_protocol(protocol, args.data)
    measure = pick_measure(args, protocol, tokenizer, len(clips))
    claim(args.out, clips, measure)
    card = protocol and curve_card(protocol, clips, measure, routers, args)
    if card:
        print(card_text(card), flush=True)

    table = stored and rows_of_table(stored, clips.names, tokenizer.space, clips.contents)
    if args.table == "fresh":
        table = fresh_table(measure, clips, args.out)
    inputs = StrategyInputs(
        tokenizer.space, clips, table, routers, args.out, args.weights, args.thresholds, args.budgets or ()
    )
    chosen = inputs.points(args.strategies)
    points = curve_points(chosen, codecs, measure)
    sweep = Sweep(args.out, clips, wanted_keys(points, clips.names, [REAL]), measure)

    def finish() -> None:
        measured = sweep.measured()
        rows = [clip_figures(point, measured, clips.names) for point in points]
        covariance = protocol.covariance if protocol else "n"
        qualities = list_qualities(points, rows, measured, clips.names, measure, args.draws, covariance)
        metrics = {
            **run_facts(args, measure, clips, table),
            "card": card,
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
    covariance: str,
) -> list[Quality]:
    """The metrics of clips, and the Frechet distance if there is an extractor."""
    found = [Quality(name, mean_over_clips(rows, name), not lower_is_better(name), draws) for name in measure.metrics]
    if extractor := measure.scorer.extractor:
        distances = frechet_over_clips(points, measured, names, covariance)
        found.append(Quality(extractor.distance_name, distances, False, draws, of_sets=True))
    return found


def load_routers(args: argparse.Namespace, tokenizer: VideoTokenizer) -> list[TrainedRouter]:
    """In the order of --router-ckpt. UserError if one does not fit the tokenizer or its YAML."""
    if args.router_config and len(args.router_config) != len(args.router_ckpt):
        raise UserError(
            f"{len(args.router_config)} --router-config for {len(args.router_ckpt)} --router-ckpt: give one for each, "
            "in their order, or none"
        )
    configs = args.router_config or [None] * len(args.router_ckpt)
    routers = [load_router(path, tokenizer.device, yaml) for path, yaml in zip(args.router_ckpt, configs, strict=True)]
    for router in routers:
        check_router_fits(router, tokenizer.config)
    return routers


def pick_measure(
    args: argparse.Namespace, protocol: Protocol | None, tokenizer: VideoTokenizer, num_clips: int
) -> Measure:
    """The metrics, and the GPT if the tokens are entropy-coded."""
    if args.gpt_model and not args.gpt_ckpt:
        raise UserError("--gpt-model is only checked against weights; give --gpt-ckpt too")
    gpt = load_gpt(args.gpt_ckpt, tokenizer.device, args.gpt_model) if args.gpt_ckpt else None
    if gpt:
        check_tokenizer_fits(gpt, tokenizer)
    if args.extractor != "none" and num_clips < (2 if args.force else MIN_CLIPS):
        raise UserError(
            f"a Frechet distance of {num_clips} clips is mostly bias (at least {MIN_CLIPS}): --force computes it "
            "from 2 on and marks the results, --extractor none leaves it out"
        )
    if protocol is not None:
        return Measure(tokenizer, load_scorer(protocol, args, tokenizer.device), gpt, args.batch_size)
    perceptual, reason = pick_perceptual(args.perceptual, tokenizer.device, tokenizer.config.size)
    if perceptual is None:
        raise UserError(f"no perceptual distance: {reason}")
    extractor = None
    if args.extractor != "none":
        extractor = load_extractor(args.extractor, args.extractor_weights, args.extractor_sha256, tokenizer.device)
    return Measure(tokenizer, Scorer(perceptual, extractor), gpt, args.batch_size)


def curve_points(chosen: list[Point], codecs: tuple[Codec, ...], measure: Measure) -> list[CurvePoint]:
    """The strategies' points, then each codec at the bytes of every uniform level and of the routers."""
    tokenizer = measure.tokenizer
    targets = [point for point in chosen if point.strategy in ("uniform", "router")]
    names = [codec.name for codec in codecs]
    coded = of_codecs(names, targets, tokenizer.space, tokenizer.config.codebook_size)
    return [*of_rows(chosen, measure.gpt is not None), *coded]


def curve_card(
    protocol: Protocol, clips: CurveClips, measure: Measure, routers: Sequence[TrainedRouter], args: argparse.Namespace
) -> dict[str, Any]:
    """The protocol card, as that of an evaluation of reconstruction."""
    system = {
        "tokenizer_sha256": measure.tokenizer.sha256,
        "router_sha256": [router.sha256 for router in routers],
        "gpt_sha256": measure.gpt and measure.gpt.sha256,
    }
    return card_of(
        protocol,
        list=clips.facts["list"],
        **measure.scorer.facts(),
        system=system,
        trained_as={"tokenizer": trained_as(args.vq_ckpt)},
        device=str(measure.tokenizer.device),
        float32=float32_mode(),
        code=code_version(),
    )


def run_facts(
    args: argparse.Namespace, measure: Measure, clips: CurveClips, table: QualityTable | None
) -> dict[str, Any]:
    """What a reader of the figures must know."""
    (there, missing), extractor = find_codecs(), measure.scorer.extractor
    return {
        "kind": CURVE_KIND,
        "num_clips": len(clips),
        **to_dict(clips.facts),
        "notes": clips.notes,
        "metrics": list(measure.metrics),
        "frechet": [extractor.distance_name] if extractor else [],
        "extractor": measure.facts()["extractor"],
        "few_clips": len(clips) < MIN_CLIPS,
        "tokenizer": {"weights": display_name(args.vq_ckpt), **tokenizer_facts(measure.tokenizer)},
        "routers": [display_name(path) for path in args.router_ckpt],
        "gpt": measure.gpt and {"weights": display_name(args.gpt_ckpt), "sha256": measure.gpt.sha256},
        "table": table and {"file": display_name(args.table), "proxy_sha256": table.meta.get("tokenizer_sha256"),
                            "perceptual": table.meta.get("perceptual_net")},
        "codecs": {codec.name: {"encoder": codec.encoder, "options": codec.options} for codec in there},
        "missing_codecs": list(missing),
        "bootstrap": {"draws": args.draws, "seed": args.seed},
        "versions": versions(),
    }  # fmt: skip


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
    return " ".join(map(str, space.lengths_of(torch.tensor(int(row))).tolist())) if kind == "row" else ""


if __name__ == "__main__":
    run_cli(main)
