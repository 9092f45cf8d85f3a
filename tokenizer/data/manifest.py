"""Build and check manifests, the lists of videos that training and evaluation read.

    python -m tokenizer.data.manifest build --dataset ucf101 --root UCF-101 --split train --out ucf101_train.csv
    python -m tokenizer.data.manifest build --dataset k600   --root k600/val --list validate.csv --out k600_val.csv
    python -m tokenizer.data.manifest build --dataset webvid --root videos --list results_2M_val.csv --out val.csv
    python -m tokenizer.data.manifest build --dataset folder --root videos --out all.csv
    python -m tokenizer.data.manifest check ucf101_train.csv [--against ucf101_test.csv] [--sha256]

`build` lists the files that it finds and names the missing ones in OUT.missing.txt. `check` finds videos that are
missing, unreadable, too short, altered, listed twice, or in another split too. Exit code: 0 all is well, 1 if `check`
found anything, 2 for a wrong argument or a list that cannot be read.

Letters: R rows of a manifest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizer.common.cli import Parser, answer_help, at_least, frame_rate

DATASETS = ("ucf101", "k600", "webvid", "folder")


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Build and check lists of videos.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    build = commands.add_parser(
        "build", description="List the videos of a data set.", help="list the videos of a data set"
    )
    build.add_argument("--dataset", required=True, choices=DATASETS, help="its layout")
    build.add_argument("--root", required=True, type=Path, help="folder of the videos")
    build.add_argument("--out", required=True, type=Path, help="the .csv to write")
    build.add_argument("--list", type=Path, help="official list: needed by k600 and webvid; ucf101 finds its own")
    build.add_argument("--split", choices=("train", "test", "all"), default="train", help="ucf101 (default: train)")
    build.add_argument("--fold", type=int, choices=(1, 2, 3), default=1, help="ucf101 (default: 1)")
    build.add_argument("--sha256", action="store_true", help="also write the sha256 of every file")
    finds = "find missing, damaged, short and repeated videos"
    check = commands.add_parser("check", description="Look at every file.", help=finds)
    check.add_argument("manifest", type=Path, help="the .csv to check")
    check.add_argument("--against", type=Path, metavar="OTHER.csv", help="another split; no file may be in both")
    check.add_argument("--same-name", action="store_true", help="with --against: equal names in other folders, too")
    check.add_argument("--num-frames", type=at_least(1), default=16, help="frames a video needs (default: 16)")
    check.add_argument("--fps", type=frame_rate, help="count frames at this rate (default: each file's own)")
    check.add_argument("--decode", choices=("none", "first", "all"), default="first", help="frames (default: first)")
    check.add_argument("--sha256", action="store_true", help="hash every file: finds altered ones and copies")
    check.add_argument("--backend", choices=("pyav", "decord"), default="pyav", help="video reader (default: pyav)")
    check.add_argument("--workers", type=at_least(1), default=1, metavar="N", help="files at once (default: 1)")
    check.add_argument("--report", type=Path, metavar="FILE.csv", help="write every problem there, with its line")
    check.add_argument("--json", action="store_true", help="print the counts as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import contextlib
import csv
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from tokenizer.common.checkpoint import atomic_write, file_sha256, written_aside
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.work_units import map_ahead
from tokenizer.data.datasets import find_kinetics, find_ucf101, find_webvid
from tokenizer.data.safe_decode import decode_clips
from tokenizer.data.video_io import VideoError, display_name, list_videos
from tokenizer.data.video_table import ManifestRow, no_formula, path_for, read_rows, write_rows

PROBLEMS = ("missing", "unreadable", "too short", "truncated", "altered", "duplicate", "overlap")
_MOST_EXAMPLES = 5
_SIDE = 32  # frames are made this small before they come over from the decoding process


@dataclass(frozen=True)
class CheckRule:
    """How closely to look.

    decode: none (is the file there), first (does its first clip decode), all (does it decode to its end).
    sha256: hash every file; one that differs from the column `sha256` is altered, equal ones are duplicates.
    same_name: a file of another split with the same name in another folder overlaps too, as in train/ and val/ of K600.
    """

    num_frames: int = 16
    fps: float | None = None
    decode: str = "first"
    sha256: bool = False
    backend: str = "pyav"
    same_name: bool = False


@dataclass(frozen=True)
class Problem:
    row: ManifestRow
    kind: str  # one of PROBLEMS
    detail: str


@dataclass
class Findings:
    """Counts over a whole manifest; the first few problems of each kind as examples."""

    num_rows: int = 0
    num_found: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Problem]] = field(default_factory=dict)

    def add(self, problem: Problem) -> None:
        self.counts[problem.kind] += 1
        few = self.examples.setdefault(problem.kind, [])
        if len(few) < _MOST_EXAMPLES:
            few.append(problem)

    def summary(self) -> str:
        """One line: rows, files found, and how many of each problem."""
        counts = ", ".join(f"{self.counts[kind]} {kind}" for kind in PROBLEMS)
        return f"{self.num_rows} rows, {self.num_found} found, {counts}"


def check_manifest(
    manifest: Path, rule: CheckRule, against: Path | None = None, num_threads: int = 1
) -> Iterator[tuple[ManifestRow, list[Problem]]]:
    """Every row with its problems, in order.

    against: another split, which must share no file with this one: by path, by name if the rule asks for it, and by
    bytes if files are hashed and the other list has their sha256. Memory: 8 bytes a row and hash. Raises UserError for
    a malformed manifest.
    """
    key_R, count_R = np.unique(_keys(manifest), return_counts=True)
    repeated = set(key_R[count_R > 1].tolist())
    elsewhere = _Elsewhere(against, rule) if against else None
    seen: dict[int, int] = {}

    def look(row: ManifestRow) -> tuple[ManifestRow, str, list[Problem]]:
        return (row, *_look_at(row, manifest, rule))

    digests_seen: dict[str, int] = {}
    for row, digest, problems in map_ahead(look, read_rows(manifest), num_threads):
        key = _key(row, manifest)
        if key in repeated:
            if key in seen:
                problems.append(Problem(row, "duplicate", f"the same file as in line {seen[key]}"))
            seen.setdefault(key, row.line)
        elif rule.sha256 and digest:
            if digest in digests_seen:
                problems.append(Problem(row, "duplicate", f"the same bytes as the file of line {digests_seen[digest]}"))
            digests_seen.setdefault(digest, row.line)
        if elsewhere and (how := elsewhere.holds(row, key, digest)):
            problems.append(Problem(row, "overlap", f"{how} {against}"))
        yield row, problems


def collect(checked: Iterator[tuple[ManifestRow, list[Problem]]]) -> Findings:
    findings = Findings()
    for _, problems in checked:
        findings.num_rows += 1
        findings.num_found += not any(problem.kind == "missing" for problem in problems)
        for problem in problems:
            findings.add(problem)
    return findings


def _look_at(row: ManifestRow, manifest: Path, rule: CheckRule) -> tuple[str, list[Problem]]:
    """(sha256 or nothing, problems) of one file by itself."""
    file = row.file(manifest)
    if not file.exists():
        return "", [Problem(row, "missing", "no such file")]
    digest, problems = "", []
    if rule.sha256 and file.is_file():  # a regular file: a pipe would block
        digest = file_sha256(file)
        if row.sha256 and row.sha256 != digest:
            problems.append(Problem(row, "altered", f"sha256 is {digest[:12]}.., listed {row.sha256[:12]}.."))
    if rule.decode != "none":
        problems += _decode(row, file, rule)
    return digest, problems


def _decode(row: ManifestRow, file: Path, rule: CheckRule) -> list[Problem]:
    problems = []
    every = rule.decode == "all"
    try:
        clips = decode_clips(file, rule.num_frames, _SIDE, rule.fps, all_clips=every, backend=rule.backend)
        with contextlib.closing(clips):
            while True:
                try:
                    clip = next(clips)
                except StopIteration as end:
                    short = (note for note in end.value.notes if note.startswith("truncated"))
                    problems += [Problem(row, "truncated", note.partition(": ")[2]) for note in short]
                    break
                if clip.num_padded:
                    have = rule.num_frames - clip.num_padded
                    problems.append(Problem(row, "too short", f"has {have} frames of {rule.num_frames}"))
    except VideoError as error:
        problems.append(Problem(row, "unreadable", error.reason))
    return problems


# Which files two rows or two manifests share, by 64-bit hashes of the absolute path


def _key(row: ManifestRow, manifest: Path) -> int:
    return _hash(os.path.normpath(row.file(manifest)))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "big")


def _name_of(row: ManifestRow) -> str:
    """The file's name without folder and suffix, so that transcoded copies are the same."""
    return Path(row.path).stem.lower()


