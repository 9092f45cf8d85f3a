"""The manifest: a .csv that lists videos, one a row. How it is read, however it was made, and how it is written.

Columns: `path` (relative to the folder of the .csv, or absolute), and optionally `label` and `sha256`; others are
ignored. LARP's lists are read as they are: their `label` is a number, so the name beside it, `action`, is taken. A
list without a header is read if it has one column of video files. Reading streams: memory does not grow with the rows.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizer.common.errors import UserError
from tokenizer.data.files import VIDEO_SUFFIXES, display_name, this_is_a_list

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
        """The video of a row of this manifest."""
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
            raise UserError(f"{_name(manifest)}: line {line} has no usable path; every row needs one")
        label = cells.get("action") or cells.get("label") or ""
        yield ManifestRow(path, label, cells.get("sha256", "").lower(), line)
    if empty:
        raise UserError(f"{_name(manifest)}: needs at least one row")


def read_table(file: str | Path, needed: str) -> Iterator[dict[str, str]]:
    """The rows of any .csv with a header that has the column `needed`, as column -> cell. Errors as in `read_rows`."""
    for _, cells in _records(Path(file), needed):
        yield cells


def write_rows(manifest: str | Path, rows: Iterable[ManifestRow]) -> int:
    """Write a manifest, streaming; it appears complete or not at all. Returns the number of rows."""
    manifest = Path(manifest)
    aside = manifest.with_name(f".{manifest.name}.partial")
    num_rows = 0
    try:
        with open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            out.write(",".join(_FIELDS) + "\n")
            for row in rows:
                out.write(",".join(_quoted(getattr(row, field)) for field in _FIELDS) + "\n")
                num_rows += 1
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, manifest)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return num_rows


def path_for(video: Path, manifest: Path) -> str:
    """How `video` is written in `manifest`: relative if it lies below the manifest's folder, else absolute."""
    folder, video = manifest.absolute().parent, video.absolute()
    return str(video.relative_to(folder)) if video.is_relative_to(folder) else str(video)


def _records(manifest: Path, needed: str = "path") -> Iterator[tuple[int, dict[str, str]]]:
    """(line, column -> cell) of every row; columns in lower case, cells as they are."""
    if not manifest.is_file():
        raise UserError(f"{_name(manifest)}: no such manifest; give a .csv with the column {needed}")
    with open(manifest, "rb") as file:
        if file.read(2) in _UTF16:
            raise UserError(f"{_name(manifest)}: is UTF-16; save it as UTF-8")
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
                        f"{_name(manifest)}: line {reader.line_num} has {len(row)} cells for {len(header)} columns; "
                        "put names that hold a comma into quotes"
                    )
                if row:
                    yield reader.line_num, dict(zip(header, row, strict=False))
        except csv.Error as error:
            raise UserError(f"{_name(manifest)}: line {reader.line_num}: {error}; is a quote left open?") from error


def _header(manifest: Path, first: list[str], needed: str) -> list[str] | None:
    """Names of the columns; None for a bare list of video files, which has none."""
    header = [cell.strip().lower() for cell in first]
    if needed in header:
        if repeated := {name for name in header if header.count(name) > 1}:
            raise UserError(f"{_name(manifest)}: the header names {', '.join(sorted(repeated))!r} more than once")
        return header
    if needed == "path" and len(first) == 1 and first[0].lower().endswith(VIDEO_SUFFIXES):
        return None
    found = ", ".join(first)[:80] or "nothing"
    if len(first) == 1 and (separator := next((key for key in _SEPARATORS if key in first[0]), None)):
        raise UserError(
            f"{_name(manifest)}: {this_is_a_list(needed)}; the cells of this one are separated by "
            f"{_SEPARATORS[separator]}: {found!r}"
        )
    raise UserError(f"{_name(manifest)}: needs a header with the column {needed} and at least one row; found {found!r}")


def no_formula(cell: str) -> str:
    """A cell of a report for people: a spreadsheet would run what begins like a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _quoted(cell: str) -> str:
    """csv.writer leaves a lone carriage return bare, and it would end the row."""
    if any(character in cell for character in ',"\r\n') or cell != cell.strip():
        return '"' + cell.replace('"', '""') + '"'
    return cell


def _name(manifest: Path) -> str:
    return display_name(manifest)
