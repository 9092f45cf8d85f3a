"""How a stored picture is displayed: frame rate, pixel aspect, colour matrix, display matrix of the container."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple, cast

import av
import numpy as np
from av.buffer import Buffer
from av.video.stream import VideoStream

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
