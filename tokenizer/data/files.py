"""Video files on disk: which of a folder are videos, what to call them, how to tell that one has changed.

Among them are the 126 real clips that come with the package.

This module, `readers.py` and `cutting.py` import no torch, so the decoding process starts in a fraction of a second.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tokenizer.common.errors import UserError, display_name

VIDEO_SUFFIXES = (
    ".264", ".265", ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".h265", ".hevc",
    ".ivf", ".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts",
    ".mxf", ".nut", ".ogg", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
)  # fmt: skip
_RESOURCE_FORK = "._"  # macOS writes `._clip.mp4` beside `clip.mp4`: attributes, not a video
_END_BYTES = 1 << 20
_LIST_SUFFIXES = (".csv", ".tsv")
_SNIFFED_BYTES = 4096
BUNDLED = Path(__file__).parent / "bundled"
SPLITS = ("train", "heldout")  # of the bundled clips

log = logging.getLogger(__name__)


class VideoError(UserError):
    """One file that cannot be read. `path` and `reason` name the file and the cause; callers report it and go on."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{display_name(path)}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[VideoError], tuple[Path, str]]:
        return VideoError, (self.path, self.reason)


class Span(NamedTuple):
    """A part of a file, in bytes: a member of a tar shard."""

    offset: int
    size: int


def file_slug(text: str, most: int = 60) -> str:
    """A name that any file system takes: ASCII letters, digits and `_`; 1 to `most` characters."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:most] or "video"


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. VideoError for anything else: a pipe would block, a device may never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe blocks in open() already
    except OSError as error:
        raise VideoError(path, _why(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VideoError(path, "is not a regular file")
    return os.fdopen(descriptor, "rb")


def check_regular(path: str | os.PathLike[str]) -> int:
    """The size of a regular file in bytes. VideoError for a missing, empty or special file, without opening it."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise VideoError(path, _why(error)) from error
    if not stat.S_ISREG(facts.st_mode):
        raise VideoError(path, "is not a regular file")
    if facts.st_size == 0:
        raise VideoError(path, "is empty (zero bytes)")
    return facts.st_size


def fingerprint(path: str | os.PathLike[str], span: Span | None = None) -> str:
    """Identify a file by its content: its size and the sha256 of its first and last MiB, so copies are equal.

    span: a part of the file in place of all of it. At most 2 MiB are read. VideoError if that fails.
    """
    try:
        with open_regular(path) as file:
            offset, size = span or (0, os.fstat(file.fileno()).st_size)
            file.seek(offset)
            ends = file.read(min(size, _END_BYTES))
            file.seek(offset + max(0, size - _END_BYTES))
            ends += file.read(min(size, _END_BYTES))
    except OSError as error:
        raise VideoError(path, _why(error)) from error
    return f"{size}-{hashlib.sha256(ends).hexdigest()[:16]}"


def _why(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "does not exist; check the path"
    return error.strerror or str(error)


def list_videos(path: str | os.PathLike[str]) -> list[Path]:
    """All video files under a folder (recursive, sorted by name), or the one file given. Names may hold any bytes.

    Linked folders are searched too, each once. Files that are passed over are counted in the log. Raises UserError if
    the path does not exist, is a list of videos, or holds no video.
    """
    root = Path(path)
    try:
        mode = os.stat(root).st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte, or half a surrogate pair
        reason = "no such file or folder"
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR):
            reason = _why(error)
        raise UserError(f"{display_name(root)}: {reason}; give a video file or a folder of videos") from error
    if stat.S_ISREG(mode):
        if is_list(root):
            raise UserError(f"{display_name(root)}: {this_is_a_list()}")
        return [root]
    if not stat.S_ISDIR(mode):
        raise UserError(f"{display_name(root)}: is not a regular file; give a video file or a folder of videos")
    passed_over: Counter[str] = Counter()
    videos = sorted(_videos_below(root, passed_over), key=os.fsencode)
    if passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in passed_over.most_common(8))
        total = passed_over.total()
        log.warning("%s: passed over %d entries that are not videos: %s", display_name(root), total, kinds)
    if not videos:
        suffixes = " ".join(VIDEO_SUFFIXES)
        raise UserError(f"{display_name(root)}: no video under this folder (looked for {suffixes})")
    return videos


def _videos_below(root: Path, passed_over: Counter[str]) -> Iterator[Path]:
    """Videos of a folder and of those below it, linked ones too; a link that leads back is not followed again."""
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        passed_over[f"unreadable folders ({display_name(str(error.filename))})"] += 1

    for folder, below, names in os.walk(root, followlinks=True, onerror=unreadable):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(_RESOURCE_FORK):
                passed_over["._ files of macOS"] += 1
            elif suffix in VIDEO_SUFFIXES:
                yield Path(folder, name)
            else:
                passed_over[display_name(suffix) or "without a suffix"] += 1


@dataclass(frozen=True)
class BundledVideo:
    """One shipped clip (16x128x128, mp4): its file, its scene as label, and its split (splits share no source file)."""

    path: Path
    label: str


@functools.cache
def bundled_videos(split: str) -> tuple[BundledVideo, ...]:
    """The shipped clips of "train" or "heldout", sorted by file name."""
    entries = json.loads((BUNDLED / "manifest.json").read_text(encoding="utf-8"))
    return tuple(BundledVideo(BUNDLED / e["file"], e["label"]) for e in entries if e["split"] == split)


def path_in_environment(name: str, instead: str) -> Path:
    """The file or folder that a variable names. UserError, ending with `instead`, if it is not set or not there."""
    value = os.environ.get(name)
    if not value:
        raise UserError(f"{name} is not set: export it (see scripts/set_env_vars_template.sh), or {instead}")
    if not Path(value).exists():
        raise UserError(f"{name}={value}: does not exist; correct it, or {instead}")
    return Path(value)


def is_list(file: Path) -> bool:
    """Whether a file is a list of videos and not a video: a .csv or .tsv, or text whose first lines name videos."""
    suffix = file.suffix.lower()
    if suffix in _LIST_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return suffix in _LIST_SUFFIXES
    with open_regular(file) as opened:
        start = opened.read(_SNIFFED_BYTES)
    if b"\0" in start:
        return False
    lines = start.decode("utf-8", "replace").lower().splitlines()[:2]
    return any(cell.strip("\"'").endswith(VIDEO_SUFFIXES) for line in lines for cell in re.split(r"[,;\t ]+", line))


def this_is_a_list(needed: str = "path") -> str:
    """The advice for a list in a form that is not read, or given in place of a video."""
    return (
        f"this is a list of videos; a list must be a manifest: a .csv with commas and the column {needed}, named in "
        "data.sources or --data (python -m tokenizer.data.manifest build makes one from a folder)"
    )
