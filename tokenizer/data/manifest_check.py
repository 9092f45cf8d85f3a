"""What is wrong with the videos of a manifest: missing, unreadable, too short, listed twice, in another split too.

Letters: R rows of a manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tokenizer.common.checkpoint import file_sha256
from tokenizer.data.manifest_table import ManifestRow, read_rows
from tokenizer.data.parallel import map_ahead
from tokenizer.data.safe_decode import decode_clips
from tokenizer.data.video_io import VideoError

PROBLEMS = ("missing", "unreadable", "too short", "altered", "duplicate", "overlap")
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
        """Count one problem."""
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
    """Every row with its problems, in order. `against`: another split, which must share no file with this one: by
    path, by name where the rule says so, and by bytes where files are hashed and the other list has their sha256.

    Memory: 8 bytes a row and hash, so a million rows are nothing. Raises UserError for a malformed manifest.
    """
    repeated = _repeated(_keys(manifest))
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
    """Run through `check_manifest` and count."""
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
    if rule.sha256 and file.is_file():
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
            for clip in clips:
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
        """How it holds this file, in words; None where it does not."""
        if _is_in(key, self._paths):
            return "also in"
        if digest and _is_in(_hash(digest), self._digests):
            return "the same bytes are in"
        return (
            "a file of this name is in" if self._rule.same_name and _is_in(_hash(_name_of(row)), self._names) else None
        )


def _repeated(key_R: np.ndarray) -> set[int]:
    value, count = np.unique(key_R, return_counts=True)
    return set(value[count > 1].tolist())


def _is_in(key: int, sorted_keys: np.ndarray) -> bool:
    at = int(np.searchsorted(sorted_keys, np.uint64(key)))
    return at < len(sorted_keys) and int(sorted_keys[at]) == key
