"""Lists of videos: manifests (.csv), tar shards in the layout of `webdataset`, and the compact table that holds either.

A manifest has one video a row. Columns: `path` (relative to the folder of the .csv, or absolute), and optionally
`label` and `sha256`; others are ignored. LARP's lists are read as they are: their `label` is a number, so the name
beside it, `action`, is taken. A list without a header is read if it has one column of video files. Reading streams:
memory does not grow with the rows.

A shard source is one `shard.tar` or a row of them, `clips-{000000..000099}.tar`, which hold `0001.mp4` and beside it
`0001.cls`, `0001.txt` or `0001.json`. The headers of each tar are read once; from then on a video is read at its place
in the file, so clips can be drawn in any order.

The table holds millions of videos in a few arrays: the paths as one block of bytes, the labels as numbers. A video
takes the bytes of its path and 12 more (28 in a tar shard); nothing is an object of its own, so forked workers share
all of it. A large table is kept in a folder beside the manifest or shard it was made from, named by the content of
that file: the first process builds it, all others map it into memory.

Letters: R videos.
"""

from __future__ import annotations

import csv
import glob
import logging
import os
import re
import shutil
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import numpy as np

from tokenizer.common.checkpoint import written_aside
from tokenizer.common.errors import UserError
from tokenizer.common.schema import parse_json
from tokenizer.common.work_units import lock
from tokenizer.data.files import VIDEO_SUFFIXES, Span, display_name, fingerprint, open_regular, this_is_a_list

_FIELDS = ("path", "label", "sha256")
_SEPARATORS = {"\t": "tabs", ";": "';'", "|": "'|'", " ": "spaces"}  # of lists that are no manifests
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class ManifestRow:
    """One video of a manifest. `line`: the last line of its row in the file (0: not read from one)."""

    path: str
    label: str = ""
    sha256: str = ""
    line: int = 0

    def file(self, manifest: Path) -> Path:
        return manifest.absolute().parent / self.path


def read_rows(manifest: str | Path) -> Iterator[ManifestRow]:
    """The rows of a manifest, one after the other; blank lines are passed over.

    Raises UserError, naming file and line, for a missing file, another encoding than UTF-8 (a byte order mark is
    fine, and so are file names of any bytes), a missing header, an open quote, a row without path or with too many
    cells, and at the end for a manifest without a row.
    """
    manifest = Path(manifest)
    empty = True
    for line, cells in _records(manifest):
        empty = False
        path = cells.get("path", "")
        if not path or "\0" in path:
            raise UserError(f"{display_name(manifest)}: line {line} has no usable path; every row needs one")
        label = cells.get("action") or cells.get("label") or ""
        yield ManifestRow(path, label, cells.get("sha256", "").lower(), line)
    if empty:
        raise UserError(f"{display_name(manifest)}: needs at least one row")


def read_table(file: str | Path, needed: str) -> Iterator[dict[str, str]]:
    """The rows of any .csv with a header that has the column `needed`, as column -> cell. Errors as in `read_rows`."""
    for _, cells in _records(Path(file), needed):
        yield cells


def write_rows(manifest: str | Path, rows: Iterable[ManifestRow]) -> int:
    """Write a manifest, streaming; it appears complete or not at all. Returns the number of rows."""
    num_rows = 0
    with (
        written_aside(Path(manifest)) as aside,
        open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as out,
    ):
        out.write(",".join(_FIELDS) + "\n")
        for row in rows:
            out.write(",".join(_quoted(getattr(row, field)) for field in _FIELDS) + "\n")
            num_rows += 1
    return num_rows


def path_for(video: Path, manifest: Path) -> str:
    """How `video` is written in `manifest`: relative if it lies below the manifest's folder, else absolute."""
    folder, video = manifest.absolute().parent, video.absolute()
    return str(video.relative_to(folder)) if video.is_relative_to(folder) else str(video)


def _check_manifest(manifest: Path, needed: str) -> None:
    """UserError for a file that is absent or UTF-16."""
    if not manifest.is_file():
        raise UserError(f"{display_name(manifest)}: no such manifest; give a .csv with the column {needed}")
    with open(manifest, "rb") as file:
        if file.read(2) in _UTF16:
            raise UserError(f"{display_name(manifest)}: is UTF-16; save it as UTF-8")


def _records(manifest: Path, needed: str = "path") -> Iterator[tuple[int, dict[str, str]]]:
    """(line, column -> cell) of every row; columns in lower case, cells unchanged."""
    _check_manifest(manifest, needed)
    # utf-8-sig drops the mark that spreadsheets put first; strict=True reports a quote that is never closed
    with open(manifest, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, strict=True)
        try:
            first = next((row for row in reader if row), [])
            header = _header(manifest, first, needed)
            if header is None:
                header = ["path"]
                yield reader.line_num, {"path": first[0]}
            for row in reader:
                if len(row) > len(header):
                    raise UserError(
                        f"{display_name(manifest)}: line {reader.line_num} has {len(row)} cells for {len(header)} "
                        "columns; put names that hold a comma into quotes"
                    )
                if row:
                    yield reader.line_num, dict(zip(header, row, strict=False))
        except csv.Error as error:
            raise UserError(
                f"{display_name(manifest)}: line {reader.line_num}: {error}; is a quote left open?"
            ) from error


