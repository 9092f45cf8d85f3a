"""The two decoders behind one face: PyAV, and decord for those who ask for it.

A reader gives the pictures of the first real video stream in the order in which they are shown, each with its time in
seconds since the first picture. Pixels are uint8 RGB, upright (a display rotation of the container is applied), and the
same whichever decoder is used. Whatever a damaged file makes a decoder raise comes out as a VideoError.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from tokenizer.common.errors import UserError

DEFAULT_FPS = 25.0  # for the few streams that state no rate at all (raw elementary streams)


class VideoError(UserError):
    """One file that cannot be read. `path` and `reason` say which and why; callers report it and go on."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{display_name(path)}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[VideoError], tuple[Path, str]]:
        return VideoError, (self.path, self.reason)


@dataclass(frozen=True)
class Picture:
    """One frame: its time in seconds since the first, and a call that converts it to uint8 HWC RGB."""

    time: float
    to_rgb: Callable[[], np.ndarray]


class Reader(Protocol):
    """An open video file, good for one pass over its pictures."""

    fps: float
    num_frames: int | None  # what the header claims; None when it claims nothing

    def times(self) -> list[float]:
        """Time of every picture in seconds, ascending, the first one 0."""
        ...

    def pictures(self, first: int = 0) -> Iterator[Picture]:
        """The pictures from index `first` on; a later start seeks instead of decoding everything before it."""
        ...

    def close(self) -> None:
        """Give the file back."""
        ...


def display_name(path: str | os.PathLike[str]) -> str:
    r"""A printable form of any file name: bytes that are not UTF-8 appear as \xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def file_slug(text: str, most: int = 60) -> str:
    """What may stand in any file name: ASCII letters, digits, `_` for all else; at most `most`, never none."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:most] or "video"


@contextlib.contextmanager
def open_reader(path: str | os.PathLike[str], backend: str) -> Iterator[Reader]:
    """Open a video with `backend` ("pyav" or "decord").

    Raises VideoError when the file cannot be read, now or while its pictures are drawn; UserError for a wrong backend.
    """
    if backend not in _READERS:
        raise UserError(f"backend={backend!r} is not a video backend; choose one of {', '.join(_READERS)}")
    file = Path(path)
    if not file.is_file():
        raise VideoError(file, "is not a file" if file.exists() else "does not exist; check the path")
    if file.stat().st_size == 0:
        raise VideoError(file, "is empty (zero bytes)")
    with _decoder_errors(file):
        reader = _READERS[backend](file)
        try:
            yield reader
        finally:
            reader.close()


