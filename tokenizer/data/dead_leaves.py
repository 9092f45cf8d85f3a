"""Pictures of things that hide each other: the dead-leaves model, a well-known stand-in for photographs.

Discs and bars of random place, colour and shading fall onto a plane, small ones more often than large ones (radii with
density r^-3), which gives edges, occlusion and a spectrum like those of natural images. A few thousand tokens of two
short films teach a small model those films; these pictures never repeat.
"""

from __future__ import annotations

import functools

import numpy as np

from tokenizer.data.transforms import rng_for

NUM_LEAVES = 160
NUM_PICTURES = 1024  # that are told apart, and kept (48 KB each): painting one costs more than all else in a scene
RADIUS = (0.04, 0.35)  # in sides of the picture
_GRAIN = 5.0  # grey levels of deviation of a leaf's own texture, at most


@functools.lru_cache(maxsize=NUM_PICTURES)
def dead_leaves(seed: int, side: int = 128) -> np.ndarray:
    """Picture number `seed`: uint8 [side, side, 3]."""
    rng = rng_for(seed, "dead leaves")
    num_colours = int(rng.integers(3, 9))
    palette_P3 = rng.uniform(10, 245, (num_colours, 1)) + rng.normal(
        0, 35, (num_colours, 3)
    )  # mostly muted, as outdoors
    image_HWC = np.empty((side, side, 3), np.float32)
    image_HWC[:] = palette_P3[0]
    # the inverse of the distribution function of density r^-3; large leaves fall first, or they would hide all others
    low, high = (radius**-2 for radius in RADIUS)
    radii = np.sort((high + (low - high) * rng.random(NUM_LEAVES)) ** -0.5)[::-1]
    for radius in radii:
        _drop_leaf(image_HWC, radius * side, palette_P3, rng)
    return np.clip(image_HWC + 0.5, 0, 255).astype(np.uint8)


def _drop_leaf(image_HWC: np.ndarray, radius: float, palette_P3: np.ndarray, rng: np.random.Generator) -> None:
    """Paint one leaf over what lies there, with an edge that is one pixel soft and a shading of its own."""
    side = len(image_HWC)
    y, x = rng.uniform(0, side, 2)
    top, bottom, left, right = (
        int(np.clip(v, 0, side)) for v in (y - radius, y + radius + 2, x - radius, x + radius + 2)
    )
    rows_H1, columns_1W = np.arange(top, bottom)[:, None] - y, np.arange(left, right)[None] - x
    angle, width = rng.uniform(0, np.pi), rng.uniform(0.3, 1.0)
    along = rows_H1 * np.sin(angle) + columns_1W * np.cos(angle)
    across = columns_1W * np.sin(angle) - rows_H1 * np.cos(angle)
    is_disc = rng.random() < 0.6
    reach_HW = np.hypot(along, across / width) if is_disc else np.maximum(abs(along), abs(across) / width) * np.sqrt(2)
    cover_HW1 = np.clip(radius + 0.5 - reach_HW, 0, 1)[..., None]
    colour_3 = palette_P3[rng.integers(len(palette_P3))] + rng.normal(0, 12, 3)
    shade_HW = rng.normal(0, 30) * along / radius + rng.uniform(1, _GRAIN) * rng.standard_normal(reach_HW.shape)
    under_HWC = image_HWC[top:bottom, left:right]
    under_HWC += cover_HW1 * (colour_3 + shade_HW[..., None] - under_HWC)
