"""Pictures of clips: side-by-side videos over a strip of tokens, films, grids, sheets, and a validation's picture.

Letters: B clips, C colours, T frames, H W rows and columns, N temporal blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_BAR_HEIGHT = 6
_ROW_GAP = 4
_BAR_COLOUR = (217, 119, 6)


def save_comparison(path: str | Path, real_BCTHW: Tensor, ours_BCTHW: Tensor, length_BN: Tensor, longest: int) -> None:
    """Write a PNG: per clip two rows, one frame of each block: real, ours; below, length / longest as a bar.

    Clips in [0, 1]; `longest` is the largest level, a full bar.
    """
    num_frames, num_blocks = real_BCTHW.shape[2], length_BN.shape[1]
    middle_N = [(2 * t + 1) * num_frames // (2 * num_blocks) for t in range(num_blocks)]
    rows = []
    for real, ours, length_N in zip(real_BCTHW, ours_BCTHW, length_BN.tolist(), strict=True):
        rows += [_strip(real[:, middle_N]), _strip(ours[:, middle_N])]
        rows.append(_bars([length / longest for length in length_N], real.shape[-1]))
        rows.append(np.full((_ROW_GAP, rows[0].shape[1], 3), 255, np.uint8))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


def _strip(frames_CNHW: Tensor) -> np.ndarray:
    """Frames side by side, uint8 [H, N*W, 3]."""
    return rearrange((frames_CNHW.clamp(0, 1) * 255).round().byte().cpu(), "C N H W -> H (N W) C").numpy()


def _bars(shares: list[float], width: int) -> np.ndarray:
    """One bar per block, uint8 [bar, N*width, 3]."""
    strip = np.full((_BAR_HEIGHT, width * len(shares), 3), 235, np.uint8)
    for t, share in enumerate(shares):
        strip[1:-1, t * width : t * width + max(1, round(share * (width - 2)))] = _BAR_COLOUR
    return strip


_SHOWN_SIDE = 256  # smaller clips are enlarged by a whole number, so that every pixel stays a square
_FILM_SIDE = 128  # larger clips are reduced to this in the film strip
FULL_ERROR = 64  # grey levels at which an error map is brightest
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
    it, bright while the block plays, and a line at the current frame.
    """
    zoom = max(1, side // max(clips[0].shape[1:3]))
    columns = [frames.repeat(zoom, axis=1).repeat(zoom, axis=2) for frames in clips]
    gap = np.full((*columns[0].shape[:2], _GAP, 3), _PAPER, np.uint8)
    pictures = np.concatenate([part for column in columns for part in (gap, column)][1:], axis=2)
    num_frames, width = len(pictures), pictures.shape[2]
    strips = [token_strip(width, lengths, longest, k, num_frames) for k in range(num_frames)]
    return np.concatenate([pictures, np.stack(strips)], axis=1)


def filmstrip(*clips_THWC: np.ndarray) -> Image.Image:
    """All frames in one picture, a row for each clip; frames with a side above 128 pixels are reduced to that."""
    num_frames, height, width = clips_THWC[0].shape[:3]
    film = Image.fromarray(rearrange(np.stack(clips_THWC), "R T H W C -> (R H) (T W) C"))
    if (longer := max(height, width)) <= _FILM_SIDE:
        return film
    small = (num_frames * round(width * _FILM_SIDE / longer), len(clips_THWC) * round(height * _FILM_SIDE / longer))
    return film.resize(small, Image.Resampling.BOX)


def error_map(real_THWC: np.ndarray, ours_THWC: np.ndarray) -> np.ndarray:
    """Mean absolute error over the colours as uint8 [T, H, W, 3]: black at 0, yellow at FULL_ERROR and above."""
    error_THW = np.abs(real_THWC.astype(np.int16) - ours_THWC).mean(axis=-1)
    level_THW = np.minimum(255, error_THW * (255 / FULL_ERROR)).astype(np.uint8)
    return _heat()[level_THW]


@functools.cache
def _heat() -> np.ndarray:
    """uint8 [256, 3]: matplotlib's inferno."""
    from matplotlib import colormaps

    return (colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def token_strip(
    width: int, lengths: Sequence[int], longest: int, frame: int | None = None, num_frames: int = 1
) -> np.ndarray:
    """uint8 [strip, width, 3]: the tokens of the clip while `frame` is shown; None: the clip as a whole."""
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


_MARK = (56, 189, 248)  # border of given frames
_CELL_SIDE = 128  # pixels of a clip in a grid, unless the clip is larger
_WIDEST = 2048  # pixels of a sheet's row of frames; wider ones show every second frame, or every fourth ..


@dataclass(frozen=True)
class ShownClip:
    """A sampled clip as uint8 frames, and its original if there is one."""

    frames_THWC: np.ndarray
    lengths: tuple[int, ...]
    real_THWC: np.ndarray | None = None
    num_given: int = 0  # frames at the start that the model was given

    @property
    def rows(self) -> list[np.ndarray]:
        """Original (if there is one) and sampled clip, the given frames marked."""
        clips = [self.frames_THWC] if self.real_THWC is None else [self.real_THWC, self.frames_THWC]
        return [mark_given(clip, self.num_given) for clip in clips]


def mark_given(frames_THWC: np.ndarray, num_given: int) -> np.ndarray:
    """A copy in which the first `num_given` frames have a blue border."""
    marked = frames_THWC.copy()
    edge = max(1, marked.shape[1] // 48)
    inside = marked[:num_given, edge:-edge, edge:-edge].copy()
    marked[:num_given] = _MARK
    marked[:num_given, edge:-edge, edge:-edge] = inside
    return marked


def clip_video(clip: ShownClip, longest: int) -> np.ndarray:
    """One clip over its strip of tokens, enlarged, uint8 [T, H, W, C]. `longest`: the largest level, a full bar."""
    return over_strip(clip.rows, clip.lengths, longest)


def grid_video(clips: Sequence[ShownClip], longest: int) -> np.ndarray:
    """All clips playing at once in a grid that is about as wide as high, uint8 [T, H, W, C]."""
    cells = [over_strip(clip.rows, clip.lengths, longest, _CELL_SIDE) for clip in clips]
    height, width = cells[0].shape[1:3]
    columns = math.ceil(math.sqrt(len(cells) * height / width))
    cells += [np.full_like(cells[0], _PAPER)] * (-len(cells) % columns)
    padded = np.pad(np.stack(cells), ((0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0)))
    return rearrange(padded, "(R N) T H W C -> T (R H) (N W) C", N=columns)[:, :-_GAP, :-_GAP]


def contact_sheet(clips: Sequence[ShownClip], longest: int) -> Image.Image:
    """All clips in one picture: a row of frames each, the original's above it if there is one, tokens below."""
    rows = []
    for clip in clips:
        num_frames, _, width = clip.frames_THWC.shape[:3]
        every = 2 ** max(0, math.ceil(math.log2(num_frames * width / _WIDEST)))  # so many fit into a row
        films = [rearrange(row[::every], "T H W C -> H (T W) C") for row in clip.rows]
        strip = token_strip(films[0].shape[1], clip.lengths, longest)
        rows += [*films, strip, np.full((_GAP, strip.shape[1], 3), _PAPER, np.uint8)]
    return Image.fromarray(np.concatenate(rows[:-1]))
