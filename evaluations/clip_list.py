"""The clips that a protocol scores: an ordered list with a hash, the same in every process.

The videos come from `--data` (a manifest .csv or a folder), else from UCF_ROOT, or K600_ROOT with K600_VAL_FILE. Files
are decoded in another process, so a broken one costs its clip and nothing else. Files are told apart by content: every
cache of what they hold has their fingerprints in its key.

Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from evaluations.protocols import Protocol
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.device import rng_for
from tokenizer.common.errors import UserError
from tokenizer.common.schema import fits, read_json_value
from tokenizer.common.work_units import lock, map_ahead
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.datasets import find_kinetics, find_ucf101
from tokenizer.data.files import SPLITS, Span, bundled_videos, path_in_environment
from tokenizer.data.safe_decode import decode_clip_at, decode_clips, fingerprint_of
from tokenizer.data.video_io import DecodedClip, VideoError, display_name, list_videos, to_uint8
from tokenizer.data.video_table import read_rows

T = TypeVar("T")

INSTEAD = "give --data, a folder of videos or a manifest .csv"
_PROBE_SIDE = 32  # frames are made this small if only their number is wanted


def fingerprint(path: Path, span: Span | None = None) -> str:
    """Of a file's content: its size and the sha256 of both its ends. "unreadable" for a file that cannot be opened."""
    try:
        return fingerprint_of(path, span)
    except VideoError:
        return "unreadable"


@dataclass(frozen=True)
class ListedClip:
    """One clip of the list. `start`: its first frame in the file, None if that is not known before it is read.

    read: frames of the protocol's number and size; VideoError if that fails. content: fingerprint of the file, "" for a
    rendered clip.
    """

    index: int
    name: str
    label: str
    start: int | None
    read: Callable[[], DecodedClip]
    content: Callable[[], str] = str


@dataclass(frozen=True)
class ClipList:
    """All clips in order. `notes`: what differs from the official list, in words.

    files_sha256: of the content of all files, in order, when they were listed: other files under the same names,
    re-encoded for example, give another.
    """

    clips: list[ListedClip]
    files_sha256: str
    num_listed: int
    num_missing: int
    notes: list[str] = field(default_factory=list)

    @cached_property
    def sha256(self) -> str:
        """Of names, labels and starts, in order: equal if two people score the same clips of a data set."""
        return _sha256([[clip.name, clip.label, clip.start] for clip in self.clips])

    def facts(self) -> dict[str, object]:
        return {
            "clips": len(self.clips),
            "listed_videos": self.num_listed,
            "missing_videos": self.num_missing,
            "sha256": self.sha256,
            "files_sha256": self.files_sha256,
        }


def _sha256(rows: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@dataclass(frozen=True)
class _Video:
    name: str
    path: Path
    label: str

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.path)

    def content(self) -> str:
        """Fingerprint of the file, read once."""
        return self._fingerprint


def list_clips(
    protocol: Protocol, data: str | Path | None = None, cache: Path | None = None, workers: int = 1
) -> ClipList:
    """The list of a protocol. cache: folder in which the numbers of frames are remembered (rule `windows`).

    Raises UserError if the data is not found or holds nothing.
    """
    if protocol.dataset == "mini":
        if data is not None:
            raise UserError(f"protocol {protocol.name} brings its own clips; leave --data out, or use folder-recon")
        return _miniature(protocol)
    videos, num_listed = _find_videos(protocol, data)
    num_missing = num_listed - len(videos)
    if not videos:
        raise UserError(f"protocol {protocol.name}: none of the {num_listed} listed videos is there; check the root")
    notes: list[str] = []
    if data is not None and protocol.dataset in ("ucf101", "k600"):
        notes.append(f"the list is --data {display_name(Path(data).name)}, not looked up in the data set's own")
    videos = _each_once(videos, notes)
    if protocol.listed not in (None, num_listed):
        notes.append(f"the list has {num_listed} videos, the official one {protocol.listed}")
    if num_missing:
        notes.append(f"{num_missing} of {num_listed} listed videos are missing")
    if protocol.clip_rule == "windows":
        clips = _windows(protocol, videos, cache, workers, notes)
    else:
        clips = [_one_of(protocol, video) for video in _drawn(protocol, "videos", videos)]
    if not clips:
        raise UserError(
            f"protocol {protocol.name}: not one of {len(videos)} videos can be read and has {protocol.num_frames} "
            "frames; python -m tokenizer.data.manifest check lists the faults"
        )
    if protocol.count is not None and len(clips) < protocol.count:
        notes.append(f"the protocol asks for {protocol.count} clips, there are {len(clips)}")
    clips = [replace(clip, index=i) for i, clip in enumerate(clips)]
    return ClipList(clips, _content_of(clips), num_listed, num_missing, notes)


def _content_of(clips: Sequence[ListedClip]) -> str:
    bar = tqdm(clips, desc="fingerprints of the files", unit="clip", delay=5, disable=None)
    return _sha256([clip.content() for clip in bar])


# Videos of the data sets


def _find_videos(protocol: Protocol, data: str | Path | None) -> tuple[list[_Video], int]:
    """(those that are there in the order of the list, how many are listed)."""
    if data is not None:
        return _given_videos(Path(data))
    if protocol.dataset == "ucf101":
        root = path_in_environment("UCF_ROOT", INSTEAD)
        found = list(find_ucf101(root, protocol.split.split()[0]))
    elif protocol.dataset == "k600":
        root = path_in_environment("K600_ROOT", INSTEAD)
        found = list(find_kinetics(root, path_in_environment("K600_VAL_FILE", INSTEAD)))
    else:
        raise UserError(f"protocol {protocol.name} needs --data: a folder of videos or a manifest .csv")
    videos = [_Video(display_name(path.relative_to(root)), path, label) for _, path, label in found if path]
    return videos, len(found)