def _keys(manifest: Path) -> np.ndarray:
    """uint64 [R]."""
    return _uint64(_key(row, manifest) for row in read_rows(manifest))


def _uint64(keys: Iterator[int]) -> np.ndarray:
    return np.frombuffer(array("Q", keys), np.uint64)


class _Elsewhere:
    """The files of another split, by everything that the rule compares; sorted hashes of 8 bytes."""

    def __init__(self, manifest: Path, rule: CheckRule) -> None:
        self._rule = rule
        self._paths = np.unique(_keys(manifest))
        names = (_hash(_name_of(row)) for row in read_rows(manifest) if rule.same_name)
        digests = (_hash(row.sha256) for row in read_rows(manifest) if rule.sha256 and row.sha256)
        self._names, self._digests = (np.unique(_uint64(keys)) for keys in (names, digests))

    def holds(self, row: ManifestRow, key: int, digest: str) -> str | None:
        """How it holds this file, in words; None if it does not."""
        if _is_in(key, self._paths):
            return "also in"
        if digest and _is_in(_hash(digest), self._digests):
            return "the same bytes are in"
        return (
            "a file of this name is in" if self._rule.same_name and _is_in(_hash(_name_of(row)), self._names) else None
        )


def _is_in(key: int, sorted_keys: np.ndarray) -> bool:
    at = int(np.searchsorted(sorted_keys, np.uint64(key)))
    return at < len(sorted_keys) and int(sorted_keys[at]) == key


