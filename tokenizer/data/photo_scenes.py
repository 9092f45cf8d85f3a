"""Camera moves over real photographs with all their detail: the texture of natural video, motion of known speed.

A scene is a crop of a photograph of a folder, seen by a camera that pans, zooms and turns; in half of the scenes one or
two cut-outs of other photographs travel over it, and in one of eight the photograph changes. Motion is drawn for each
scene from still to fast, and half of the scenes start, stop or change it at any frame: that is what makes an adaptive
length pay. `scenes.py` draws soft pictures of few points instead, for models that cannot code more.

Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from tokenizer.common.device import rng_for
from tokenizer.common.errors import UserError

MOTIONS = ("still", "slow", "medium", "fast")
SPEEDS = {"still": (0, 0), "slow": (0.002, 0.008), "medium": (0.008, 0.025), "fast": (0.025, 0.06)}  # sides a frame
KEPT_SIDE = 1024  # pixels of a photograph's longer side that are kept
SMALLEST_VIEW = 96  # pixels of a photograph that a picture shows at least
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@functools.lru_cache(maxsize=2)
def load_photos(folder: Path) -> list[np.ndarray]:
    """All photographs below a folder in the order of their names: uint8 [H, W, 3], at most KEPT_SIDE wide or high.

    UserError if there is none or one cannot be read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: holds no photograph ({', '.join(_SUFFIXES)})")
    return [_load(path) for path in paths]


