"""Build and check manifests, the lists of videos that training and evaluation read.

    python -m tokenizer.data.manifest build --dataset ucf101 --root UCF-101 --split train --out ucf101_train.csv
    python -m tokenizer.data.manifest build --dataset k600   --root k600/val --list validate.csv --out k600_val.csv
    python -m tokenizer.data.manifest build --dataset webvid --root videos --list results_2M_val.csv --out val.csv
    python -m tokenizer.data.manifest build --dataset folder --root videos --out all.csv
    python -m tokenizer.data.manifest check ucf101_train.csv [--against ucf101_test.csv] [--sha256]

`build` lists the files that are there and names the missing ones in OUT.missing.txt. Exit code: 0 all is well, 1 where
`check` found anything, 2 for a wrong argument or a list that cannot be read.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from tokenizer.common.arguments import Parser, at_least, positive
from tokenizer.common.checkpoint import atomic_write, file_sha256
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.kinetics import find_kinetics
from tokenizer.data.manifest_check import PROBLEMS, CheckRule, Findings, Problem, check_manifest, collect
from tokenizer.data.manifest_table import ManifestRow, path_for, write_rows
from tokenizer.data.ucf101 import SPLITS, find_ucf101
from tokenizer.data.video_io import display_name, list_videos
from tokenizer.data.webvid import find_webvid

DATASETS = ("ucf101", "k600", "webvid", "folder")
FOUND_PROBLEMS = 1
Found = Iterator[tuple[str, Path | None, str]]


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Build and check lists of videos.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    build = commands.add_parser(
        "build", description="List the videos of a data set.", help="list the videos of a data set"
    )
    build.add_argument("--dataset", required=True, choices=DATASETS)
    build.add_argument("--root", required=True, type=Path, help="folder of the videos")
    build.add_argument("--out", required=True, type=Path, help="the .csv to write")
    build.add_argument("--list", type=Path, help="official list: needed by k600 and webvid; ucf101 finds its own")
    build.add_argument("--split", choices=SPLITS, default="train", help="ucf101 only (default: train)")
    build.add_argument("--fold", type=int, choices=(1, 2, 3), default=1, help="ucf101 only (default: 1)")
    build.add_argument("--sha256", action="store_true", help="also write the sha256 of every file")
    check = commands.add_parser("check", description="Look at every file.", help="look for what is wrong with one")
    check.add_argument("manifest", type=Path)
    check.add_argument("--against", type=Path, metavar="OTHER.csv", help="another split; no file may be in both")
    check.add_argument("--same-name", action="store_true", help="with --against: equal names in other folders, too")
    check.add_argument("--num-frames", type=at_least(1), default=16, help="a shorter video is too short (default: 16)")
    check.add_argument("--fps", type=positive, help="count frames at this rate (default: each file's own)")
    check.add_argument("--decode", choices=("none", "first", "all"), default="first", help="how much to decode")
    check.add_argument("--sha256", action="store_true", help="hash every file: altered ones, copies under other names")
    check.add_argument("--backend", choices=("pyav", "decord"), default="pyav", help="video reader")
    check.add_argument("--workers", type=at_least(1), default=1, metavar="N", help="files at once (default: 1)")
    check.add_argument("--report", type=Path, metavar="FILE.csv", help="write every problem there, with its line")
    check.add_argument("--json", action="store_true", help="print the counts as JSON")
    return parser.parse_args()


def build(args: argparse.Namespace) -> int:
    """Write the manifest and say what is missing."""
    missing: list[str] = []
    total = write_rows(args.out, _rows(_find(args), args, missing))
    if not total:
        args.out.unlink()
        raise UserError(f"{display_name(args.root)}: none of the {len(missing)} listed videos is there; check --root")
    beside = args.out.with_name(f"{args.out.name}.missing.txt")
    if missing:
        atomic_write(beside, "".join(f"{name}\n" for name in missing).encode("utf-8", "surrogateescape"))
    else:
        beside.unlink(missing_ok=True)
    lacking = f"; {len(missing)} of {total + len(missing)} are missing, see {display_name(beside)}" if missing else ""
    print(f"{display_name(args.out)}: {total} videos{lacking}")
    return 0


def check(args: argparse.Namespace) -> int:
    """Print what was found; 1 where anything is wrong."""
    if args.same_name and args.against is None:
        raise UserError("--same-name compares with another split: give --against OTHER.csv too")
    rule = CheckRule(args.num_frames, args.fps, args.decode, args.sha256, args.backend, args.same_name)
    checked = check_manifest(args.manifest, rule, args.against, args.workers)
    bar = tqdm(checked, desc="checking", unit="video", disable=None)
    if args.report is None:
        findings = collect(bar)
    else:
        with open(args.report, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            findings = collect(_reported(bar, file))
    if args.json:
        counts = {kind: findings.counts[kind] for kind in PROBLEMS}
        print(json.dumps({"rows": findings.num_rows, "found": findings.num_found} | counts))
    else:
        print("\n".join([f"{display_name(args.manifest)}: {findings.summary()}", *_examples(findings)]))
    return FOUND_PROBLEMS if findings.counts else 0


def _find(args: argparse.Namespace) -> Found:
    if args.dataset == "ucf101":
        return find_ucf101(args.root, args.split, args.fold, args.list)
    if args.dataset == "folder":
        return _find_folder(args.root)
    if args.list is None:
        raise UserError(f"--dataset {args.dataset} needs --list: the .csv that came with the data set")
    return (find_kinetics if args.dataset == "k600" else find_webvid)(args.root, args.list)


def _find_folder(root: Path) -> Found:
    """Every video below a folder; the folder that it lies in is its label, unless that is the root itself."""
    for video in list_videos(root):
        inner = video.parent != root and video != root
        yield str(video), video, video.parent.name if inner else ""


def _rows(found: Found, args: argparse.Namespace, missing: list[str]) -> Iterator[ManifestRow]:
    for name, video, label in tqdm(found, desc="listing", unit="video", disable=None):
        if video is None:
            missing.append(name)
        else:
            yield ManifestRow(path_for(video, args.out), label, file_sha256(video) if args.sha256 else "")


def _reported(
    checked: Iterable[tuple[ManifestRow, list[Problem]]], file: Iterable[str]
) -> Iterator[tuple[ManifestRow, list[Problem]]]:
    """Pass the rows on and write their problems."""
    out = csv.writer(file)  # type: ignore[arg-type]
    out.writerow(["line", "problem", "path", "detail"])
    for row, problems in checked:
        out.writerows([row.line, problem.kind, row.path, problem.detail] for problem in problems)
        yield row, problems


def _examples(findings: Findings) -> Iterator[str]:
    for kind in PROBLEMS:
        few = findings.examples.get(kind, [])
        for problem in few:
            yield f"  {kind}: line {problem.row.line}, {display_name(problem.row.path)}: {problem.detail}"
        if findings.counts[kind] > len(few):
            yield f"  {kind}: and {findings.counts[kind] - len(few)} more (--report FILE.csv lists all)"


def main() -> int:
    args = parse_arguments()
    return build(args) if args.command == "build" else check(args)


if __name__ == "__main__":
    run_cli(main)