FOUND_PROBLEMS = 1
Found = Iterator[tuple[str, Path | None, str]]


def build(args: argparse.Namespace) -> int:
    """Write the manifest and report missing videos."""
    missing: list[str] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
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
    if args.same_name and args.against is None:
        raise UserError("--same-name compares with another split: give --against OTHER.csv too")
    rule = CheckRule(args.num_frames, args.fps, args.decode, args.sha256, args.backend, args.same_name)
    checked = check_manifest(args.manifest, rule, args.against, args.workers)
    bar = tqdm(checked, desc="checking", unit="video", disable=None)
    if args.report is None:
        findings = collect(bar)
    else:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        with (
            written_aside(args.report) as aside,
            open(aside, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
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
            yield ManifestRow(
                path_for(video, args.out), label, file_sha256(video) if args.sha256 and video.is_file() else ""
            )


def _reported(
    checked: Iterable[tuple[ManifestRow, list[Problem]]], file: Iterable[str]
) -> Iterator[tuple[ManifestRow, list[Problem]]]:
    """Pass the rows on and write their problems."""
    out = csv.writer(file)  # type: ignore[arg-type]
    out.writerow(["line", "problem", "path", "detail"])
    for row, problems in checked:
        out.writerows(
            [row.line, problem.kind, no_formula(row.path), no_formula(problem.detail)] for problem in problems
        )
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
