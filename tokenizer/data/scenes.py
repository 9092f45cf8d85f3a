"""Rendered scenes whose complexity is known: what moves, how fast, in which block, over how detailed a texture.

A scene is one camera pose per frame over a still photograph (a small, soft copy of a crop of a bundled clip of the same
split, stretched to the same contrast and continued by reflection; in the training split every other time a picture of
dead leaves), with one or two textured shapes over it. Six consecutive scenes show the same photograph and the same
shapes, one of each kind, so what differs between kinds is the motion and not the detail. In the order of what they
should cost in tokens:

    still   nothing changes, to the bit
    slow    the camera drifts, and the shapes with it, by a fraction of a pixel a frame
    shapes  the camera rests; the shapes travel and bounce, by a few pixels a frame
    mixed   some temporal blocks are still to the bit, in the others everything moves fast
    fast    the camera pans, turns and zooms and the shapes travel, by a few pixels a frame
    cuts    one to three abrupt changes of photograph, at block borders or anywhere, calm in between

Lengths are in sides of the picture and times in frames, so a seed gives the same scene at every size.
Letters: T frames, N temporal blocks, S shapes, K distinct camera poses, H W rows and columns, C colours.

The pictures of dead leaves are a standard stand-in for photographs: discs and bars of random place, colour and shading
fall onto a plane, small ones more often than large ones (radii with density r^-3). That gives edges, occlusion and a
spectrum like those of natural images, and no picture repeats; a small model would learn two short films by heart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from tokenizer.common.device import rng_for
from tokenizer.data.classed_scenes import bounce
from tokenizer.data.files import bundled_videos
from tokenizer.data.video_io import iter_clips, resize

KEPT_SIDE = 128  # of `kept_frames`
NUM_LEAVES = 160
NUM_PICTURES = 1024  # that are told apart, and kept (48 KB each): painting one costs more than all else in a scene
RADIUS = (0.04, 0.35)  # in sides of the picture
_GRAIN = 5.0  # grey levels of deviation of a leaf's own texture, at most


@functools.lru_cache(maxsize=256)
def kept_frames(split: str, clip: int) -> np.ndarray:
    """The first and the middle frame of a bundled clip, uint8 [2, 128, 128, 3]; 100 KB each, decoded once a process."""
    frames_THWC = next(iter_clips(bundled_videos(split)[clip].path, size=KEPT_SIDE)).frames_THWC
    return frames_THWC[:: len(frames_THWC) // 2].copy()


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


KINDS = ("still", "slow", "shapes", "mixed", "fast", "cuts")
NUM_BLOCKS = 4
SLOW_SPEED = (0.002, 0.008)  # sides of the picture per frame: 0.1 .. 0.5 pixels of 64
FAST_SPEED = (0.025, 0.05)  # 1.6 .. 3.2 pixels of 64
TEXELS_ACROSS = (3.5, 7.0)  # points of the soft copy under the picture: at most one to a patch, at 64 pixels
_CROP = (48, KEPT_SIDE)  # side of the crop, in source pixels
CONTRAST = 45.0  # grey levels of deviation that every photograph is stretched to
_MOST_GAIN = 3.0  # noise of flat crops is not stretched further
_LEAVES_SHARE = 0.5  # of the training photographs that are dead leaves: two films alone teach a model only them
_FLATTEST = 14.0  # grey levels of deviation below which a crop shows no motion (title cards, fades)


@dataclass(frozen=True)
class Photo:
    """A place in the bundled clips: the clip, one of its kept frames, the crop's corner and side in source pixels.

    `points`: along a side of the soft copy that is shown of it; twice as many as the picture is wide, room to move in.
    `leaves`: number of the dead-leaves picture that is shown in place of the clip, or None.
    """

    clip: int
    frame: int
    leaves: int | None
    top: int
    left: int
    side: int
    mirrored: bool
    points: int


@dataclass(frozen=True)
class Shape:
    """A textured disc or square: radius, starting place and velocity direction in sides, speed per frame."""

    photo: Photo
    round: bool
    radius: float
    start: tuple[float, float]
    velocity: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """All factors of a rendered clip. `speed_N` is the camera's (or the shapes') speed in every temporal block."""

    split: str
    num_frames: int
    kind: str
    texels_across: float
    photos: tuple[Photo, ...]
    cut_frames: tuple[int, ...]
    speed_N: tuple[float, ...]
    heading: float
    turn: float
    zoom: float
    shapes: tuple[Shape, ...]


def render_scene(seed: int, split: str, size: int = 64, num_frames: int = 16) -> tuple[np.ndarray, str]:
    """Scene number `seed` of a split ("train" or "heldout"): (frames_THWC uint8 [num_frames, size, size, 3], kind)."""
    scene = draw_scene(seed, split, num_frames)
    return render(scene, size), scene.kind


def draw_scene(seed: int, split: str, num_frames: int = 16) -> Scene:
    """The factors of scene number `seed`; kinds take turns, so any run of consecutive seeds is balanced."""
    number, turn = divmod(seed, len(KINDS))
    kind, rng, own_rng = KINDS[turn], rng_for(number, "scene", split), rng_for(seed, "scene of a kind", split)
    texels = float(np.exp(rng.uniform(*np.log(TEXELS_ACROSS))))
    photo, shapes = _draw_photo(rng, split, texels), _draw_shapes(rng, split)
    cuts = _draw_cuts(own_rng, num_frames) if kind == "cuts" else ()
    return Scene(
        split=split,
        num_frames=num_frames,
        kind=kind,
        texels_across=texels,
        photos=(photo, *(_draw_photo(own_rng, split, texels) for _ in cuts)),
        cut_frames=cuts,
        speed_N=_SPEEDS[kind](own_rng),
        heading=float(rng.uniform(0, 2 * np.pi)),
        turn=float(rng.uniform(-0.6, 0.6)),
        zoom=float(rng.uniform(-0.6, 0.6)),
        shapes=shapes,
    )


def render(scene: Scene, size: int) -> np.ndarray:
    """Draw a scene: uint8 [T, size, size, 3]. Frames with equal poses are equal to the bit."""
    travel_T = _travel(scene.speed_N, scene.num_frames)
    shot_T = np.searchsorted(scene.cut_frames, np.arange(scene.num_frames), side="right")
    frames_THWC = np.empty((scene.num_frames, size, size, 3), np.float32)
    for shot, photo in enumerate(scene.photos):
        shown_T = shot_T == shot
        pose_T4 = _poses(scene, np.zeros(shown_T.sum()) if scene.kind == "shapes" else travel_T[shown_T])
        frames_THWC[shown_T] = _photograph(photo, scene.split, pose_T4, scene.texels_across, size)
    for shape in scene.shapes:
        _paint(frames_THWC, shape, scene.split, travel_T)
    return np.clip(frames_THWC + 0.5, 0, 255).astype(np.uint8)


# What a scene is made of


def _still(rng: np.random.Generator) -> tuple[float, ...]:
    return (0.0,) * NUM_BLOCKS


def _slow(rng: np.random.Generator) -> tuple[float, ...]:
    return (float(rng.uniform(*SLOW_SPEED)),) * NUM_BLOCKS


def _fast(rng: np.random.Generator) -> tuple[float, ...]:
    return (float(rng.uniform(*FAST_SPEED)),) * NUM_BLOCKS


def _mixed(rng: np.random.Generator) -> tuple[float, ...]:
    """Fast in one, two or three blocks, still in the others."""
    moving = rng.permutation(NUM_BLOCKS) < rng.integers(1, NUM_BLOCKS)
    return tuple(float(rng.uniform(*FAST_SPEED)) if m else 0.0 for m in moving)


_SPEEDS: dict[str, Callable[[np.random.Generator], tuple[float, ...]]] = {
    "still": _still, "slow": _slow, "shapes": _fast, "mixed": _mixed, "fast": _fast,
    "cuts": lambda rng: _still(rng) if rng.random() < 0.5 else _slow(rng),
}  # fmt: skip


def _draw_cuts(rng: np.random.Generator, num_frames: int) -> tuple[int, ...]:
    """One to three frames at which a new shot begins: half of the scenes cut at block borders, half anywhere."""
    block = max(1, num_frames // NUM_BLOCKS)
    places = np.arange(block, num_frames, block) if rng.random() < 0.5 else np.arange(1, num_frames)
    count = min(int(rng.integers(1, 4)), len(places))
    return tuple(sorted(int(p) for p in rng.choice(places, count, replace=False)))


def _draw_photo(rng: np.random.Generator, split: str, texels: float) -> Photo:
    """The soft copy of a crop; the most structured of a few draws when the first ones are flat."""
    points = round(2 * texels)
    edge = points // 4  # the middle is what the camera sees first
    tries: list[tuple[float, Photo]] = []
    while not tries or (tries[-1][0] < _FLATTEST and len(tries) < 6):
        side = int(rng.integers(_CROP[0], _CROP[1] + 1))
        top, left = (int(v) for v in rng.integers(KEPT_SIDE - side + 1, size=2))
        clip, frame = int(rng.integers(len(bundled_videos(split)))), int(rng.integers(2))
        leaves = int(rng.integers(NUM_PICTURES)) if split == "train" and rng.random() < _LEAVES_SHARE else None
        photo = Photo(clip, frame, leaves, top, left, side, bool(rng.random() < 0.5), points)
        middle_HW = _soft_copy(photo, split)[edge : points - edge, edge : points - edge, 1]
        tries.append((float(middle_HW.std()), photo))
    return max(tries, key=lambda scored: scored[0])[1]


def _draw_shapes(rng: np.random.Generator, split: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(
            photo=_draw_photo(rng, split, float(rng.uniform(*TEXELS_ACROSS)) / 4),  # it is about a third as wide
            round=bool(rng.random() < 0.5),
            radius=float(rng.uniform(0.16, 0.26)),
            start=(float(rng.random()), float(rng.random())),
            velocity=(float(np.sin(angle)), float(np.cos(angle))),
        )
        for angle in rng.uniform(0, 2 * np.pi, rng.integers(1, 3))
    )


# From factors to pixels


def _soft_copy(photo: Photo, split: str) -> np.ndarray:
    """The crop at its few points, uint8 [points, points, 3]."""
    if photo.leaves is None:
        image_HWC = kept_frames(split, photo.clip)[photo.frame]
    else:
        image_HWC = dead_leaves(photo.leaves, KEPT_SIDE)
    crop_HWC = image_HWC[photo.top : photo.top + photo.side, photo.left : photo.left + photo.side]
    copy_HWC = resize(np.ascontiguousarray(crop_HWC)[None], photo.points, photo.points)[0]
    return copy_HWC[:, ::-1] if photo.mirrored else copy_HWC


def _texture(photo: Photo, split: str, side: int) -> np.ndarray:
    """The soft copy with the contrast that all have, its mean colour drawn half way to grey; uint8 [side, side, 3]."""
    copy_HWC = _soft_copy(photo, split)
    mean_C = copy_HWC.mean(axis=(0, 1))
    gain = min(_MOST_GAIN, CONTRAST / max(float(copy_HWC[..., 1].std()), 1.0))
    stretched_HWC = np.clip((copy_HWC - mean_C) * gain + (mean_C + 128) / 2 + 0.5, 0, 255).astype(np.uint8)
    return resize(stretched_HWC[None], side, side)[0]


def _travel(speed_N: tuple[float, ...], num_frames: int) -> np.ndarray:
    """Way covered since frame 0, in sides. A block moves from its first frame on, relative to the frame before it."""
    block_T = np.arange(num_frames) * len(speed_N) // num_frames
    step_T = np.asarray(speed_N)[block_T]
    step_T[0] = 0.0
    return np.cumsum(step_T)


def _poses(scene: Scene, travel_T: np.ndarray) -> np.ndarray:
    """Camera pose per frame [T, 4]: centre x and y in sides, log zoom, angle; equal travel gives an equal pose."""
    columns = [travel_T * np.cos(scene.heading), travel_T * np.sin(scene.heading)]
    columns += [scene.zoom * travel_T, scene.turn * travel_T]
    return np.stack(columns, axis=1)


def _photograph(photo: Photo, split: str, pose_T4: np.ndarray, texels_across: float, size: int) -> np.ndarray:
    """The photo seen from every pose: float32 [T, size, size, 3] in grey levels."""
    side = max(2, round(photo.points / texels_across * size))
    canvas_HWC = _texture(photo, split, side)
    distinct_K4, which_T = np.unique(pose_T4, axis=0, return_inverse=True)
    x_K, y_K, zoom_K, angle_K = distinct_K4.T
    scale_K = np.exp(zoom_K) * size / side  # the canvas is [-1, 1] wide, the picture a part of it
    cos_K, sin_K = scale_K * np.cos(angle_K), scale_K * np.sin(angle_K)
    shift = 2 * size / side
    theta_K23 = np.stack([cos_K, -sin_K, shift * x_K, sin_K, cos_K, shift * y_K], axis=1).reshape(-1, 2, 3)
    shape_KCHW = [len(distinct_K4), 3, size, size]
    grid_KHW2 = F.affine_grid(torch.from_numpy(theta_K23).float(), shape_KCHW, align_corners=False)
    canvas_KCHW = torch.from_numpy(canvas_HWC).permute(2, 0, 1).float().expand(len(distinct_K4), -1, -1, -1)
    seen_KCHW = F.grid_sample(canvas_KCHW, grid_KHW2, padding_mode="reflection", align_corners=False)
    return seen_KCHW.permute(0, 2, 3, 1).numpy()[which_T.reshape(-1)]  # [T, size, size, 3]


def _paint(frames_THWC: np.ndarray, shape: Shape, split: str, travel_T: np.ndarray) -> None:
    """Lay a shape over the frames at its place in each; it bounces off the borders and carries its texture along."""
    size = frames_THWC.shape[1]
    half = max(2, round(shape.radius * size)) + 1
    texture_HWC = _texture(shape.photo, split, 2 * half)
    for frame_HWC, travel in zip(frames_THWC, travel_T, strict=True):
        y, x = (bounce(s + v * travel) * (size - 2 * half) for s, v in zip(shape.start, shape.velocity, strict=True))
        top, left = int(y), int(x)
        rows_H1 = np.arange(2 * half)[:, None] + 0.5 - half - (y - top)
        columns_1W = np.arange(2 * half)[None] + 0.5 - half - (x - left)
        reach_HW = np.hypot(rows_H1, columns_1W) if shape.round else np.maximum(abs(rows_H1), abs(columns_1W))
        cover_HW1 = np.clip(shape.radius * size + 0.5 - reach_HW, 0, 1)[..., None]  # soft edge of one pixel
        under_HWC = frame_HWC[top : top + 2 * half, left : left + 2 * half]
        under_HWC += cover_HW1 * (texture_HWC - under_HWC)