@contextlib.contextmanager
def _decoder_errors(path: Path) -> Iterator[None]:
    """Damaged files make the decoders raise anything, from EOFError to AttributeError: one thing to the caller."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise VideoError(path, f"cannot be decoded ({text[:160]})") from error


class PyAvReader:
    """FFmpeg through PyAV: streams, and seeks by keyframe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._container, self._stream = self._open()
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.fps = float(rate) if rate else DEFAULT_FPS
        self.num_frames = self._stream.frames or None
        self._tick = self._stream.time_base or Fraction(1, 1000)
        # Such a file keeps no presentation times, and what FFmpeg makes up for them is out of order.
        self.untimed = self._container.format.name == "avi" and self._stream.codec_context.has_b_frames
        self._pts: list[int] | None = None

    def close(self) -> None:
        self._container.close()

    def is_rotated(self) -> bool:
        """Whether the first picture is stored on its side or upside down."""
        frame = next(self._container.decode(self._stream), None)
        return frame is not None and frame.rotation % 360 != 0

    def times(self) -> list[float]:
        self._pts = self._packet_pts()
        if self._pts is None:
            with open_reader(self._path, "pyav") as second_pass:
                return [picture.time for picture in second_pass.pictures()]
        return [float((pts - self._pts[0]) * self._tick) for pts in self._pts]

    def pictures(self, first: int = 0) -> Iterator[Picture]:
        if first == 0:
            return self._as_pictures(self._container.decode(self._stream), None)
        self._pts = self._pts or self._packet_pts()
        if self._pts is not None and first < len(self._pts):
            target = self._pts[first]
            self._container.seek(target, stream=self._stream, backward=True)
            frames = self._container.decode(self._stream)
            frames = itertools.dropwhile(lambda frame: frame.pts is not None and frame.pts < target, frames)
            found = next(frames, None)
            if found is not None and found.pts == target:
                return self._as_pictures(itertools.chain([found], frames), self._pts[0])
            self.close()  # the index of the file lies: count from the start instead
            self._container, self._stream = self._open()
        return itertools.islice(self._as_pictures(self._container.decode(self._stream), None), first, None)

    def _open(self) -> tuple[InputContainer, VideoStream]:
        # An absolute path is never taken for a protocol, and the whitelist keeps playlists away from the network.
        container = av.open(str(self._path.absolute()), options={"protocol_whitelist": "file"})
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            container.close()
            raise VideoError(self._path, "has no video stream")
        streams[0].codec_context.thread_count = 1  # clips are short: threads cost more than they give
        return container, streams[0]

    def _packet_pts(self) -> list[int] | None:
        """Sorted time stamps of all shown pictures, read without decoding; None when the container lacks some."""
        if self.untimed:
            return None
        container, stream = self._open()
        with container:
            pts = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
        known = sorted({p for p in pts if p is not None})
        return known if known and len(known) == len(pts) else None

    def _as_pictures(self, frames: Iterator[av.VideoFrame], first_pts: int | None) -> Iterator[Picture]:
        reformatter = VideoReformatter()  # one for all frames keeps the scaler's tables: a third of the cost
        for index, frame in enumerate(frames):
            if first_pts is None:
                first_pts = frame.pts
            if first_pts is None or frame.pts is None or self.untimed:
                time = index / self.fps
            else:
                time = float((frame.pts - first_pts) * self._tick)
            yield Picture(time, functools.partial(self._to_rgb, frame, reformatter))

    def _to_rgb(self, frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
        if frame.is_corrupt:
            raise VideoError(self._path, f"is damaged (the picture at {float(frame.time or 0):.2f} s is corrupt)")
        image_HWC = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        quarter_turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(image_HWC, quarter_turns)) if quarter_turns else image_HWC


class DecordReader:
    """decord, on request only: its native code can hang on bad files, and it exists for x86_64 Linux alone."""

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("decord") is None:
            raise UserError("backend='decord' needs the package decord (x86_64 Linux only); install it or use 'pyav'")
        import decord

        # PyAV looks first: it stumbles over most files on which decord would crash, and knows what decord gets wrong.
        with contextlib.closing(PyAvReader(path)) as twin:
            self._untimed = twin.untimed
            if twin.is_rotated():
                raise VideoError(path, "is stored rotated, which decord decodes wrongly; use backend='pyav'")
        name = str(path.absolute())
        # decord takes only UTF-8 names, but also the bytes of a file.
        source = name if display_name(name) == name else io.BytesIO(path.read_bytes())
        self._video = decord.VideoReader(source, ctx=decord.cpu(0), num_threads=1)
        self.fps = float(self._video.get_avg_fps()) or DEFAULT_FPS
        self.num_frames: int | None = len(self._video)

    def close(self) -> None:
        del self._video

    def times(self) -> list[float]:
        if self._untimed:
            return [index / self.fps for index in range(len(self._video))]
        start_T = self._video.get_frame_timestamp(range(len(self._video)))[:, 0]
        return [float(time - start_T[0]) for time in start_T]

    def pictures(self, first: int = 0) -> Iterator[Picture]:
        for index, time in enumerate(self.times()):
            if self._untimed:  # skipping frames of such a file, decord now and then gives the wrong picture
                image = self._to_rgb(index)
                if index >= first:
                    yield Picture(time, functools.partial(np.copy, image))
            elif index >= first:
                yield Picture(time, functools.partial(self._to_rgb, index))

    def _to_rgb(self, index: int) -> np.ndarray:
        return self._video[index].asnumpy()


_READERS: dict[str, Callable[[Path], Reader]] = {"pyav": PyAvReader, "decord": DecordReader}
