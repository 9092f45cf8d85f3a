"""How a container says that its pictures are displayed: frame rate, pixel aspect, colour matrix, display matrix, times.

FFmpeg applies an MP4 file's table of composition times packet by packet but does not hand it out, so that a file would
have to be read whole for it; here the table itself is read.

Letters: H W rows and columns, C colours, T pictures.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import av
import numpy as np
from av.buffer import Buffer
from av.video.stream import VideoStream

from tokenizer.data.files import Span

DEFAULT_RATE = Fraction(25)  # for the few streams that state no rate at all (raw elementary streams)
_HD_LINES = 720  # untagged video of so many lines is BT.709, as players take it
_UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED


class Image(NamedTuple):
    """Upright uint8 RGB [H, W, C] as stored, and the height and width at which it is displayed (pixel aspect)."""

    rgb_HWC: np.ndarray
    height: int
    width: int


def rate_of(stream: VideoStream) -> Fraction:
    """Frames per second. The average is exact, but some demuxers (raw DV) give the clock's 60000 for it."""
    average, guessed = stream.average_rate, stream.guessed_rate
    if average and guessed and average > 2 * guessed:
        return guessed
    return average or guessed or DEFAULT_RATE


def is_untagged_hd(frame: av.VideoFrame) -> bool:
    """Whether the frame is YUV of HD size without a colour matrix. FFmpeg would take BT.601; players take BT.709."""
    is_yuv = not frame.format.is_rgb and len(frame.format.components) >= 3
    return is_yuv and frame.height >= _HD_LINES and int(frame.colorspace) == _UNTAGGED


def displayed_size(height: int, width: int, aspect: Fraction) -> tuple[int, int]:
    """Height and width in square pixels, for pixels that are `aspect` times as wide as high; never smaller."""
    if aspect > 1:
        return height, round(width * aspect)
    return round(height / aspect), width


class Turn(NamedTuple):
    """A display matrix: transpose first, then reverse rows and columns. is_tilted: that is not all the matrix does."""

    transposed: bool
    flip_rows: bool
    flip_columns: bool
    is_tilted: bool


UPRIGHT = Turn(False, False, False, False)


def display_turn(frame: av.VideoFrame) -> Turn:
    """How a frame must be turned for display, by its display matrix: p' = a p + c q, q' = b p + d q."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return UPRIGHT
    a, b, _, c, d, *_ = (int(x) for x in np.frombuffer(bytes(cast(Buffer, data)), np.int32))
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    down, across, rest = (b, c, (a, d)) if transposed else (d, a, (b, c))
    largest = max(abs(down), abs(across))
    is_tilted = largest == 0 or max(map(abs, rest)) > largest // 100 or abs(abs(down) - abs(across)) > largest // 100
    return Turn(transposed, down < 0, across < 0, is_tilted)


_MOST_BYTES = 64 << 20  # of the header


def ctts_shifts(path: Path, span: Span | None, track: int) -> np.ndarray | None:
    """int64 [T] in ticks, in the order of decoding, of the track with this number; None if there is no such table."""
    with open(path, "rb") as file:
        begin, end = (span.offset, span.offset + span.size) if span else (0, path.stat().st_size)
        for kind, start, stop in _boxes(file, begin, end):
            if kind == b"moov" and stop - start <= _MOST_BYTES:
                for name, *trak in _boxes(file, start, stop):
                    if name == b"trak" and _track_number(file, *trak) == track:
                        return _shifts(file, *trak)
    return None


def _boxes(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first and last byte of its contents) of the boxes that lie one after the other in a part of the file."""
    while begin + 8 <= end:
        file.seek(begin)
        size, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = int.from_bytes(file.read(8), "big"), 16
        size = size or end - begin
        if size < header or begin + size > end:
            return
        yield kind, begin + header, begin + size
        begin += size


def _track_number(file: BinaryIO, begin: int, end: int) -> int | None:
    for kind, start, stop in _boxes(file, begin, end):
        if kind == b"tkhd" and stop - start >= 24:
            file.seek(start)
            head = file.read(24)
            return int.from_bytes(head[20:24] if head[0] == 1 else head[12:16], "big")
    return None


def _shifts(file: BinaryIO, begin: int, end: int) -> np.ndarray | None:
    for kind, start, stop in _boxes(file, begin, end):
        if kind in (b"mdia", b"minf", b"stbl") and (found := _shifts(file, start, stop)) is not None:
            return found
        if kind == b"ctts":
            file.seek(start + 4)
            num_rows = int.from_bytes(file.read(4), "big")
            table = np.frombuffer(file.read(min(8 * num_rows, stop - start - 8)), ">i4")
            repeats, shifts = table[: len(table) // 2 * 2].reshape(-1, 2).astype(np.int64).T
            is_sane = len(repeats) == num_rows and (repeats >= 0).all() and repeats.sum() <= _MOST_BYTES
            return np.repeat(shifts, repeats) if is_sane else None
    return None
