"""Rendered scenes with a class: one shape, how it moves, how fast. Simple enough for a miniature GPT to learn.

    shape     disc or upright bar, of one colour, over a soft background: a bundled photograph of the split, blurred and
              recoloured (the mean colour is drawn, so that a few films do not decide it)
    motion    still; slide: to the left or right, off the borders; pulse: growing and shrinking on the spot
    speed     slow or fast

Lengths are in sides of the picture and times in frames, so a seed gives the same scene at every size.
Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenizer.data.bundled_clips import bundled_videos, kept_frames
from tokenizer.data.transforms import resize, rng_for

MOTIONS = ("still", "slide slow", "slide fast", "pulse slow", "pulse fast")
CLASS_NAMES = tuple(f"{shape} {motion}" for shape in ("disc", "bar") for motion in MOTIONS)
SLIDE_SPEED = {"slow": (0.010, 0.015), "fast": (0.045, 0.06)}  # sides of the picture per frame
PULSE_CYCLES = {"slow": (0.5, 0.7), "fast": (1.4, 1.9)}  # in 16 frames
RADIUS = (0.18, 0.25)  # in sides, at rest
_SWING = 0.45  # of the radius while it pulses
_BAR = (1.3, 0.5)  # half height and half width of a bar, in radii
_BACKGROUND_CELLS = 2  # across the picture: hardly more than a slope of colour
_MEAN_LEVEL = (40.0, 215.0)  # grey levels of the background's mean, drawn for each colour
_CONTRAST = 110.0  # grey levels between shape and background, at least, in one colour


@dataclass(frozen=True)
class ClassedScene:
    """All factors. `speed`: sides a frame of a slide, cycles in 16 frames of a pulse, 0 where the shape rests."""

    label: str
    background_HWC: np.ndarray  # uint8 [cells, cells, 3]
    colour: tuple[float, float, float]
    radius: float
    start: tuple[float, float]  # of the centre, as a part of the way that a slide may cover
    heading: float
    speed: float
    phase: float


def draw_classed_scene(seed: int, split: str) -> ClassedScene:
    """The factors of scene number `seed`; classes take turns, so any run of consecutive seeds is balanced."""
    rng = rng_for(seed, "classed scene", split)
    label = CLASS_NAMES[seed % len(CLASS_NAMES)]
    _, motion, *speed = label.split()
    clip = int(rng.integers(len(bundled_videos(split))))
    background_HWC = _recoloured(resize(kept_frames(split, clip)[:1], _BACKGROUND_CELLS, _BACKGROUND_CELLS)[0], rng)
    spans = {"slide": SLIDE_SPEED, "pulse": PULSE_CYCLES}
    return ClassedScene(
        label=label,
        background_HWC=background_HWC,
        colour=_contrasting_colour(background_HWC, rng),
        radius=float(rng.uniform(*RADIUS)),
        start=(float(rng.random()), float(rng.random())),
        heading=float(rng.choice([0.0, np.pi])),
        speed=float(rng.uniform(*spans[motion][speed[0]])) if speed else 0.0,
        phase=float(rng.uniform(0, 2 * np.pi)),
    )


def render_classed_scene(seed: int, split: str, size: int = 64, num_frames: int = 16) -> tuple[np.ndarray, str]:
    """Scene number `seed` of a split: (frames_THWC uint8 [num_frames, size, size, 3], how its shape moves)."""
    scene = draw_classed_scene(seed, split)
    ground_HWC = resize(scene.background_HWC[None], size, size)[0].astype(np.float32)
    frames_THWC = np.stack([_frame(scene, t, ground_HWC) for t in range(num_frames)])
    return np.clip(frames_THWC + 0.5, 0, 255).astype(np.uint8), scene.label.partition(" ")[2]


def _frame(scene: ClassedScene, t: int, ground_HWC: np.ndarray) -> np.ndarray:
    """Frame t, float32 [H, W, C], with an edge that is one pixel soft."""
    size = len(ground_HWC)
    slides, pulses = "slide" in scene.label, "pulse" in scene.label
    way = scene.speed * t if slides else 0.0
    radius = scene.radius * (1 + _SWING * np.sin(scene.phase + 2 * np.pi * scene.speed * t / 16) if pulses else 1)
    is_disc = scene.label.startswith("disc")
    half_2 = (1.0, 1.0) if is_disc else _BAR  # rows, columns
    largest = scene.radius * (1 + _SWING) if pulses else scene.radius
    directions = (np.sin(scene.heading), np.cos(scene.heading))
    y, x = (
        largest * half + (room := 1 - 2 * largest * half) * bounce(start + direction * way / room)
        for start, direction, half in zip(scene.start, directions, half_2, strict=True)
    )
    place = (np.arange(size) + 0.5) / size
    rows_H1, columns_1W = abs(place - y)[:, None], abs(place - x)[None]
    if is_disc:
        inside_HW = radius - np.hypot(rows_H1, columns_1W)
    else:
        inside_HW = np.minimum(_BAR[0] * radius - rows_H1, _BAR[1] * radius - columns_1W)
    cover_HW1 = np.clip(inside_HW * size + 0.5, 0, 1)[..., None]
    return ground_HWC + cover_HW1 * (np.asarray(scene.colour, np.float32) - ground_HWC)


def _recoloured(background_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    moved_HWC = background_HWC - background_HWC.mean(axis=(0, 1)) + rng.uniform(*_MEAN_LEVEL, 3)
    return np.clip(moved_HWC + 0.5, 0, 255).astype(np.uint8)


def _contrasting_colour(background_HWC: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    mean_3 = background_HWC.reshape(-1, 3).mean(axis=0)
    while True:
        colour_3 = rng.uniform(0, 255, 3)
        if abs(colour_3 - mean_3).max() >= _CONTRAST:
            return float(colour_3[0]), float(colour_3[1]), float(colour_3[2])


def bounce(value: float) -> float:
    """A straight way folded into [0, 1]."""
    return 1 - abs(value % 2 - 1)
