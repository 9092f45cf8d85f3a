"""Rendered scenes with a class: one shape, how it moves, how fast. Simple enough for a miniature GPT to learn.

    shape     disc or upright bar, of one of eight colours, over a ground of another
    motion    still; slide: to the left or right, off the borders; pulse: growing and shrinking on the spot
    speed     slow or fast

Nothing in them comes from a photograph: the training split and the held-out one differ in places, sizes, speeds and
phases, which are drawn from a continuum, and not in colours. Duotone scenes are the same scenes in one pair of colours:
a GPT of the miniature's size learns how a shape looks and moves before it has met each of 56 pairs often enough.

Lengths are in sides of the picture and times in frames, so a seed gives the same scene at every size.
Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from tokenizer.common.device import rng_for

MOTIONS = ("still", "slide slow", "slide fast", "pulse slow", "pulse fast")
CLASS_NAMES = tuple(f"{shape} {motion}" for shape in ("disc", "bar") for motion in MOTIONS)
SLIDE_SPEED = {"slow": (0.010, 0.015), "fast": (0.045, 0.06)}  # sides of the picture per frame
PULSE_CYCLES = {"slow": (0.5, 0.7), "fast": (1.4, 1.9)}  # in 16 frames
RADIUS = (0.18, 0.25)  # in sides, at rest
_SWING = 0.45  # of the radius while it pulses
_BAR = (1.3, 0.5)  # half height and half width of a bar, in radii
_PALETTE = np.asarray(list(itertools.product((72.0, 184.0), repeat=3)))  # dark and light of red, green and blue
_DUOTONE = _PALETTE[3], _PALETTE[1]  # light blue ground, dark blue shape


@dataclass(frozen=True)
class ClassedScene:
    """All factors. `speed`: sides a frame of a slide, cycles in 16 frames of a pulse, 0 if the shape rests."""

    label: str
    ground_3: np.ndarray  # colours of the ground and of the shape, in grey levels
    colour_3: np.ndarray
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
    ground_3, colour_3 = _PALETTE[rng.choice(len(_PALETTE), 2, replace=False)]
    spans = {"slide": SLIDE_SPEED, "pulse": PULSE_CYCLES}
    return ClassedScene(
        label=label,
        ground_3=ground_3,
        colour_3=colour_3,
        radius=float(rng.uniform(*RADIUS)),
        start=(float(rng.random()), float(rng.random())),
        heading=float(rng.choice([0.0, np.pi])),
        speed=float(rng.uniform(*spans[motion][speed[0]])) if speed else 0.0,
        phase=float(rng.uniform(0, 2 * np.pi)),
    )


def render_classed_scene(seed: int, split: str, size: int = 64, num_frames: int = 16) -> tuple[np.ndarray, str]:
    """Scene number `seed` of a split: (frames_THWC uint8 [num_frames, size, size, 3], how its shape moves)."""
    return _render(draw_classed_scene(seed, split), size, num_frames)


def render_duotone_scene(seed: int, split: str, size: int = 64, num_frames: int = 16) -> tuple[np.ndarray, str]:
    """The same scene in the one pair of colours, otherwise as `render_classed_scene`."""
    ground_3, colour_3 = _DUOTONE
    scene = replace(draw_classed_scene(seed, split), ground_3=ground_3, colour_3=colour_3)
    return _render(scene, size, num_frames)


def _render(scene: ClassedScene, size: int, num_frames: int) -> tuple[np.ndarray, str]:
    frames_THWC = np.stack([_frame(scene, t, size) for t in range(num_frames)])
    return np.clip(frames_THWC + 0.5, 0, 255).astype(np.uint8), scene.label.partition(" ")[2]


def _frame(scene: ClassedScene, t: int, size: int) -> np.ndarray:
    """Frame t, [H, W, C] in grey levels, with an edge that is one pixel soft."""
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
    return scene.ground_3 + cover_HW1 * (scene.colour_3 - scene.ground_3)


def bounce(value: float) -> float:
    """A straight way folded into [0, 1]."""
    return 1 - abs(value % 2 - 1)
