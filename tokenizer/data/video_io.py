"""Video files in and out, and the only conversion between uint8 files and the range of the models.

On disk and while decoding a clip is `frames_THWC`, uint8 RGB; inside models it is `video_CTHW`, float32 in [0, 1].
Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import cast

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.stream import Disposition
from av.video.stream import VideoStream
from torch.nn import functional as F

from tokenizer.common.clip_shape import Size, sides
from tokenizer.common.errors import UserError
from tokenizer.data.cutting import ClipEvents, Event, Place, Shown, StreamEnd, clip_at_events, clip_events, video_events
from tokenizer.data.display import Image
from tokenizer.data.files import VIDEO_SUFFIXES, Span, VideoError, display_name, file_slug, list_videos
from tokenizer.data.readers import open_reader

__all__ = [
    "VIDEO_SUFFIXES", "DecodedClip", "VideoError", "VideoInfo", "VideoWriter", "display_name", "file_slug",
    "iter_clips", "iter_video", "list_videos", "probe", "read_clip", "read_clip_at", "to_model_range", "to_uint8",
    "write_video",
]  # fmt: skip

_LARGEST_TERM = 1_000_000  # of a frame rate as a fraction
_CLOCK = Fraction(1, 90_000)  # a multiple of all usual frame rates


def resize(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bilinear scaling, uint8 to uint8; frames that already have the size are handed back as they are.

    torch's uint8 kernel is used: it gives the pixels of torchvision's `Resize`, at a quarter of the cost in float.
    """
    if frames_THWC.shape[1:3] == (height, width):
        return frames_THWC
    video_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)  # [T, C, H, W], channels last in memory
    video_TCHW = F.interpolate(video_TCHW, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(video_TCHW.permute(0, 2, 3, 1).numpy())  # [T, height, width, C]


def resize_center_crop(frames_THWC: np.ndarray, size: Size, shown: tuple[int, int] | None = None) -> np.ndarray:
    """Scale, keeping the aspect ratio, to the smallest picture that covers `size`; then crop the middle.

    [T, H, W, C] -> [T, height, width, C]. A square thus is the short side scaled to `size`, and the middle of the long
    one. shown: height and width on display if the stored pixels are not square.
    """
    (rows, columns), (height, width) = sides(size), frames_THWC.shape[1:3]
    if shown is not None and shown != (height, width):
        return _displayed_crop(frames_THWC, (rows, columns), shown)
    if rows * width >= columns * height:  # too wide, or of the wanted shape
        frames_THWC = resize(frames_THWC, rows, rows * width // height)
    else:
        frames_THWC = resize(frames_THWC, columns * height // width, columns)
    top = round((frames_THWC.shape[1] - rows) / 2)
    left = round((frames_THWC.shape[2] - columns) / 2)
    return np.ascontiguousarray(frames_THWC[:, top : top + rows, left : left + columns])


def _displayed_crop(frames_THWC: np.ndarray, size: tuple[int, int], shown: tuple[int, int]) -> np.ndarray:
    """The same from the part on display, cut out first: scaled to a whole width, a picture would be stretched.

    On each axis the part is rounded to whole stored pixels around the middle, which moves by nothing.
    """
    scale = min(Fraction(on_display, wanted) for on_display, wanted in zip(shown, size, strict=True))
    height, width = frames_THWC.shape[1:3]
    margins = (
        math.ceil(stored * (1 - scale * wanted / on_display) / 2 - Fraction(1, 2))  # halves rounded down
        for stored, on_display, wanted in zip((height, width), shown, size, strict=True)
    )
    top, left = (min(m, (side - 1) // 2) for m, side in zip(margins, (height, width), strict=True))
    return resize(np.ascontiguousarray(frames_THWC[:, top : height - top, left : width - left]), *size)


def random_resized_crop(
    frames_THWC: np.ndarray, size: Size, scale: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """A random crop, the same in all frames, of the shape of `size`, scaled to it.

    scale: the range of the crop's sides as a part of those of the largest crop of this shape.
    """
    (height, width), wanted = frames_THWC.shape[1:3], sides(size)
    part = generator.uniform(*scale)
    rows = max(1, round(min(height, width * wanted[0] / wanted[1]) * part))
    columns = max(1, round(min(width, height * wanted[1] / wanted[0]) * part))
    top = int(generator.integers(height - rows + 1))
    left = int(generator.integers(width - columns + 1))
    crop_THWC = np.ascontiguousarray(frames_THWC[:, top : top + rows, left : left + columns])
    return resize(crop_THWC, *wanted)


def with_even_sides(frames_THWC: np.ndarray) -> np.ndarray:
    """Pictures as yuv420p wants them: an odd side is made even by repeating the last row or column."""
    odd_H, odd_W = (side % 2 for side in frames_THWC.shape[1:3])
    return np.pad(frames_THWC, ((0, 0), (0, odd_H), (0, odd_W), (0, 0)), mode="edge")


def horizontal_flip(frames_THWC: np.ndarray) -> np.ndarray:
    """Left and right exchanged in every frame."""
    return np.ascontiguousarray(frames_THWC[:, :, ::-1])


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a file: frames (None if the header has no count), frames per second, displayed height and width."""

    num_frames: int | None
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class DecodedClip:
    """Consecutive frames: `start` counts the file's frames at `fps`; the last `num_padded` repeat the last real one.

    notes: unsupported features of the file, "kind: detail" each.
    seconds: of each real frame since the file's first one; from `iter_video` only.
    """

    start: int
    frames_THWC: np.ndarray
    num_padded: int
    fps: float
    notes: tuple[str, ...] = ()
    seconds: tuple[float, ...] = ()


def to_model_range(frames_THWC: np.ndarray) -> torch.Tensor:
    """uint8 [T, H, W, C] -> float32 [C, T, H, W] in [0, 1]."""
    video_THWC = torch.from_numpy(np.ascontiguousarray(frames_THWC))
    return video_THWC.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def to_uint8(video_CTHW: torch.Tensor) -> np.ndarray:
    """float [C, T, H, W] -> uint8 [T, H, W, C]: clamped to [0, 1] and rounded, so uint8 -> model -> uint8 is exact."""
    video_THWC = video_CTHW.detach().float().clamp(0, 1).mul(255).round().permute(1, 2, 3, 0)
    return video_THWC.to("cpu", torch.uint8).contiguous().numpy()


def probe(path: str | os.PathLike[str], backend: str = "pyav") -> VideoInfo:
    """Open the file and decode its first picture. Raises VideoError if that fails."""
    with open_reader(path, backend) as reader:
        picture = next(reader.pictures(), None)
        if picture is None:
            raise VideoError(path, "holds no picture")
        image = picture.to_rgb()
        return VideoInfo(reader.num_frames, float(reader.rate), image.height, image.width)


def iter_clips(
    path: str | os.PathLike[str],
    num_frames: int = 16,
    size: Size | None = 128,
    fps: float | None = None,
    all_clips: bool = False,
    backend: str = "pyav",
    span: Span | None = None,
) -> Generator[DecodedClip, None, StreamEnd]:
    """Stream the clips of `num_frames` consecutive frames, all of them or the first; memory does not grow with length.

    fps: None keeps the file's own frames; a number shows the file at that rate (frames are dropped or repeated).
    size: see `resize_center_crop`, in square pixels; None keeps the displayed size.
    A rest shorter than a clip is dropped, unless it is all there is: then its last frame is repeated (`num_padded`).
    Returns how many frames that rest had, and the unsupported features of the file.
    Raises VideoError if the file cannot be read, also in the middle, after the clips before the damage.
    """
    return assemble(path, clip_events(path, num_frames, fps, all_clips, backend, span), num_frames, size)


def iter_video(
    path: str | os.PathLike[str],
    num_frames: int = 16,
    size: Size | None = 128,
    fps: float | None = None,
    backend: str = "pyav",
    skip: int = 0,
) -> Generator[DecodedClip, None, StreamEnd]:
    """Every frame of a video from clip `skip` on, with its time; memory does not grow with length.

    Unlike `iter_clips` it pads the last clip instead of dropping a short rest. Raises VideoError as `iter_clips` does.
    """
    return assemble(path, video_events(path, num_frames, fps, backend, skip), num_frames, size)


def read_clip(
    path: str | os.PathLike[str],
    start: int,
    num_frames: int = 16,
    size: Size | None = None,
    fps: float | None = None,
    backend: str = "pyav",
) -> DecodedClip:
    """The clip that begins at frame `start` of the file (counted at `fps`), by keyframe seek.

    Frames past the end repeat the last one. VideoError if `start` itself is past the end or the file is unreadable.
    """
    return next(assemble(path, clip_at_events(path, Place(start), num_frames, fps, backend), num_frames, size))


def read_clip_at(
    path: str | os.PathLike[str],
    position: float,
    num_frames: int = 16,
    size: Size | None = None,
    fps: float | None = None,
    backend: str = "pyav",
    any_phase: bool = False,
    span: Span | None = None,
) -> DecodedClip:
    """The clip at `position` in [0, 1) of all possible starts; with a uniform draw every start is equally likely.

    any_phase: at a given `fps`, begin at any time, not only at multiples of 1 / fps: so all frames of the file count.
    """
    place = Place(None, position, any_phase)
    return next(assemble(path, clip_at_events(path, place, num_frames, fps, backend, span), num_frames, size))


def assemble(
    path: str | os.PathLike[str], events: ClipEvents, num_frames: int, size: Size | None
) -> Generator[DecodedClip, None, StreamEnd]:
    """Clips of uint8 frames from the events of `cutting.py`, scaled and cropped; passes the end on."""
    frames: list[np.ndarray] = []
    with contextlib.closing(events):
        while True:
            try:
                event: Event = next(events)
            except StopIteration as end:
                return end.value
            if isinstance(event, Shown):
                frames += [_convert(event.image, size)] * event.times
                continue
            if not frames:
                raise VideoError(path, "holds no picture")
            num_padded = num_frames - len(frames)
            if len({frame.shape for frame in frames}) > 1:
                raise VideoError(path, "changes its picture size in the middle of a clip; give a size to scale to")
            frames_THWC = np.stack(frames + frames[-1:] * num_padded)
            yield DecodedClip(event.start, frames_THWC, num_padded, event.fps, event.notes, event.seconds)
            frames = []


def _convert(image: Image, size: Size | None) -> np.ndarray:
    """[H, W, C] as stored -> pixels of `size`, or the displayed size."""
    frame_1HWC, shown = image.rgb_HWC[None], (image.height, image.width)
    return (resize(frame_1HWC, *shown) if size is None else resize_center_crop(frame_1HWC, size, shown))[0]


def exact_rate(fps: float) -> Fraction:
    """The frame rate as the fraction it was before it became a float, such as 30000/1001 or 9000000/299971."""
    return Fraction(fps).limit_denominator(_LARGEST_TERM)


def write_video(
    path: str | os.PathLike[str], frames_THWC: np.ndarray, fps: float, lossless: bool = False, preset: str = "fast"
) -> None:
    """Write uint8 [T, H, W, 3] as H.264; the file appears complete or not at all.

    lossless=False: yuv420p, plays everywhere, see `with_even_sides`.
    lossless=True: RGB with quantiser 0, comes back bit for bit; for anything that is measured.
    Raises OSError if the disk is full.
    """
    target = Path(path).absolute()  # a relative a:b.mp4 would be taken for a protocol
    frames_THWC = frames_THWC if lossless else with_even_sides(frames_THWC)
    codec, pixels = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv420p")
    options = {"qp": "0"} if lossless else {"crf": "18"}
    # Without the parameter equal frames now and then give other bytes: x264's fast rate control is not exact.
    options |= {"preset": preset, "x264-params": "cpu-independent=1"}
    aside = target.with_name(f".writing-{uuid.uuid4().hex}{target.suffix}")
    try:
        with av.open(aside, "w") as container:
            rate = exact_rate(fps)
            stream = cast(VideoStream, container.add_stream(codec, rate=rate, options=options))
            stream.height, stream.width = frames_THWC.shape[1:3]
            stream.pix_fmt = pixels
            stream.codec_context.thread_count = 1  # callers run several writers at once
            for frame_HWC in frames_THWC:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


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
        self._path = Path(path).absolute()  # a relative a:b.mp4 would be taken for a protocol
        self._path.parent.mkdir(parents=True, exist_ok=True)
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
        frames_THWC = frames_THWC if self._crf is None else with_even_sides(frames_THWC)
        stream = self._stream or self._begin(*frames_THWC.shape[1:3])
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
        stream.height, stream.width = height, width
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
