"""Video files in and out, and the only door between uint8 files and the range of the models.

On disk and while decoding a clip is `frames_THWC`, uint8 RGB; inside models it is `video_CTHW`, float32 in [0, 1].
Letters: T frames, H W rows and columns, C colours.

What happens to the pictures of a clip between the decoder and the model. Frames are uint8 THWC throughout.

Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.video.stream import VideoStream
from torch.nn import functional as F

from tokenizer.common.device import derive_seed
from tokenizer.common.errors import UserError
from tokenizer.data.readers import Picture, Reader, VideoError, display_name, file_slug, open_reader


def rng_for(seed: int, *keys: int | str) -> np.random.Generator:
    """A numpy generator that depends on the arguments and on nothing else, the same in every process and machine."""
    return np.random.default_rng(derive_seed(seed, *keys))


def resize(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bilinear scaling, uint8 to uint8; frames that already have the size are handed back as they are.

    torch's uint8 kernel is used: it gives the pixels of torchvision's `Resize`, at a quarter of the cost in float.
    """
    if frames_THWC.shape[1:3] == (height, width):
        return frames_THWC
    video_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)  # [T, C, H, W], channels last in memory
    video_TCHW = F.interpolate(video_TCHW, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(video_TCHW.permute(0, 2, 3, 1).numpy())  # [T, height, width, C]


def resize_center_crop(frames_THWC: np.ndarray, size: int) -> np.ndarray:
    """Short side to `size`, then the square in the middle: [T, H, W, C] -> [T, size, size, C]."""
    height, width = frames_THWC.shape[1:3]
    short = min(height, width)
    frames_THWC = resize(frames_THWC, size * height // short, size * width // short)
    top = round((frames_THWC.shape[1] - size) / 2)
    left = round((frames_THWC.shape[2] - size) / 2)
    return np.ascontiguousarray(frames_THWC[:, top : top + size, left : left + size])


def random_resized_crop(
    frames_THWC: np.ndarray, size: int, scale: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """A random square, the same in all frames, whose side is `scale` times the short side, scaled to `size`."""
    height, width = frames_THWC.shape[1:3]
    side = max(1, round(min(height, width) * generator.uniform(*scale)))
    top = int(generator.integers(height - side + 1))
    left = int(generator.integers(width - side + 1))
    crop_THWC = np.ascontiguousarray(frames_THWC[:, top : top + side, left : left + side])
    return resize(crop_THWC, size, size)


def horizontal_flip(frames_THWC: np.ndarray) -> np.ndarray:
    """Left and right exchanged in every frame."""
    return np.ascontiguousarray(frames_THWC[:, :, ::-1])


__all__ = [
    "DecodedClip", "VideoError", "VideoInfo", "display_name", "file_slug", "iter_clips", "list_videos",
    "probe", "read_clip", "read_clip_at", "to_model_range", "to_uint8", "write_video",
]  # fmt: skip

VIDEO_SUFFIXES = (
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov",
    ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogg", ".ogm", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m",
)  # fmt: skip
_TIME_SLACK = 1e-3  # seconds; containers round time stamps to a millisecond


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a file: frames (None when the header does not say), frames per second, upright height and width."""

    num_frames: int | None
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class DecodedClip:
    """Consecutive frames: `start` counts the file's frames at `fps`; the last `num_padded` repeat the last real one."""

    start: int
    frames_THWC: np.ndarray
    num_padded: int
    fps: float


def to_model_range(frames_THWC: np.ndarray) -> torch.Tensor:
    """uint8 [T, H, W, C] -> float32 [C, T, H, W] in [0, 1]."""
    video_THWC = torch.from_numpy(np.ascontiguousarray(frames_THWC))
    return video_THWC.permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def to_uint8(video_CTHW: torch.Tensor) -> np.ndarray:
    """float [C, T, H, W] -> uint8 [T, H, W, C]: clamped to [0, 1] and rounded, so uint8 -> model -> uint8 is exact."""
    video_THWC = video_CTHW.detach().float().clamp(0, 1).mul(255).round().permute(1, 2, 3, 0)
    return video_THWC.to("cpu", torch.uint8).contiguous().numpy()


def probe(path: str | os.PathLike[str], backend: str = "pyav") -> VideoInfo:
    """Open the file and decode its first picture. Raises VideoError when that fails."""
    with open_reader(path, backend) as reader:
        picture = next(reader.pictures(), None)
        if picture is None:
            raise VideoError(path, "holds no picture")
        height, width = picture.to_rgb().shape[:2]
        return VideoInfo(reader.num_frames, reader.fps, height, width)


def iter_clips(
    path: str | os.PathLike[str],
    num_frames: int = 16,
    size: int | None = 128,
    fps: float | None = None,
    all_clips: bool = False,
    backend: str = "pyav",
) -> Generator[DecodedClip, None, int]:
    """Stream the clips of `num_frames` consecutive frames, all of them or the first; memory does not grow with length.

    fps: None keeps the file's own frames; a number shows the file at that rate (frames are dropped or repeated).
    size: short side and centre crop; None keeps the pixels as they are.
    A rest shorter than a clip is dropped, unless it is all there is: then its last frame is repeated (`num_padded`).
    With all clips the generator returns how many frames that rest had.
    Raises VideoError when the file cannot be read, also in the middle: the clips before the damage came out already.
    """
    with open_reader(path, backend) as reader:
        pictures = _at_rate(reader.pictures(), reader.fps, fps)
        for start, frames in _chunks(pictures, num_frames, size):
            if len(frames) < num_frames and start:
                return len(frames)
            yield _clip(path, start, frames, num_frames, fps or reader.fps)
            if not all_clips:
                break
    return 0


def read_clip(
    path: str | os.PathLike[str],
    start: int,
    num_frames: int = 16,
    size: int | None = None,
    fps: float | None = None,
    backend: str = "pyav",
) -> DecodedClip:
    """The clip that begins at frame `start` of the file (counted at `fps`), by keyframe seek.

    Frames past the end repeat the last one. VideoError when `start` itself is past the end or the file is unreadable.
    """
    return _read(path, lambda num_available: start, num_frames, size, fps, backend)


def read_clip_at(
    path: str | os.PathLike[str],
    position: float,
    num_frames: int = 16,
    size: int | None = None,
    fps: float | None = None,
    backend: str = "pyav",
) -> DecodedClip:
    """The clip at `position` in [0, 1) of all possible starts; with a uniform draw every start is equally likely."""
    return _read(path, lambda n: int(position * max(1, n - num_frames + 1)), num_frames, size, fps, backend)


def _read(
    path: str | os.PathLike[str],
    choose_start: Callable[[int], int],
    num_frames: int,
    size: int | None,
    fps: float | None,
    backend: str,
) -> DecodedClip:
    with open_reader(path, backend) as reader:
        shown = _shown_at(reader.times(), reader.fps, fps)
        start = choose_start(len(shown))
        if not 0 <= start < len(shown):
            raise VideoError(path, f"has {len(shown)} frames, so none can start at frame {start}")
        wanted = shown[start : start + num_frames]
        frames = _pick(reader, wanted, size)
        return _clip(path, start, frames, num_frames, fps or reader.fps)


def _pick(reader: Reader, wanted: list[int], size: int | None) -> list[np.ndarray]:
    """The frames with the ascending indices `wanted` (an index may occur again and again)."""
    frames: list[np.ndarray] = []
    for index, picture in enumerate(reader.pictures(wanted[0]), start=wanted[0]):
        count = wanted.count(index)
        if count:
            frames += [_convert(picture, size)] * count
        if len(frames) == len(wanted):
            break
    return frames


def _shown_at(times: list[float], own_fps: float, fps: float | None) -> list[int]:
    """Index of the picture on show at every moment k / fps, from the first picture to the end of the last."""
    if fps is None:
        return list(range(len(times)))
    end = times[-1] + 1 / own_fps
    num_shown = max(1, math.ceil((end - _TIME_SLACK) * fps))
    return [bisect.bisect_right(times, k / fps + _TIME_SLACK) - 1 for k in range(num_shown)]


def _at_rate(pictures: Iterator[Picture], own_fps: float, fps: float | None) -> Iterator[Picture]:
    """The streaming twin of `_shown_at`: each picture as often as the rate shows it."""
    if fps is None:
        yield from pictures
        return
    num_shown = 0
    current = next(pictures, None)
    while current is not None:
        following = next(pictures, None)
        end = following.time if following else max(current.time + 1 / own_fps, 2 * _TIME_SLACK)
        while num_shown / fps < end - _TIME_SLACK:
            yield current
            num_shown += 1
        current = following


def _chunks(pictures: Iterator[Picture], num_frames: int, size: int | None) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(first index, converted frames) of every full group, and of the rest if there is one."""
    start, frames = 0, []
    for picture in pictures:
        frames.append(_convert(picture, size))
        if len(frames) == num_frames:
            yield start, frames
            start, frames = start + num_frames, []
    if frames or not start:
        yield start, frames


def _convert(picture: Picture, size: int | None) -> np.ndarray:
    image_HWC = picture.to_rgb()
    return image_HWC if size is None else resize_center_crop(image_HWC[None], size)[0]


def _clip(
    path: str | os.PathLike[str], start: int, frames: list[np.ndarray], num_frames: int, fps: float
) -> DecodedClip:
    if not frames:
        raise VideoError(path, "holds no picture")
    num_padded = num_frames - len(frames)
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError(path, "changes its picture size in the middle of a clip; give a size to scale to")
    return DecodedClip(start, np.stack(frames + frames[-1:] * num_padded), num_padded, fps)


def write_video(path: str | os.PathLike[str], frames_THWC: np.ndarray, fps: float, lossless: bool = False) -> None:
    """Write uint8 [T, H, W, 3] as H.264; the file appears complete or not at all.

    lossless=False: yuv420p, plays everywhere; an odd side is made even by repeating the last row or column.
    lossless=True: RGB with quantiser 0, comes back bit for bit; for anything that is measured.
    Raises OSError when the disk does not take it.
    """
    target = Path(path)
    if not lossless:
        odd_H, odd_W = (side % 2 for side in frames_THWC.shape[1:3])
        frames_THWC = np.pad(frames_THWC, ((0, 0), (0, odd_H), (0, odd_W), (0, 0)), mode="edge")
    codec, pixels = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv420p")
    options = {"qp": "0", "preset": "fast"} if lossless else {"crf": "18", "preset": "fast"}
    handle, aside = tempfile.mkstemp(suffix=target.suffix, prefix=".writing-", dir=target.parent)
    os.close(handle)
    try:
        with av.open(aside, "w") as container:
            rate = Fraction(fps).limit_denominator(1001)
            stream = cast(VideoStream, container.add_stream(codec, rate=rate, options=options))
            stream.height, stream.width = frames_THWC.shape[1:3]
            stream.pix_fmt = pixels
            for frame_HWC in frames_THWC:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        os.chmod(aside, 0o644)
        os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


def list_videos(path: str | os.PathLike[str]) -> list[Path]:
    """All video files under a folder (recursive, sorted by name), or the one file given. Names may hold any bytes.

    Linked folders are searched too, each once. Raises UserError when the path does not exist or holds no video.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{display_name(root)}: no such file or folder; give a video file or a folder of videos")
    videos = sorted((p for p in _files_below(root) if p.suffix.lower() in VIDEO_SUFFIXES), key=os.fsencode)
    if not videos:
        suffixes = " ".join(VIDEO_SUFFIXES)
        raise UserError(f"{display_name(root)}: no video under this folder (looked for {suffixes})")
    return videos


def _files_below(root: Path) -> Iterator[Path]:
    """Files of a folder and of those below it, linked ones too; a link that leads back is not followed again."""
    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in names)
