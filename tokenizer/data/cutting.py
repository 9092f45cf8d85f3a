"""Which pictures of a video make a clip: consecutive clips as a stream, or one clip by seeking.

Both give events: `Shown` for each picture of a clip, then `ClipFacts` once the clip is complete. The events of
`clip_events` and `clip_at_events` become clips in `video_io.py`, in this process or across a pipe (`safe_decode.py`).
Letters: T pictures.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import numpy as np

from tokenizer.data.display import Image
from tokenizer.data.files import Span, VideoError
from tokenizer.data.readers import Enough, Picture, PyAvReader, Reader, no_beat, open_reader

_TIME_SLACK = 1e-3  # seconds; containers round time stamps to a millisecond
_LAST_PICTURE = 1.0  # seconds; the last picture of a file stays on show


class Shown(NamedTuple):
    """One picture of a clip, and how many frames of the clip in a row show it."""

    image: Image
    times: int


class ClipFacts(NamedTuple):
    """The end of a clip whose pictures came before. start: counted in frames at `fps`. notes: unsupported features.

    seconds: of each frame since the file's first picture; from `video_events` only.
    """

    start: int
    fps: float
    notes: tuple[str, ...]
    seconds: tuple[float, ...] = ()


class StreamEnd(NamedTuple):
    """The end of a file. num_left: frames that were too few for another clip. notes: unsupported features."""

    num_left: int
    notes: tuple[str, ...]


Event = Shown | ClipFacts
ClipEvents = Generator[Event, None, StreamEnd]


class Place(NamedTuple):
    """Where a clip begins: at frame `start`, or at `position` in [0, 1) of all possible starts.

    any_phase: for random clips. With a given rate, a clip may begin between the frames of that rate; and in a container
    without a list of its pictures (Matroska) `position` is a part of its duration, so that it need not be read whole.
    """

    start: int | None = None
    position: float = 0.0
    any_phase: bool = False


def clip_events(
    path: str | os.PathLike[str],
    num_frames: int,
    fps: float | None,
    all_clips: bool,
    backend: str,
    span: Span | None = None,
    beat: Callable[[], None] = no_beat,
) -> ClipEvents:
    """Consecutive clips from the start, all of them or the first; see `video_io.iter_clips`."""
    with open_reader(path, backend, span, beat) as reader:
        shown_fps = fps or float(reader.rate)
        start = filled = 0
        for picture, count in _at_rate(reader.pictures(), float(reader.rate), fps):
            while count:
                here = min(count, num_frames - filled)
                yield Shown(picture.to_rgb(), here)
                count -= here
                filled += here
                if filled == num_frames:
                    yield ClipFacts(start, shown_fps, tuple(reader.notes))
                    if not all_clips:
                        return StreamEnd(0, tuple(reader.notes))
                    start, filled = start + num_frames, 0
        if start == 0:  # all there is, shorter than a clip
            if not filled:
                raise VideoError(path, "holds no picture")
            yield ClipFacts(0, shown_fps, tuple(reader.notes))
            filled = 0
        return StreamEnd(filled, tuple(reader.notes))


def video_events(
    path: str | os.PathLike[str],
    num_frames: int,
    fps: float | None,
    backend: str,
    skip: int = 0,
    beat: Callable[[], None] = no_beat,
) -> ClipEvents:
    """Every frame of a file from clip `skip` on, with its time; the last clip may be short."""
    with open_reader(path, backend, beat=beat) as reader:
        start, seconds = 0, list[float]()
        for picture, count in _at_rate(reader.pictures(), float(reader.rate), fps):
            while count:
                here = min(count, num_frames - len(seconds))
                first = start + len(seconds)
                seconds += [k / fps if fps else picture.time for k in range(first, first + here)]
                count -= here
                if start >= skip * num_frames:
                    yield Shown(picture.to_rgb(), here)
                else:
                    beat()
                if len(seconds) == num_frames:
                    if start >= skip * num_frames:
                        yield ClipFacts(start, fps or float(reader.rate), tuple(reader.notes), tuple(seconds))
                    start, seconds = start + num_frames, []
        if not start and not seconds:
            raise VideoError(path, "holds no picture")
        if seconds and start >= skip * num_frames:
            yield ClipFacts(start, fps or float(reader.rate), tuple(reader.notes), tuple(seconds))
        return StreamEnd(0, tuple(reader.notes))


def clip_at_events(
    path: str | os.PathLike[str],
    place: Place,
    num_frames: int,
    fps: float | None,
    backend: str,
    span: Span | None = None,
    beat: Callable[[], None] = no_beat,
) -> ClipEvents:
    """The one clip at `place`, by keyframe seek. VideoError if it would begin past the end."""
    with open_reader(path, backend, span, beat) as reader:
        near = _near(reader, place.position, num_frames, fps) if place.any_phase else None
        if near is not None:
            start, shown = near
            yield from (Shown(picture.to_rgb(), times) for picture, times in shown)
        else:
            start, wanted = _wanted(path, reader, place, num_frames, fps)
            yield from _pick(reader, wanted)
        yield ClipFacts(start, fps or float(reader.rate), tuple(reader.notes))
        return StreamEnd(0, tuple(reader.notes))


class Timing(NamedTuple):
    """The times of all pictures of a file: `pts[t] * tick` seconds since the first. rate, tick: fractions."""

    rate: tuple[int, int]
    tick: tuple[int, int]
    pts: list[int]

    def is_constant(self) -> bool:
        """Whether every picture has the time that the frame rate gives it, up to the rounding of containers."""
        times = np.array(self.pts) * self.tick[0] / self.tick[1]
        grid = np.arange(len(self.pts)) * self.rate[1] / self.rate[0]
        return bool((abs(times - grid) <= _TIME_SLACK).all())


def picture_timing(path: str | os.PathLike[str], beat: Callable[[], None] = no_beat) -> Timing | None:
    """The exact times of a file; None if it keeps none. Reads the index, or all packets; decodes nothing."""
    with open_reader(path, "pyav", beat=beat) as reader:
        assert isinstance(reader, PyAvReader)
        pts = reader.display_pts()
        if pts is None:
            return None
        rate, tick = reader.rate.as_integer_ratio(), reader.tick.as_integer_ratio()
        return Timing(rate, tick, (pts - pts[0]).tolist())


def _near(
    reader: Reader, position: float, num_frames: int, fps: float | None
) -> tuple[int, list[tuple[Picture, int]]] | None:
    """(first frame, pictures with the number of frames that show each) of a clip found by time alone.

    None if the container lists its pictures, or if the clip would not be whole: then they are counted.
    """
    rate = fps or float(reader.rate)
    if reader.duration is None or reader.duration * rate < num_frames:
        return None
    end = reader.duration - _TIME_SLACK
    if fps is None:
        start = int(position * max(1, round(reader.duration * rate) - num_frames + 1))
        moments = [start / rate - 0.5 / rate]  # the first picture from here on, and those that follow it
    else:
        first = position * max(0.0, end - (num_frames - 1) / rate)
        start, moments = int(first * rate), [first + k / rate for k in range(num_frames)]
    pictures = reader.pictures_near(max(0.0, moments[0]))
    if pictures is None:
        return None
    if fps is None:
        following = itertools.dropwhile(lambda picture: picture.time < moments[0], pictures)
        found = [(picture, 1) for picture in itertools.islice(following, num_frames)]
    else:
        found = _on_show_near(pictures, moments)
    return (start, found) if sum(times for _, times in found) == num_frames else None


def _on_show_near(pictures: Iterator[Picture], moments: list[float]) -> list[tuple[Picture, int]]:
    """The picture on show at each moment, with the number of moments; all that there are if the file ends before."""
    found: list[tuple[Picture, int]] = []
    current = next(pictures, None)
    while current is not None and moments:
        following = next(pictures, None)
        until = following.time - _TIME_SLACK if following else current.time + _LAST_PICTURE
        count = sum(moment < until for moment in moments)
        if count:
            found.append((current, count))
            moments = moments[count:]
        current = following
    return found


def _wanted(
    path: str | os.PathLike[str], reader: Reader, place: Place, num_frames: int, fps: float | None
) -> tuple[int, list[int]]:
    """(first frame of the clip, counted at the rate; indices of the pictures that it shows)."""
    start = place.start if place.start is not None or place.any_phase or place.position else 0
    end = math.inf if start is None else start + num_frames
    times, rate = reader.times(Enough(end, 0) if fps is None else Enough(0, end / fps)), float(reader.rate)
    if not len(times):
        raise VideoError(path, "holds no picture")
    if fps is None:
        num_shown = len(times)
    else:
        end = times[-1] + 1 / rate
        num_shown = max(1, math.ceil((end - _TIME_SLACK) * fps))
        if place.any_phase:
            first = place.position * max(0.0, end - _TIME_SLACK - (num_frames - 1) / fps)
            moments = first + np.arange(num_frames) / fps
            return int(first * fps), _on_show(times, moments[moments < max(end - _TIME_SLACK, 2 * _TIME_SLACK)])
    if start is None:
        start = int(place.position * max(1, num_shown - num_frames + 1))
    if not 0 <= start < num_shown:
        raise VideoError(path, f"has {num_shown} frames, so none can start at frame {start}")
    numbers = np.arange(start, min(start + num_frames, num_shown))
    return start, numbers.tolist() if fps is None else _on_show(times, numbers / fps)


def _on_show(times: np.ndarray, moments: np.ndarray) -> list[int]:
    """Index of the picture on show at each moment in seconds; a picture stays until the next one."""
    return np.maximum(np.searchsorted(times, moments + _TIME_SLACK, side="right") - 1, 0).tolist()


def _pick(reader: Reader, wanted: list[int]) -> Iterator[Shown]:
    """The pictures with the ascending indices `wanted` (an index may occur again and again)."""
    num_found = 0
    for index, picture in enumerate(reader.pictures(wanted[0]), start=wanted[0]):
        count = wanted.count(index)
        if count:
            yield Shown(picture.to_rgb(), count)
            num_found += count
        if num_found == len(wanted):
            break


def _at_rate(pictures: Iterator[Picture], own_fps: float, fps: float | None) -> Iterator[tuple[Picture, int]]:
    """The streaming twin of `_on_show`: each picture with the number of frames that show it at the rate."""
    if fps is None:
        yield from ((picture, 1) for picture in pictures)
        return
    num_shown = 0
    current = next(pictures, None)
    while current is not None:
        following = next(pictures, None)
        end = following.time if following else max(current.time + 1 / own_fps, 2 * _TIME_SLACK)
        count = max(0, math.ceil((end - _TIME_SLACK) * fps) - num_shown)
        # the bound above can be off by one in the last digit; the rule is num_shown / fps < end - slack
        while count and not (num_shown + count - 1) / fps < end - _TIME_SLACK:
            count -= 1
        while (num_shown + count) / fps < end - _TIME_SLACK:
            count += 1
        if count:
            yield current, count
        num_shown += count
        current = following
