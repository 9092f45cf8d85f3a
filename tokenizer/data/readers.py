"""The two decoders behind one interface: PyAV, and decord on request.

A reader gives the pictures of the first video stream in the order of display, each with its time in seconds since the
first. Pixels are uint8 RGB and upright: the display matrix of the container is applied, mirrored ones included. Both
decoders give the same pixels; a file that decord would get wrong is refused.
Unsupported features (tone mapping, a tilted display matrix) are named in `Reader.notes`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, Protocol

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Colorspace, VideoReformatter
from av.video.stream import VideoStream

from tokenizer.common.errors import UserError
from tokenizer.data.display import UPRIGHT, Image, ctts_shifts, display_turn, displayed_size, is_untagged_hd, rate_of
from tokenizer.data.files import Span, VideoError, check_regular, display_name

_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "avi")  # containers whose index lists every picture
# containers that list keyframes at most, and can be searched by time
_KEYED = ("matroska,webm", "mpegts", "mpeg", "flv", "asf")
_HDR = {16: "PQ", 18: "HLG"}  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67
_BACK = (0, 1, 5, 25)  # seconds; how much earlier to seek if the keyframe found is shown after the target
_LARGEST_ASPECT = 8  # of one pixel; beyond that the header is wrong
_DECODER_ERRORS = (av.FFmpegError, OSError, EOFError, ValueError, OverflowError)


def no_beat() -> None:
    """The heartbeat of a decoder that nobody waits for."""


@dataclass(frozen=True)
class Picture:
    """One frame: its time in seconds since the first, and a call that converts it to RGB."""

    time: float
    to_rgb: Callable[[], Image]


class Enough(NamedTuple):
    """How many pictures of the beginning must be known: so many, and those that begin within so many seconds."""

    num_pictures: float
    seconds: float


ALL = Enough(math.inf, math.inf)


class Reader(Protocol):
    """An open video file, good for one pass over its pictures."""

    rate: Fraction  # frames per second
    num_frames: int | None  # what the header claims; None if it claims nothing
    duration: float | None  # in seconds, if the header has it
    notes: dict[str, None]  # unsupported features, "kind: detail" each, in the order found

    def times(self, enough: Enough = ALL) -> np.ndarray:
        """Time of every picture in seconds, float64 [T], ascending, the first one 0; or of enough from the start."""
        ...

    def pictures(self, first: int = 0) -> Iterator[Picture]:
        """The pictures from index `first` on; a later start seeks instead of decoding everything before it."""
        ...

    def pictures_near(self, seconds: float) -> Iterator[Picture] | None:
        """Pictures from the keyframe at or before a time on, for containers that list no pictures; else None."""
        ...

    def close(self) -> None: ...


@contextlib.contextmanager
def open_reader(
    path: str | os.PathLike[str], backend: str, span: Span | None = None, beat: Callable[[], None] = no_beat
) -> Iterator[Reader]:
    """Open a video with `backend` ("pyav" or "decord").

    span: the part of the file that holds the video. beat: called for every packet and picture, as a sign of progress.
    Raises VideoError if the file cannot be read, now or while its pictures are drawn; UserError for a wrong backend.
    """
    if backend not in _READERS:
        raise UserError(f"backend={backend!r} is not a video backend; choose one of {', '.join(_READERS)}")
    file = Path(path)
    check_regular(file)
    with _decoder_errors(file):
        reader = _READERS[backend](file, span, beat)
        try:
            yield reader
        finally:
            reader.close()


@contextlib.contextmanager
def _decoder_errors(path: Path) -> Iterator[None]:
    """Whatever a decoder raises over a damaged file becomes a VideoError. Defects of the program stay what they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, _DECODER_ERRORS) and type(error).__name__ != "DECORDError":
            raise
        text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise VideoError(path, f"cannot be decoded ({text[:160]})") from error


