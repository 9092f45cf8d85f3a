"""Two systems on the same clips: per-clip differences, their bootstrap interval, and who wins how often.

    python -m evaluations.compare results/eval/A results/eval/B [--out DIR]

A and B are finished evaluations under one protocol and one list. Pairing removes what makes clips hard or easy, so it
decides even if the intervals of the two means overlap.

Letters: S clips that both scored.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizer.common.cli import Parser, answer_help, at_least


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Compare two evaluations clip by clip.")
    parser.add_argument("first", metavar="A", help="results folder of the one system")
    parser.add_argument("second", metavar="B", help="results folder of the other, under the same protocol")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write comparison.json and differences.csv there")
    parser.add_argument("--draws", type=at_least(1), default=1000, metavar="N", help="bootstrap draws (default: 1000)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="bootstrap seed (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import dataclasses
import json
from typing import Any

import numpy as np

from evaluations.metrics.bootstrap import PairedComparison, compare_paired
from evaluations.metrics.clip_scores import LOWER_IS_BETTER, lower_is_better
from evaluations.shards import Result, read_result
from evaluations.summary import csv_table
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.errors import UserError, run_cli


def compare(first: Result, second: Result, seed: int = 0, draws: int = 1000) -> dict[str, PairedComparison]:
    """Metric -> second minus first. UserError for different protocols or lists, and if no clip is in both."""
    for what, key in (("protocol", "protocol_hash"), ("list of clips", "list")):
        if first.card[key] != second.card[key]:
            raise UserError(f"{first.folder} and {second.folder} have not the same {what}: no pairs")
    names = common_clips(first, second)
    if not names:
        raise UserError(f"{first.folder} and {second.folder} have no scored clip in common")
    found = {}
    for metric in LOWER_IS_BETTER:
        if not all(metric in result.clips[name] for name in names for result in (first, second)):
            continue
        ours, theirs = (np.array([r.clips[name][metric] for name in names]) for r in (first, second))
        found[metric] = compare_paired(ours, theirs, lower_is_better(metric), seed, draws)
    if not found:
        raise UserError(f"{first.folder} and {second.folder} have no metric of clips in common, only distances of sets")
    return found


def common_clips(first: Result, second: Result) -> list[str]:
    """Names of the clips that both scored, in the order of the list."""
    return [name for name in first.clips if name in second.clips]


def differences_table(first: Result, second: Result, metrics: list[str]) -> bytes:
    rows = (
        {"name": name} | {metric: second.clips[name][metric] - first.clips[name][metric] for metric in metrics}
        for name in common_clips(first, second)
    )
    return csv_table(["name", *metrics], rows)


def as_json(found: dict[str, PairedComparison]) -> dict[str, Any]:
    """The same for machines; `decided`: the interval does not contain 0."""
    return {name: dataclasses.asdict(pair) | {"decided": pair.decided} for name, pair in found.items()}


def as_text(found: dict[str, PairedComparison], first: Result, second: Result) -> str:
    num_clips = next(iter(found.values())).num_clips
    lines = [
        f"A {first.folder}",
        f"B {second.folder}",
        f"{num_clips} clips of protocol {first.card['protocol']['name']} ({first.card['protocol_hash']})",
        "",
        f"{'metric':<28}{'B - A':>12}   {'interval':<26}{'B wins':>7}",
    ]
    for name, pair in found.items():
        interval = "-" if pair.interval.low is None else f"[{pair.interval.low:.5f}, {pair.interval.high:.5f}]"
        better = (pair.difference < 0) == lower_is_better(name)
        verdict = ("  B is better" if better else "  A is better") if pair.decided else ""
        lines.append(f"{name:<28}{pair.difference:>12.5f}   {interval:<26}{pair.win_rate:>7.1%}{verdict}")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    first, second = read_result(args.first), read_result(args.second)
    found = compare(first, second, args.seed, args.draws)
    print(as_text(found, first, second))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        atomic_write(args.out / "comparison.json", json.dumps(as_json(found), indent=1).encode())
        atomic_write(args.out / "differences.csv", differences_table(first, second, list(found)))


if __name__ == "__main__":
    run_cli(main)