def _header(manifest: Path, first: list[str], needed: str) -> list[str] | None:
    """Names of the columns; None for a bare list of video files, which has none."""
    header = [cell.strip().lower() for cell in first]
    if needed in header:
        if repeated := {name for name in header if header.count(name) > 1}:
            raise UserError(
                f"{display_name(manifest)}: the header names {', '.join(sorted(repeated))!r} more than once"
            )
        return header
    if needed == "path" and len(first) == 1 and first[0].lower().endswith(VIDEO_SUFFIXES):
        return None
    found = ", ".join(first)[:80] or "nothing"
    if len(first) == 1 and (separator := next((key for key in _SEPARATORS if key in first[0]), None)):
        raise UserError(
            f"{display_name(manifest)}: {this_is_a_list(needed)}; the cells of this one are separated by "
            f"{_SEPARATORS[separator]}: {found!r}"
        )
    raise UserError(
        f"{display_name(manifest)}: needs a header with the column {needed} and at least one row; found {found!r}"
    )


def no_formula(cell: str) -> str:
    """A cell of a report for people: a spreadsheet would run what begins like a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _quoted(cell: str) -> str:
    """csv.writer leaves a lone carriage return bare, and it would end the row."""
    if any(character in cell for character in ',"\r\n') or cell != cell.strip():
        return '"' + cell.replace('"', '""') + '"'
    return cell


KEPT_BYTES = 16 << 20  # the table of a smaller manifest is built anew by every process, in a second or less
_HASHED_ROWS = 1 << 16
_VERSION = 1

log = logging.getLogger(__name__)


class _Packed:
    """Strings on the way into `Strings`."""

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._block, self._ends = bytearray(), array("q")
        for string in strings:
            self.append(string)

    def append(self, string: str) -> None:
        self._block += string.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._block))

    def columns(self, block: str, ends: str) -> dict[str, np.ndarray]:
        """The two arrays under these names."""
        return {block: np.frombuffer(self._block, np.uint8), ends: np.frombuffer(self._ends, np.int64)}


class Strings(Sequence[str]):
    """A list of strings as one block of UTF-8 bytes (surrogates for others) and the end of each, int64 [R]."""

    def __init__(self, block: np.ndarray, ends: np.ndarray) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        """Pack any number of strings."""
        packed = _Packed(strings)
        return cls(*packed.columns("block", "ends").values())

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = int(self.ends[index - 1]) if index else 0
        return self.block[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def hashes(self) -> np.ndarray:
        """uint64 [R]: equal strings have equal numbers, others different ones but for one chance in 2^64."""
        result = np.empty(len(self), np.uint64)
        for first in range(0, len(self), _HASHED_ROWS):
            ends = self.ends[first : first + _HASHED_ROWS]
            begin = int(self.ends[first - 1]) if first else 0
            starts = np.concatenate([[begin], ends[:-1]]) - begin
            place = np.arange(int(ends[-1]) - begin) - np.repeat(starts, np.diff(np.append(starts, ends[-1] - begin)))
            powers = np.cumprod(np.full(int(place.max()) + 1, 0x9E3779B97F4A7C15, np.uint64))
            terms = (self.block[begin : ends[-1]].astype(np.uint64) + np.uint64(1)) * powers[place]
            result[first : first + len(ends)] = np.add.reduceat(terms, starts)
        return result


class VideoTable:
    """R videos: `paths`, `label(i)`, and for members of tar files `span(i)`; in memory or mapped from a folder.

    paths: as the manifest writes them, or of the tar file. keys: names within the tar files; None for plain files.
    """

    def __init__(self, columns: dict[str, np.ndarray], folder: Path | None = None) -> None:
        self._columns, self._folder = columns, folder
        self.paths = Strings(columns["paths"], columns["path_ends"])
        self._labels = Strings(columns["labels"], columns["label_ends"])
        self.keys = Strings(columns["keys"], columns["key_ends"]) if "keys" in columns else None

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str, str, Span | None]]) -> VideoTable:
        """From (path, label or "", key in a tar file or "", its span) of each video; streams through `rows`."""
        codes, paths, keys, spans = array("i"), _Packed(), _Packed(), array("q")
        labels: dict[str, int] = {}
        shards: dict[str, int] = {}
        for path, label, key, span in rows:
            codes.append(labels.setdefault(label, len(labels)) if label else -1)
            if span is None:
                paths.append(path)
            else:
                spans.extend((shards.setdefault(path, len(shards)), *span))
                keys.append(key)
        columns: dict[str, np.ndarray] = {"codes": np.frombuffer(codes, np.int32)}
        if shards:
            columns["spans"] = np.frombuffer(spans, np.int64).reshape(-1, 3)
            columns |= keys.columns("keys", "key_ends")
            paths = _Packed(shards)
        return cls(columns | paths.columns("paths", "path_ends") | _Packed(labels).columns("labels", "label_ends"))

    def __len__(self) -> int:
        return len(self._columns["codes"])

    @property
    def num_bytes(self) -> int:
        return sum(column.nbytes for column in self._columns.values())

    def path(self, row: int) -> str:
        """The file that holds a video."""
        return self.paths[row if self.keys is None else int(self._columns["spans"][row, 0])]

    def label(self, row: int) -> str | None:
        code = int(self._columns["codes"][row])
        return None if code < 0 else self._labels[code]

    def span(self, row: int) -> Span | None:
        """The bytes of its tar file that hold a video."""
        return None if self.keys is None else Span(*map(int, self._columns["spans"][row, 1:]))

    def save(self, folder: Path) -> None:
        """Write the columns into a new folder, which appears complete or not at all."""
        aside = folder.with_name(f"{folder.name}.writing-{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            for name, column in self._columns.items():
                np.save(aside / f"{name}.npy", column)
            os.rename(aside, folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    @classmethod
    def load(cls, folder: Path) -> VideoTable:
        """Map the columns of a folder into memory."""
        return cls({file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        """A mapped table goes to another process as the name of its folder."""
        return (VideoTable.load, (self._folder,)) if self._folder else (VideoTable, (self._columns,))


def kept_table(origin: Path, content: str, build: Callable[[], VideoTable]) -> VideoTable:
    """The table of `origin`, mapped from beside it if there is one of this `content`; else built, and kept there.

    If the folder cannot be written, the table stays in memory.
    """
    folder = origin.with_name(f".{origin.name}.index-{_VERSION}-{content}")
    try:
        if folder.is_dir():
            return VideoTable.load(folder)
    except (OSError, ValueError, KeyError, EOFError) as error:
        log.warning("%s is damaged (%s); it is built again", display_name(folder), error)
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with lock(origin.with_name(f".{origin.name}.index.lock")):  # one process builds, the others wait for it
            if not folder.is_dir():
                for outdated in origin.parent.glob(f".{glob.escape(origin.name)}.index-*"):
                    shutil.rmtree(outdated, ignore_errors=True)
                build().save(folder)
        return VideoTable.load(folder)
    except OSError as error:
        log.warning("%s: its index is not kept (%s); every process builds it anew", display_name(origin), error)
        return build()


def check_not_empty(table: VideoTable, origin: Path) -> VideoTable:
    """UserError for a table without a video."""
    if not len(table):
        raise UserError(f"{display_name(origin)}: holds no video")
    return table


_LABELS = ("cls", "label.txt", "txt", "json")  # in the order of preference
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LARGEST_LABEL = 1 << 16


def is_shard_source(source: str) -> bool:
    """Whether a data source names tar files."""
    return source.lower().endswith(".tar")


def shard_files(source: str) -> list[Path]:
    """The tar files of a source. UserError if one is missing."""
    files = [Path(name) for name in _expand(source)]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{display_name(missing[0])}: no such shard ({len(missing)} of {len(files)} are missing)")
    return files


def shard_table(file: Path) -> VideoTable:
    """The videos of one tar file, by key."""
    file = file.absolute()
    table = kept_table(file, fingerprint(file), lambda: VideoTable.of(_rows(file)))
    return check_not_empty(table, file)


def _expand(source: str) -> Iterator[str]:
    match = _RANGE.search(source)
    if match is None:
        yield source
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{source[: match.start()]}{number:0{len(first)}d}{source[match.end() :]}")


def _rows(file: Path) -> Iterator[tuple[str, str, str, Span | None]]:
    try:
        with open_regular(file) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            for key, group in groupby(_members(tar), lambda member: _key_of(member.name)):
                found = {member.name[len(key) + 1 :].lower(): member for member in group}
                label = next((_label(tar, found[name]) for name in _LABELS if name in found), "")
                for suffix, member in found.items():
                    if f".{suffix}".endswith(VIDEO_SUFFIXES):
                        yield str(file), label, f"{key}.{suffix}", Span(member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{display_name(file)}: is no tar file or is cut short ({error})") from error


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar file, one after the other; none is kept."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps an object for every member
        if member.isfile():
            yield member


def _key_of(name: str) -> str:
    """`a/0001.label.txt` -> `a/0001`: the name up to the first dot behind the last slash."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """The text of a member; of JSON the field `label`."""
    opened = tar.extractfile(member)
    text = opened.read(_LARGEST_LABEL).decode("utf-8", "replace").strip() if opened else ""
    if not member.name.lower().endswith(".json"):
        return text
    try:
        facts = parse_json(text, member.name, "")
    except UserError:
        return ""
    return str(facts.get("label", "")) if isinstance(facts, dict) else ""
