"""Sampled clips for people: the frames that were given are framed, and a strip shows the tokens of each block.

Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from PIL import Image

from tokenizer.router.clip_pictures import over_strip, token_strip

_PAPER, _MARK = (24, 24, 27), (56, 189, 248)
_GAP = 8
_CELL_SIDE = 128  # pixels of a clip in a grid, where it is not larger by itself
_WIDEST = 2048  # pixels of a sheet's row of frames; beyond it every second frame is shown, or every fourth ..


@dataclass(frozen=True)
class ShownClip:
    """A sampled clip with what is shown beside it: uint8 frames; `real_THWC` and the given frames, if there are any."""

    frames_THWC: np.ndarray
    lengths: tuple[int, ...]
    real_THWC: np.ndarray | None = None
    num_given: int = 0  # frames at the start that the model was given

    @property
    def rows(self) -> list[np.ndarray]:
        """Real (where there is one) and sampled, the given frames marked."""
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
    """All clips in one picture: a row of frames each (two where there is a real one), the strip of tokens below."""
    rows = []
    for clip in clips:
        num_frames, _, width = clip.frames_THWC.shape[:3]
        films = [rearrange(row[:: _every(num_frames, width)], "T H W C -> H (T W) C") for row in clip.rows]
        strip = token_strip(films[0].shape[1], clip.lengths, longest)
        rows += [*films, strip, np.full((_GAP, strip.shape[1], 3), _PAPER, np.uint8)]
    return Image.fromarray(np.concatenate(rows[:-1]))


def _every(num_frames: int, width: int) -> int:
    """1, 2, 4 ..: which frames of a clip fit into a row of the sheet."""
    return 2 ** max(0, math.ceil(math.log2(num_frames * width / _WIDEST)))
