"""Pictures of one clip for people: the side-by-side video with its strip of tokens, and the film of the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

_SHOWN_SIDE = 256  # smaller clips are enlarged by a whole number, so that every pixel stays a square
_FILM_SIDE = 128  # larger clips are reduced to this in the film strip
_GAP = 8
_STRIP_HEIGHT = 48  # multiple of 2: H.264 wants even sides
_PAPER, _TRACK, _BAR, _BAR_NOW, _INK = (24, 24, 27), (52, 52, 58), (176, 104, 20), (245, 158, 11), (244, 244, 245)


def side_by_side(real_THWC: np.ndarray, ours_THWC: np.ndarray, lengths: Sequence[int], longest: int) -> np.ndarray:
    """Original | reconstruction over the strip of tokens; uint8 in and out."""
    return over_strip([real_THWC, ours_THWC], lengths, longest)


def over_strip(
    clips: Sequence[np.ndarray], lengths: Sequence[int], longest: int, side: int = _SHOWN_SIDE
) -> np.ndarray:
    """Clips of one size side by side over a strip that shows the tokens of each temporal block; uint8 in and out.

    Clips smaller than `side` are enlarged by a whole number, up to it.

    The strip runs from left to right as time does: a bar of height length / longest for each block with the number on
    it, bright while the block plays, and a line at the frame on show.
    """
    zoom = max(1, side // clips[0].shape[1])
    columns = [frames.repeat(zoom, axis=1).repeat(zoom, axis=2) for frames in clips]
    gap = np.full((*columns[0].shape[:2], _GAP, 3), _PAPER, np.uint8)
    pictures = np.concatenate([part for column in columns for part in (gap, column)][1:], axis=2)
    num_frames, width = len(pictures), pictures.shape[2]
    strips = [token_strip(width, lengths, longest, k, num_frames) for k in range(num_frames)]
    return np.concatenate([pictures, np.stack(strips)], axis=1)


def filmstrip(real_THWC: np.ndarray, ours_THWC: np.ndarray) -> Image.Image:
    """All frames in one picture: originals in the upper row, reconstructions in the lower."""
    num_frames, height, width = real_THWC.shape[:3]
    film = Image.fromarray(rearrange(np.stack([real_THWC, ours_THWC]), "two T H W C -> (two H) (T W) C"))
    if height <= _FILM_SIDE:
        return film
    small = (num_frames * round(width * _FILM_SIDE / height), 2 * _FILM_SIDE)
    return film.resize(small, Image.Resampling.BOX)


def token_strip(
    width: int, lengths: Sequence[int], longest: int, frame: int | None = None, num_frames: int = 1
) -> np.ndarray:
    """uint8 [strip, width, 3]: the tokens of the clip while `frame` is on show; None for the clip as a whole."""
    image = Image.new("RGB", (width, _STRIP_HEIGHT), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    cell = width / len(lengths)
    playing = None if frame is None else frame * len(lengths) // num_frames
    for t, length in enumerate(lengths):
        left, right, floor = round(t * cell) + 2, round((t + 1) * cell) - 3, _STRIP_HEIGHT - 5
        height = max(1, round((floor - 6) * length / longest))
        draw.rectangle((left, 6, right, floor), fill=_TRACK)
        draw.rectangle((left, floor - height, right, floor), fill=_BAR_NOW if playing in (None, t) else _BAR)
        draw.text((left + 4, 8), str(length), fill=_INK, font=font)
    if frame is not None:
        here = round((frame + 0.5) / num_frames * width)
        draw.line((here, 2, here, _STRIP_HEIGHT - 2), fill=_INK)
    return np.asarray(image)
