"""Two systems on the same clips: per-clip differences, their bootstrap interval, and who wins how often.

    python -m evaluations.compare results/eval/A results/eval/B [--out DIR]

A and B are finished evaluations under one protocol and one list. Pairing takes out what makes clips hard or easy, so
it decides where the intervals of the two means still overlap.

Letters: S clips that both scored.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from evaluations.metrics.bootstrap import PairedComparison, compare_paired
from evaluations.metrics.clip_scores import lower_is_better
from evaluations.shards import Result, read_result
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.cli import Parser, at_least
from tokenizer.common.errors import UserError, run_cli

_NOT_METRICS = {"index", "name", "label", "start", "lengths", "skipped"}


def compare(first: Result, second: Result, seed: int = 0, draws: int = 1000) -> dict[str, PairedComparison]:
    """Metric -> second minus first. UserError for different protocols or lists, and where no clip is in both."""
    for what, key in (("protocol", "protocol_hash"), ("list of clips", "list")):
        if first.card[key] != second.card[key]:
            raise UserError(f"{first.folder} and {second.folder} have not the same {what}; their clips are not pairs")
    names = [name for name in first.clips if name in second.clips]
    if not names:
        raise UserError(f"{first.folder} and {second.folder} have no scored clip in common")
    columns = [column for column in first.clips[names[0]] if column in second.clips[names[0]]]
    found = {}
    for metric in (column for column in columns if column not in _NOT_METRICS):
        ours, theirs = (np.array([float(r.clips[name][metric]) for name in names]) for r in (first, second))
        found[metric] = compare_paired(ours, theirs, lower_is_better(metric), seed, draws)
    if not found:
        raise UserError(f"{first.folder} and {second.folder} have no metric of clips in common, only distances of sets")
    return found


def differences_table(first: Result, second: Result, metrics: list[str]) -> str:
    """A .csv with the differences of every clip."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["name", *metrics])
    for name in (name for name in first.clips if name in second.clips):
        a, b = first.clips[name], second.clips[name]
        table.writerow([name, *(repr(float(b[metric]) - float(a[metric])) for metric in metrics)])
    return out.getvalue()


def as_json(found: dict[str, PairedComparison]) -> dict[str, Any]:
    """The same for machines; `decided`: the interval does not hold 0."""
    return {name: dataclasses.asdict(pair) | {"decided": pair.decided} for name, pair in found.items()}


def as_text(found: dict[str, PairedComparison], first: Result, second: Result) -> str:
    """A table for people."""
    num_clips = next(iter(found.values())).num_clips
    lines = [
        f"A {first.folder}",
        f"B {second.folder}",
        f"{num_clips} clips of protocol {first.card['protocol']['name']} ({first.card['protocol_hash']})",
        "",
        f"{'metric':<28}{'B - A':>12}   {'interval':<26}{'B wins':>7}",
    ]
    for name, pair in found.items():
        interval = f"[{pair.interval.low:.5f}, {pair.interval.high:.5f}]"
        better = (pair.difference < 0) == lower_is_better(name)
        verdict = ("  B is better" if better else "  A is better") if pair.decided else ""
        lines.append(f"{name:<28}{pair.difference:>12.5f}   {interval:<26}{pair.win_rate:>7.1%}{verdict}")
    return "\n".join(lines)


def main() -> None:
    parser = Parser("Compare two evaluations clip by clip.")
    parser.add_argument("first", metavar="A", help="results folder of the one system")
    parser.add_argument("second", metavar="B", help="results folder of the other, under the same protocol")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write comparison.json and differences.csv there")
    parser.add_argument("--draws", type=at_least(1), default=1000, metavar="N", help="of the bootstrap (default: 1000)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the bootstrap (default: 0)")
    args = parser.parse_args()
    first, second = read_result(args.first), read_result(args.second)
    found = compare(first, second, args.seed, args.draws)
    print(as_text(found, first, second))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        atomic_write(args.out / "comparison.json", json.dumps(as_json(found), indent=1).encode())
        table = differences_table(first, second, list(found))
        atomic_write(args.out / "differences.csv", table.encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    run_cli(main)
