"""Videos in tar files, in the layout of `webdataset`: `0001.mp4` and beside it `0001.cls`, `0001.txt` or `0001.json`.

A source is one `shard.tar` or a row of them, `clips-{000000..000099}.tar`. The headers of each tar are read once; from
then on a video is read at its place in the file, so clips can be drawn in any order.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tokenizer.common.errors import UserError
from tokenizer.data.files import VIDEO_SUFFIXES, Span, display_name, fingerprint, open_regular
from tokenizer.data.video_table import VideoTable, check_not_empty, kept_table

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
        facts = json.loads(text)
    except ValueError:
        return ""
    return str(facts.get("label", "")) if isinstance(facts, dict) else ""