def _given_videos(data: Path) -> tuple[list[_Video], int]:
    if data.suffix.lower() == ".csv":
        rows = [(row, row.file(data)) for row in read_rows(data)]
        videos = [_Video(display_name(row.path), file, row.label) for row, file in rows if file.is_file()]
        return videos, len(rows)
    root = data if data.is_dir() else data.parent
    videos = [_Video(display_name(path.relative_to(root)), path, path.parent.name) for path in list_videos(data)]
    return videos, len(videos)


def _each_once(videos: Sequence[_Video], notes: list[str]) -> list[_Video]:
    """Clips are told apart by name, so a video that the list repeats counts once."""
    by_name: dict[str, _Video] = {}
    for video in videos:
        by_name.setdefault(video.name, video)
    if repeated := len(videos) - len(by_name):
        notes.append(f"{repeated} rows of the list repeat a video, which is taken once")
    return list(by_name.values())


# Clips of videos


def _one_of(protocol: Protocol, video: _Video) -> ListedClip:
    """The clip of a video under the rules `first` and `random`."""
    if protocol.clip_rule == "random":
        position = rng_for(protocol.seed, "start of the clip", video.name).random()
        return ListedClip(0, video.name, video.label, None, lambda: _read_at(protocol, video, position), video.content)

    def read() -> DecodedClip:
        with contextlib.closing(decode_clips(video.path, protocol.num_frames, protocol.size, protocol.fps)) as clips:
            return next(clips)

    return ListedClip(0, video.name, video.label, 0, read, video.content)


def _windows(
    protocol: Protocol, videos: Sequence[_Video], cache: Path | None, workers: int, notes: list[str]
) -> list[ListedClip]:
    """Windows that do not overlap, of all videos; `count` of them drawn, in the order of the list."""
    frames = _frame_counts(protocol, videos, cache, workers)
    if unreadable := sum(count == 0 for count in frames):
        notes.append(f"{unreadable} videos cannot be read and have no window")
    if short := sum(0 < count < protocol.num_frames for count in frames):
        notes.append(f"{short} videos have fewer than {protocol.num_frames} frames and no window")
    every = [(v, k) for v, count in enumerate(frames) for k in range(count // protocol.num_frames)]
    drawn = _drawn(protocol, "windows", every)
    return [_window(protocol, videos[v], k * protocol.num_frames) for v, k in drawn]


def _drawn(protocol: Protocol, what: str, every: Sequence[T]) -> Sequence[T]:
    """All, or as many as the protocol counts: drawn, since a list may be sorted by class, and in the list's order."""
    if protocol.count is None or protocol.count >= len(every):
        return every
    drawn = rng_for(protocol.seed, what, len(every)).choice(len(every), protocol.count, replace=False)
    return [every[i] for i in sorted(drawn)]


def _window(protocol: Protocol, video: _Video, start: int) -> ListedClip:
    name = f"{video.name}@{start}"
    return ListedClip(0, name, video.label, start, lambda: _read_at(protocol, video, start=start), video.content)


def _read_at(protocol: Protocol, video: _Video, position: float = 0.0, start: int | None = None) -> DecodedClip:
    return decode_clip_at(video.path, position, protocol.num_frames, protocol.size, protocol.fps, start=start)


def _frame_counts(protocol: Protocol, videos: Sequence[_Video], cache: Path | None, workers: int) -> list[int]:
    """Frames of each video at the protocol's rate, 0 for an unreadable one; counted once and kept in `cache`.

    The key is the content of the files: the same files elsewhere are not counted again, replaced ones are.
    """
    if cache is None:
        return _count_frames(protocol, videos, workers)
    key = _sha256([*(video.content() for video in videos), protocol.fps])
    file = cache / f"frames-{key[:16]}.json"
    cache.mkdir(parents=True, exist_ok=True)
    with lock(file.with_suffix(".lock")):  # one process counts, the others wait for it
        if not file.is_file():
            atomic_write(file, json.dumps(_count_frames(protocol, videos, workers)).encode())
    counts = read_json_value(file, "remove it")
    if not fits(counts, list[int]) or len(counts) != len(videos):
        raise UserError(f"{file}: does not hold the numbers of frames of {len(videos)} videos; remove it")
    return counts


def _count_frames(protocol: Protocol, videos: Sequence[_Video], workers: int) -> list[int]:
    def count(video: _Video) -> int:
        try:
            last = decode_clip_at(video.path, 1 - 1e-9, protocol.num_frames, _PROBE_SIDE, protocol.fps)
        except VideoError:
            return 0
        return last.start + protocol.num_frames - last.num_padded

    return list(
        tqdm(map_ahead(count, videos, workers), desc="counting frames", total=len(videos), unit="video", disable=None)
    )


# The miniature's own clips


def _miniature(protocol: Protocol) -> ClipList:
    config = DataConfig(list(protocol.sources), protocol.num_frames, protocol.size, protocol.fps, augment=False)
    dataset = build_dataset(config, protocol.seed)

    bundled = {f"bundled/{video.path.name}": video.path for split in SPLITS for video in bundled_videos(split)}

    def clip(i: int) -> ListedClip:
        name, label = dataset.names[i], dataset.labels[i] or ""

        def read() -> DecodedClip:
            return DecodedClip(0, to_uint8(dataset.get_this(i).video_CTHW), 0, 0.0)

        return ListedClip(i, name, label, 0, read, lambda: fingerprint(bundled[name]) if name in bundled else "")

    clips = [clip(i) for i in range(len(dataset))][: protocol.count]
    return ClipList(clips, _content_of(clips), len(dataset), 0)
