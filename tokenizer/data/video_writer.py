"""Write a video of any length frame by frame at given times, with the sound of another file beside it.

Letters: T frames, H W rows and columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.stream import Disposition
from av.video.stream import VideoStream

from tokenizer.common.errors import UserError
from tokenizer.data.files import VideoError
from tokenizer.data.video_io import exact_rate

_CLOCK = Fraction(1, 90_000)  # a multiple of all usual frame rates


class VideoWriter:
    """H.264 into `path`, which appears complete on leaving the `with` block, or not at all.

    crf: x264's rate factor in yuv420p; None writes RGB without loss, which comes back bit for bit.
    sound: copy the sound tracks of this video, those of `span` seconds after its first picture.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        crf: int | None = 18,
        sound: str | Path | None = None,
        span: tuple[float, float] = (0.0, float("inf")),
    ) -> None:
        self._path = Path(path)
        self._aside = self._path.with_name(f".writing-{os.getpid()}-{self._path.name}")
        self._rate, self._crf = exact_rate(fps), crf
        self._sound = None if sound is None else _Sound(sound, span)
        self._start = span[0]
        self._stream: VideoStream | None = None
        try:
            self._container = av.open(str(self._aside), "w", format=None)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: cannot be written as a video ({error}); end it in .mp4 or .mkv") from error

    def __enter__(self) -> VideoWriter:
        return self

    def add(self, frames_THWC: np.ndarray, seconds: Sequence[float]) -> None:
        """Append uint8 RGB frames; `seconds` of each in the original video, ascending."""
        stream = self._stream or self._begin(*frames_THWC.shape[1:3])
        if self._crf is not None:  # yuv420p has even sides
            odd_H, odd_W = (side % 2 for side in frames_THWC.shape[1:3])
            frames_THWC = np.pad(frames_THWC, ((0, 0), (0, odd_H), (0, odd_W), (0, 0)), mode="edge")
        for frame_HWC, second in zip(frames_THWC, seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame.pts, frame.time_base = round((second - self._start) / _CLOCK), _CLOCK
            self._container.mux(stream.encode(frame))
            if self._sound is not None:
                self._container.mux(list(self._sound.until(second)))

    def _begin(self, height: int, width: int) -> VideoStream:
        codec, pixels = ("libx264rgb", "rgb24") if self._crf is None else ("libx264", "yuv420p")
        options = {"preset": "fast", **({"qp": "0"} if self._crf is None else {"crf": str(self._crf)})}
        stream = cast(VideoStream, self._container.add_stream(codec, rate=self._rate, options=options))
        even = self._crf is not None
        stream.height, stream.width = (side + side % 2 if even else side for side in (height, width))
        stream.pix_fmt = pixels
        stream.codec_context.time_base = _CLOCK
        if self._sound is not None:
            self._sound.add_tracks(self._container, self._path)
        self._stream = stream
        return stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())
                if self._sound is not None:
                    self._container.mux(list(self._sound.until(float("inf"))))
            self._container.close()
            if kind is None:
                os.replace(self._aside, self._path)
        finally:
            self._aside.unlink(missing_ok=True)
            if self._sound is not None:
                self._sound.close()


class _Sound:
    """The packets of a video's sound tracks, copied as they are, a little ahead of the pictures."""

    def __init__(self, path: str | Path, span: tuple[float, float]) -> None:
        self._path, self._span = Path(path), span
        try:
            with av.open(str(self._path.absolute()), options={"protocol_whitelist": "file"}) as twin:
                pictures = [s for s in twin.streams.video if not s.disposition & Disposition.attached_pic]
                first = next(twin.decode(pictures[0]))
                self._zero = float(first.time or 0.0)  # the original's sound may begin before or after its picture
            self._source = av.open(str(self._path.absolute()), options={"protocol_whitelist": "file"})
        except (OSError, IndexError, StopIteration) as error:
            raise VideoError(self._path, f"cannot be opened for its sound ({error})") from error
        self._tracks: dict[int, AudioStream] = {}
        self._packets = self._read()
        self._next: av.Packet | None = None

    def add_tracks(self, container: av.container.OutputContainer, target: Path) -> None:
        """Give `container` one track for each of the source. UserError if its format does not hold such sound."""
        for stream in self._source.streams.audio:
            try:
                self._tracks[stream.index] = container.add_stream_from_template(stream)
            except (ValueError, OSError) as error:
                name = stream.codec_context.name
                raise UserError(f"{target}: this format does not take {name} sound; end the name in .mkv") from error

    def until(self, second: float) -> Iterator[av.Packet]:
        """The packets that begin up to `second`, ready to be written."""
        while (packet := self._next or next(self._packets, None)) is not None:
            self._next = packet
            if self._second(packet) > second:
                return
            self._next = None
            shift, pts = round((self._zero + self._span[0]) / float(packet.time_base)), packet.pts or 0
            packet.dts = (pts if packet.dts is None else packet.dts) - shift
            packet.pts = pts - shift
            packet.stream = self._tracks[packet.stream.index]
            yield packet

    def _read(self) -> Iterator[av.Packet]:
        if not self._source.streams.audio:
            return
        for packet in self._source.demux(self._source.streams.audio):
            known = packet.pts is not None and packet.size
            if known and self._span[0] <= self._second(packet) < self._span[1]:
                yield packet

    def _second(self, packet: av.Packet) -> float:
        return float((packet.pts or 0) * packet.time_base) - self._zero

    def close(self) -> None:
        self._source.close()
