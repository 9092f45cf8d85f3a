"""Which videos the main job reads, and their clips as one ordered stream that is decoded ahead of its reader."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Full, Queue
from typing import Any

from tqdm import tqdm

from tokenizer.common.clip_shape import Size, sides
from tokenizer.common.errors import UserError
from tokenizer.common.work_units import progress_bar
from tokenizer.data.cutting import StreamEnd
from tokenizer.data.safe_decode import decode_clips, fingerprint_of
from tokenizer.data.video_io import DecodedClip, VideoError, display_name, file_slug, list_videos

Clips = Generator["SourceClip", None, None]

_BYTES_AHEAD = 1 << 27  # of decoded clips that wait, for all readers together
_CLIPS_AHEAD = 2  # and at least so many for each


@dataclass(frozen=True)
class VideoSource:
    """One video file. `file` is for people; `name` is safe in a path and belongs to this file alone."""

    path: Path
    file: str
    name: str

    def fingerprint(self) -> str:
        """Changes if the file is replaced, see `files.fingerprint`. VideoError if the file cannot be read."""
        return fingerprint_of(self.path)


@dataclass(frozen=True)
class SourceClip:
    """One clip of a source; `decoded` is None if the caller has this clip already."""

    source: VideoSource
    start: int
    fingerprint: str
    decoded: DecodedClip | None

    @property
    def name(self) -> str:
        """Safe in a path, and different for every clip of a job."""
        return f"{self.source.name}_{self.start:06d}"


@dataclass(frozen=True)
class Skipped:
    """A source that could not be read, or not to its end."""

    source: VideoSource
    reason: str


@dataclass(frozen=True)
class Rest:
    """The end of a source: frames that are too few for another clip, and unsupported features of the file."""

    source: VideoSource
    num_frames: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClipRule:
    """How clips are cut out of a video; see `video_io.iter_clips`."""

    num_frames: int
    size: Size | None
    fps: float | None = None
    all_clips: bool = False
    backend: str = "pyav"


def find_sources(vid_path: str | Path, is_ours: Callable[[Path], bool]) -> list[VideoSource]:
    """The videos under a folder, or the one file. `is_ours` tells what this job wrote itself; such files are left out.

    Raises UserError for a wrong path and a folder without videos.
    """
    root = Path(vid_path)
    videos = [path for path in list_videos(root) if not is_ours(path)]
    if not videos:
        raise UserError(f"{display_name(root)}: holds only results of this very job; give the folder of the originals")
    sources = []
    for path in videos:
        relative = path.relative_to(root) if path != root else Path(path.name)
        digest = hashlib.sha256(os.fsencode(relative)).hexdigest()[:8]
        name = f"{file_slug(str(relative.with_suffix('')), most=80)}-{digest}"
        sources.append(VideoSource(path, display_name(relative), name))
    return sources


def stream_clips(
    sources: Sequence[VideoSource], rule: ClipRule, num_readers: int, is_done: Callable[[str, str], bool]
) -> Generator[SourceClip | Skipped | Rest, None, None]:
    """The clips of all sources in order; a source that fails gives one `Skipped` in place of the rest of it.

    A source's `Rest`, if there is one, follows its last clip.

    `is_done(name, fingerprint)`: whether the caller has this clip already; a file with one clip is then not decoded.
    num_readers: decoding processes that work ahead of the caller, each on a source of its own; 0 decodes on demand.
    """
    streams = (_clips_of(source, rule, is_done) for source in sources)
    if not num_readers:
        yield from itertools.chain.from_iterable(streams)
        return
    clip_bytes = rule.num_frames * 3 * math.prod(sides(rule.size)) if rule.size else _BYTES_AHEAD
    yield from _read_ahead(streams, num_readers, max(_CLIPS_AHEAD, _BYTES_AHEAD // (num_readers * clip_bytes)))


@dataclass
class ClipWalk:
    """Passes over the clips of a job with a progress bar; files that cannot be read are printed and kept in `skipped`.

    `rests`: frames left over at the ends of the videos if all clips were asked for. `notes`: by file, what of it is
    not handled (tone mapping, pictures that the header promises and the file lacks); each is printed once.
    """

    sources: Sequence[VideoSource]
    rule: ClipRule
    num_readers: int
    max_clips: int | None = None
    skipped: list[Skipped] = field(default_factory=list)
    rests: list[Rest] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def digest(self) -> str:
        """Identifies the clips of this walk without decoding: rule, limit, and each source's name and fingerprint."""
        inputs: list[Any] = [asdict(self.rule), self.max_clips]
        for source in self.sources:
            try:
                inputs.append([source.file, source.fingerprint()])
            except VideoError as error:
                inputs.append([source.file, error.reason])
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def __call__(self, title: str, is_done: Callable[[str, str], bool] = lambda *_: False) -> Clips:
        """The clips in order, at most `max_clips`. With all_clips the bar guesses the total from the videos so far."""
        self.skipped.clear()
        self.rests.clear()
        num_clips, most = 0, self.max_clips or sys.maxsize
        stream = stream_clips(self.sources, self.rule, self.num_readers, is_done)
        bar = progress_bar(desc=title, total=min(len(self.sources), most), unit="clip")
        place = {source.name: i for i, source in enumerate(self.sources, start=1)}
        with bar, contextlib.closing(stream):
            for item in stream:
                if isinstance(item, Skipped):
                    self.skipped.append(item)
                    tqdm.write(f"skipped {item.source.file}: {item.reason}", file=sys.stderr)
                    continue
                if isinstance(item, Rest):
                    self._note(item.source, item.notes)
                    self.rests += [item] if item.num_frames else []
                    continue
                self._note(item.source, item.decoded.notes if item.decoded else ())
                yield item
                num_clips += 1
                if self.rule.all_clips:
                    bar.total = min(most, round(num_clips * len(self.sources) / place[item.source.name]))
                bar.update()
                if num_clips == most:
                    return

    def _note(self, source: VideoSource, notes: Sequence[str]) -> None:
        known = self.notes.setdefault(source.file, []) if notes else []
        for note in notes:
            if note not in known:
                known.append(note)
                tqdm.write(f"note on {source.file}: {note}", file=sys.stderr)