def _load(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as file:
            file.draft("RGB", (KEPT_SIDE, KEPT_SIDE))  # a JPEG is decoded at an eighth to a half of its size
            image = file.convert("RGB")
        image.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS)
        return np.asarray(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a photograph: {error}") from error


@dataclass(frozen=True)
class _View:
    """What the camera sees, one number a frame: centre in sides of the picture, log zoom, angle."""

    x_T: np.ndarray
    y_T: np.ndarray
    zoom_T: np.ndarray
    angle_T: np.ndarray


def render_photo_scene(
    seed: int, photos: Sequence[np.ndarray], size: int = 64, num_frames: int = 16
) -> tuple[np.ndarray, str]:
    """Scene number `seed`: (uint8 [T, size, size, 3], its fastest motion). Frames with equal poses are equal."""
    rng = rng_for(seed, "photo scene")
    kind = MOTIONS[seed % len(MOTIONS)]
    frames_THWC = np.empty((num_frames, size, size, 3), np.float32)
    cut = int(rng.integers(1, num_frames)) if rng.random() < 1 / 8 else num_frames
    for shot in (slice(0, cut), slice(cut, num_frames)):
        length = len(range(num_frames)[shot])
        if length:
            frames_THWC[shot] = _shot(rng, photos, kind, size, length)
    for _ in range(int(rng.integers(1, 3)) if rng.random() < 0.5 else 0):
        _lay_cutout(frames_THWC, rng, photos, kind)
    gain, shift = rng.uniform(0.6, 1.1), rng.uniform(-25, 25)
    frames_THWC = (frames_THWC - 128) * gain + 128 + shift
    return np.clip(frames_THWC + 0.5, 0, 255).astype(np.uint8), kind


def _travel(rng: np.random.Generator, kind: str, num_frames: int) -> np.ndarray:
    """Way covered since the first frame, in sides: steady, or with one or two changes of speed at any frame."""
    speed = rng.uniform(*SPEEDS[kind])
    step_T = np.full(num_frames, speed)
    if rng.random() < 0.5:
        for frame in sorted(rng.integers(0, num_frames, int(rng.integers(1, 3)))):
            step_T[frame:] = 0 if rng.random() < 0.5 else speed
            step_T[:frame] *= rng.random() < 0.5
    step_T[0] = 0
    return np.cumsum(step_T)


def _shot(rng: np.random.Generator, photos: Sequence[np.ndarray], kind: str, size: int, num_frames: int) -> np.ndarray:
    """One camera move over one photograph: float32 [T, size, size, 3] in grey levels."""
    photo_HWC = photos[int(rng.integers(len(photos)))]
    travel_T, heading = _travel(rng, kind, num_frames), rng.uniform(0, 2 * np.pi)
    view = _View(
        x_T=travel_T * np.cos(heading),
        y_T=travel_T * np.sin(heading),
        zoom_T=travel_T * rng.uniform(-0.6, 0.6),
        angle_T=travel_T * rng.uniform(-0.6, 0.6),
    )
    return _look(_crop(rng, photo_HWC, size), view, size)


def _crop(rng: np.random.Generator, photo_HWC: np.ndarray, size: int) -> np.ndarray:
    """A square of a photograph, twice as wide as the picture, mirrored or not: float32 [2 size, 2 size, 3]."""
    shorter = min(photo_HWC.shape[:2])
    side = int(np.exp(rng.uniform(np.log(min(2 * SMALLEST_VIEW, shorter)), np.log(shorter))))
    top, left = (int(rng.integers(length - side + 1)) for length in photo_HWC.shape[:2])
    image = Image.fromarray(photo_HWC[top : top + side, left : left + side])
    crop_HWC = np.asarray(image.resize((2 * size, 2 * size), Image.Resampling.LANCZOS, reducing_gap=2.0), np.float32)
    return crop_HWC[:, ::-1].copy() if rng.random() < 0.5 else crop_HWC


def _look(canvas_HWC: np.ndarray, view: _View, size: int) -> np.ndarray:
    """The canvas from every pose, bilinear, continued by reflection: float32 [T, size, size, 3]."""
    scale_T = np.exp(view.zoom_T) * 0.5  # the picture is half as wide as the canvas
    cos_T, sin_T = scale_T * np.cos(view.angle_T), scale_T * np.sin(view.angle_T)
    rows = [cos_T, -sin_T, view.x_T, sin_T, cos_T, view.y_T]  # one side of the picture is 1 on the canvas
    theta_T23 = torch.from_numpy(np.stack(rows, axis=1)).float().reshape(-1, 2, 3)
    num_frames = len(theta_T23)
    grid_THW2 = F.affine_grid(theta_T23, [num_frames, 3, size, size], align_corners=False)
    canvas_TCHW = torch.from_numpy(canvas_HWC).permute(2, 0, 1).expand(num_frames, -1, -1, -1)
    seen_TCHW = F.grid_sample(canvas_TCHW, grid_THW2, padding_mode="reflection", align_corners=False)
    return seen_TCHW.permute(0, 2, 3, 1).numpy()


def _lay_cutout(frames_THWC: np.ndarray, rng: np.random.Generator, photos: Sequence[np.ndarray], kind: str) -> None:
    """Lay an ellipse or a box, cut out of a photograph, over all frames; it travels straight on and turns."""
    num_frames, size = frames_THWC.shape[:2]
    travel_T, heading = _travel(rng, kind, num_frames), rng.uniform(0, 2 * np.pi)
    x_T, y_T = rng.uniform(-0.4, 0.4) + travel_T * np.cos(heading), rng.uniform(-0.4, 0.4) + travel_T * np.sin(heading)
    angle_T = rng.uniform(0, 2 * np.pi) + travel_T * rng.uniform(-2, 2)
    radius, width, is_round = rng.uniform(0.1, 0.3), rng.uniform(0.4, 1.0), rng.random() < 0.6
    texture_CHW = torch.from_numpy(_crop(rng, photos[int(rng.integers(len(photos)))], size)).permute(2, 0, 1)
    axis = (np.arange(size) + 0.5) / size - 0.5
    for frame_HWC, x, y, angle in zip(frames_THWC, x_T, y_T, angle_T, strict=True):
        along_HW = (axis[None] - x) * np.cos(angle) + (axis[:, None] - y) * np.sin(angle)
        across_HW = (axis[:, None] - y) * np.cos(angle) - (axis[None] - x) * np.sin(angle)
        reach_HW = np.hypot(along_HW, across_HW / width)
        if not is_round:
            reach_HW = np.maximum(abs(along_HW), abs(across_HW) / width)
        cover_HW1 = np.clip((radius - reach_HW) * size + 0.5, 0, 1)[..., None]  # an edge of one pixel
        grid_1HW2 = torch.from_numpy(np.stack([along_HW, across_HW], -1)).float()[None] * 1.5
        seen_HWC = F.grid_sample(texture_CHW[None], grid_1HW2, padding_mode="reflection", align_corners=False)[0]
        frame_HWC += cover_HW1 * (seen_HWC.permute(1, 2, 0).numpy() - frame_HWC)