class PyAvReader:
    """FFmpeg through PyAV: streams, and seeks by keyframe."""

    def __init__(self, path: Path, span: Span | None = None, beat: Callable[[], None] = no_beat) -> None:
        self._path, self._span, self._beat = path, span, beat
        self._container, self._stream = self._open()
        self.rate = rate_of(self._stream)
        self.num_frames = self._stream.frames or None
        self.notes: dict[str, None] = {}
        self.tick = self._stream.time_base or Fraction(1, 1000)
        self.duration = self._container.duration / 1e6 if self._container.duration else None  # of all its streams
        self._is_fresh = True  # nothing was read from the container yet
        # Such a file keeps no presentation times, and what FFmpeg makes up for them is out of order.
        self.untimed = self._container.format.name == "avi" and self._stream.codec_context.has_b_frames
        self._pts: np.ndarray | None = None
        self._num_decoded = 0
        aspect = self._stream.sample_aspect_ratio or Fraction(1)
        self._aspect = aspect if 1 / Fraction(_LARGEST_ASPECT) <= aspect <= _LARGEST_ASPECT else Fraction(1)

    def close(self) -> None:
        self._container.close()

    def first_frame(self) -> av.VideoFrame | None:
        """The first picture as FFmpeg decodes it; None if there is none."""
        return next(self._decoded(), None)

    def times(self, enough: Enough = ALL) -> np.ndarray:
        pts = self.display_pts(enough)
        if pts is None:
            with open_reader(self._path, "pyav", self._span, self._beat) as second_pass:
                times = list[float]()
                for picture in second_pass.pictures():
                    times.append(picture.time)
                    if len(times) > enough.num_pictures and picture.time > enough.seconds:
                        return np.array(times)
            self._read_whole()
            return np.array(times)
        return (pts - pts[0]) * self.tick.numerator / self.tick.denominator

    def pictures(self, first: int = 0) -> Iterator[Picture]:
        if first == 0:
            return self._counted(self._as_pictures(self._from_start(), None))
        pts = self.display_pts()
        if pts is not None and first < len(pts):
            found = self._seek(int(pts[first]))
            if found is not None:
                return self._as_pictures(found, int(pts[0]))
            self._reopen()  # the index of the file lies: count from the start instead
        return itertools.islice(self._as_pictures(self._from_start(), None), first, None)

    def pictures_near(self, seconds: float) -> Iterator[Picture] | None:
        start = self._stream.start_time
        if self._container.format.name not in _KEYED or start is None:
            return None
        target = start + round(seconds / self.tick)
        for earlier in _BACK:  # MPEG-TS has no list of keyframes: the first one after the seek may be too late
            self._container.seek(target - round(earlier / self.tick), stream=self._stream, backward=True)
            frames = self._decoded()
            first = next(frames, None)
            if first is not None and first.pts is not None and first.pts <= max(target, start):
                return self._as_pictures(itertools.chain([first], frames), start)
        self._reopen()
        return None

    # Opening, and the pictures that the container lists

    def _open(self) -> tuple[InputContainer, VideoStream]:
        # An absolute path is never taken for a protocol, and the whitelist keeps playlists away from the network.
        name, protocols = str(self._path.absolute()), "file"
        if self._span is not None:
            name = f"subfile,,start,{self._span.offset},end,{self._span.offset + self._span.size},,:{name}"
            protocols = "file,subfile"
        container = av.open(name, options={"protocol_whitelist": protocols})
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            container.close()
            raise VideoError(self._path, "has a codec that is not known" if streams else "has no video stream")
        streams[0].codec_context.thread_count = 1  # clips are short: threads cost more than they give
        return container, streams[0]

    def _reopen(self) -> None:
        self.close()
        self._container, self._stream = self._open()
        self._is_fresh = True

    def display_pts(self, enough: Enough = ALL) -> np.ndarray | None:
        """Sorted time stamps of all shown pictures, int64 [T], in ticks; None if the container lacks some.

        enough: of a file that must be read for them, no more than these. The first call decides.
        """
        if self._pts is None and not self.untimed:
            self._pts = self._index_pts()
            if self._pts is None:
                self._pts = self._packet_pts(enough)
        return self._pts

    def _index_pts(self) -> np.ndarray | None:
        """The same from the index that was read with the header: nothing else of the file is touched.

        The index holds decoding times. They equal the times of display up to a shift if pictures are not reordered, or
        if all are equally far apart; an MP4 file has a table of the differences. None for any other file, and for a
        file shorter than its index.
        """
        entries = self._listed()
        if entries is None or self._stream.start_time is None or not len(entries):
            return None
        timestamp, end, is_discard, _ = entries.T
        size = self._span.size if self._span else self._path.stat().st_size
        if len(entries) != self._stream.frames or is_discard.any() or end.max() > size:
            return None
        step = np.diff(timestamp)
        if (step <= 0).any():
            return None
        if self._stream.codec_context.has_b_frames and len(step) and (step != step[0]).any():
            shift = ctts_shifts(self._path, self._span, self._stream.id)
            if shift is None or len(shift) != len(timestamp):
                return None
            timestamp = np.sort(timestamp + shift)
        start = self._stream.start_time
        if self._container.format.name == "avi":  # its pictures may be stamped a tick later than its header promises
            first = next(self._decoded(), None)
            self._reopen()
            if first is None or first.pts is None:
                return None
            start = first.pts
        return timestamp - timestamp[0] + start

    def _listed(self) -> np.ndarray | None:
        """The container's index, int64 [T, 4]: time stamp, last byte, whether discarded, size. None if it has none."""
        if self._container.format.name not in _INDEXED:
            return None
        rows = [(e.timestamp, e.pos + e.size, e.is_discard, e.size) for e in self._stream.index_entries]
        return np.array(rows, np.int64).reshape(-1, 4)

    def _packet_pts(self, enough: Enough) -> np.ndarray | None:
        """The same from packets, read without decoding: up to enough of them, or all of the file."""
        if not self._is_fresh:
            self._reopen()
        pts, num_packets, is_enough = list[int](), 0, False
        for packet in self._container.demux(self._stream):
            self._beat()
            if packet.size and not is_enough:
                num_packets += 1
                if packet.pts is None:  # a raw stream
                    self._reopen()
                    return None
                if not packet.is_discard:
                    pts.append(packet.pts)
                is_enough = num_packets % 64 == 0 and self._has_enough(pts, packet.dts, enough)
            if is_enough:
                break
        self._reopen()
        if not is_enough:
            self._read_whole()
            self._compare(num_packets, self._expected(with_discarded=True))
        return np.array(sorted(pts), np.int64) if pts and len(set(pts)) == len(pts) else None

    def _has_enough(self, pts: list[int], dts: int | None, enough: Enough) -> bool:
        """Whether pictures that no later packet can precede, those shown before its decoding time, are enough."""
        known = sorted(pts)
        final = 0 if dts is None else bisect_left(known, dts)
        return final > enough.num_pictures and (known[final - 1] - known[0]) * self.tick > enough.seconds

    def _read_whole(self) -> None:
        kind = self._container.format.long_name or self._container.format.name
        self.notes[f"read whole: the pictures of {kind} are not listed, so a clip at a place costs the whole file"] = (
            None
        )

    def _expected(self, with_discarded: bool) -> int:
        """How many pictures the header or the index promises; 0 if neither does."""
        entries = self._listed()
        if entries is not None and len(entries) and len(entries) >= self._stream.frames:
            return int(((entries[:, 3] > 0) & (with_discarded | (entries[:, 2] == 0))).sum())
        return self._stream.frames

    def _compare(self, found: int, expected: int) -> None:
        if found < expected:
            self.notes[f"truncated: the header counts {expected} pictures, the file holds {found}"] = None

    # Decoding

    def _decoded(self) -> Iterator[av.VideoFrame]:
        self._is_fresh = False
        for frame in self._container.decode(self._stream):
            self._beat()
            self._num_decoded += 1
            yield frame

    def _from_start(self) -> Iterator[av.VideoFrame]:
        if not self._is_fresh:
            self._reopen()
        return self._decoded()

    def _counted(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        """Pass on all pictures of the file, then compare their number with the header's."""
        self._num_decoded = 0
        yield from pictures
        self._compare(self._num_decoded, self._expected(with_discarded=False))

    def _seek(self, target: int) -> Iterator[av.VideoFrame] | None:
        """Frames from the one with time stamp `target` on; None if it cannot be found by a seek."""
        # A seek goes by decoding time: the keyframe it finds may be shown after the target. Then go further back.
        for seconds in _BACK:
            self._container.seek(target - round(seconds / self.tick), stream=self._stream, backward=True)
            frames = self._decoded()
            first = next(frames, None)
            if first is None or first.pts is None:
                return None
            if first.pts <= target:
                frames = itertools.chain([first], frames)
                frames = itertools.dropwhile(lambda frame: frame.pts is not None and frame.pts < target, frames)
                found = next(frames, None)
                return itertools.chain([found], frames) if found is not None and found.pts == target else None
        return None

    def _as_pictures(self, frames: Iterator[av.VideoFrame], first_pts: int | None) -> Iterator[Picture]:
        reformatter = VideoReformatter()  # one for all frames keeps the scaler's tables: a third of the cost
        for index, frame in enumerate(frames):
            if first_pts is None:
                first_pts = frame.pts
            if first_pts is None or frame.pts is None or self.untimed:
                time = float(index / self.rate)
            else:
                time = float((frame.pts - first_pts) * self.tick)
            yield Picture(time, functools.partial(self._to_rgb, frame, reformatter))

    def _to_rgb(self, frame: av.VideoFrame, reformatter: VideoReformatter) -> Image:
        if frame.is_corrupt:
            raise VideoError(self._path, f"is damaged (the picture at {float(frame.time or 0):.2f} s is corrupt)")
        if frame.color_trc in _HDR:
            name = _HDR[frame.color_trc]
            self.notes[f"HDR: {name} transfer, shown without tone mapping; colours look flat"] = None
        matrix = Colorspace.ITU709 if is_untagged_hd(frame) else None
        image_HWC = reformatter.reformat(frame, format="rgb24", src_colorspace=matrix, threads=1).to_ndarray()
        height, width = displayed_size(frame.height, frame.width, self._aspect)
        turn = display_turn(frame)
        if turn.is_tilted:
            self.notes["display matrix: tilted or scaled; shown at the nearest quarter turn"] = None
        if turn.transposed:
            image_HWC, height, width = image_HWC.transpose(1, 0, 2), width, height
        image_HWC = image_HWC[:: -1 if turn.flip_rows else 1, :: -1 if turn.flip_columns else 1]
        return Image(np.ascontiguousarray(image_HWC), height, width)


class DecordReader:
    """decord, on request only: its native code can hang on bad files, and it exists for x86_64 Linux alone."""

    def __init__(self, path: Path, span: Span | None = None, beat: Callable[[], None] = no_beat) -> None:
        if importlib.util.find_spec("decord") is None:
            raise UserError("backend='decord' needs the package decord (x86_64 Linux only); install it or use 'pyav'")
        import decord

        # PyAV looks first: it stumbles over most files on which decord would crash, and knows what decord gets wrong.
        with contextlib.closing(PyAvReader(path, span, beat)) as twin:
            self._untimed, self._aspect, self.rate = twin.untimed, twin._aspect, twin.rate
            if (frame := twin.first_frame()) is not None and (wrong := _wrong_in_decord(frame)):
                raise VideoError(path, f"{wrong}, which decord decodes wrongly; use backend='pyav'")
        name = str(path.absolute())
        # decord takes only UTF-8 names, but also the bytes of a file.
        source = name if display_name(name) == name and span is None else io.BytesIO(_bytes_of(path, span))
        self._video = decord.VideoReader(source, ctx=decord.cpu(0), num_threads=1)
        self._beat = beat
        self.num_frames: int | None = len(self._video)
        self.duration: float | None = None
        self.notes: dict[str, None] = {}

    def close(self) -> None:
        del self._video

    def pictures_near(self, seconds: float) -> None:
        return None

    def times(self, enough: Enough = ALL) -> np.ndarray:
        if self._untimed:
            return np.arange(len(self._video)) / float(self.rate)
        start_T = self._video.get_frame_timestamp(range(len(self._video)))[:, 0]
        return (start_T - start_T[0]).astype(np.float64)

    def pictures(self, first: int = 0) -> Iterator[Picture]:
        for index, time in enumerate(self.times().tolist()):
            self._beat()
            if self._untimed:  # skipping frames of such a file, decord now and then gives the wrong picture
                image = self._to_rgb(index)
                if index >= first:
                    yield Picture(time, functools.partial(self._copied, image))
            elif index >= first:
                yield Picture(time, functools.partial(self._to_rgb, index))

    def _to_rgb(self, index: int) -> Image:
        image_HWC = self._video[index].asnumpy()
        height, width = image_HWC.shape[:2]
        return Image(image_HWC, *displayed_size(height, width, self._aspect))

    @staticmethod
    def _copied(image: Image) -> Image:
        return image._replace(rgb_HWC=image.rgb_HWC.copy())


def _wrong_in_decord(frame: av.VideoFrame) -> str | None:
    """What decord would get wrong about a file, by its first frame."""
    if display_turn(frame) != UPRIGHT:
        return "is stored mirrored or rotated"
    if max(component.bits for component in frame.format.components) > 8:
        return "has more than 8 bits a colour"
    return "is HD without a colour matrix" if is_untagged_hd(frame) else None


def _bytes_of(path: Path, span: Span | None) -> bytes:
    with open(path, "rb") as file:
        if span is None:
            return file.read()
        file.seek(span.offset)
        return file.read(span.size)


_READERS: dict[str, Callable[[Path, Span | None, Callable[[], None]], Reader]] = {
    "pyav": PyAvReader,
    "decord": DecordReader,
}