def _clips_of(
    source: VideoSource, rule: ClipRule, is_done: Callable[[str, str], bool]
) -> Iterator[SourceClip | Skipped | Rest]:
    num_clips = 0
    try:
        fingerprint = source.fingerprint()
        first = SourceClip(source, 0, fingerprint, None)
        if not rule.all_clips and is_done(first.name, fingerprint):
            yield first
            return
        decoded = decode_clips(
            source.path, rule.num_frames, rule.size, rule.fps, all_clips=rule.all_clips, backend=rule.backend
        )
        with contextlib.closing(decoded):
            while True:
                try:
                    clip = next(decoded)
                except StopIteration as end:
                    rest: StreamEnd = end.value
                    break
                found = SourceClip(source, clip.start, fingerprint, None)
                yield found if is_done(found.name, fingerprint) else replace(found, decoded=clip)
                num_clips += 1
        if rest.num_left or rest.notes:
            yield Rest(source, *rest)
    except VideoError as error:
        yield Skipped(source, error.reason + (f" (after {num_clips} good clips)" if num_clips else ""))


def _read_ahead(streams: Iterator[Iterator[Any]], num_readers: int, clips_ahead: int) -> Iterator[Any]:
    """One stream after the other, each in order, while a thread for each of the next ones draws from it already.

    The threads only wait: the decoding is done by the processes of `safe_decode`.
    """
    stop = threading.Event()

    def start(stream: Iterator[Any]) -> Queue:
        lane: Queue = Queue(maxsize=clips_ahead)
        threading.Thread(target=_fill, args=(stream, lane, stop), daemon=True).start()
        return lane

    try:
        lanes = deque(start(stream) for stream in itertools.islice(streams, num_readers))
        while lanes:
            lane = lanes.popleft()
            while (item := lane.get()) is not _END:
                if isinstance(item, BaseException):
                    raise item
                yield item
            lanes.extend(start(stream) for stream in itertools.islice(streams, 1))
    finally:
        stop.set()


_END = object()


def _fill(stream: Iterator[Any], lane: Queue, stop: threading.Event) -> None:
    """Put all of `stream` into `lane`, then the exception that ended it if any, then the end mark."""

    def put(item: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(Full):
                return lane.put(item, timeout=0.1)

    try:
        for item in stream:
            put(item)
            if stop.is_set():
                break
    except BaseException as error:  # it belongs to the reader, who raises it
        put(error)
    put(_END)
