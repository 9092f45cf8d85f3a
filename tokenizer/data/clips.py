"""Clips for training and measuring: a list of sources -> a ClipDataset with stable names and reproducible draws.

A source is a folder, a video file, a manifest .csv (see manifest_table.py), or one of
    bundled:SPLIT         the real clips shipped with the package; SPLIT is train or heldout
    synthetic:SPLIT:N     N rendered scenes of known complexity
    classed:SPLIT:N       N rendered scenes with a class as label: shape, motion, speed; of two colours out of eight
    duotone:SPLIT:N       the same scenes, all of the same two colours
    doom:SPLIT:N          N walks through textured rooms, with the motion as label; SPLIT is train, validation or test
    steady_doom:SPLIT:N   the same with one motion at one speed in each walk (both need the extra [scenes])
    FILE.safetensors:N    N clips that pack.py has rendered or decoded before, or without :N all
and each of these may end in A-B in place of N: number A up to B - 1 alone, as in bundled:train:0-84.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tokenizer.common.errors import UserError
from tokenizer.data.bundled_clips import SPLITS, bundled_videos
from tokenizer.data.classed_scenes import CLASS_NAMES, render_classed_scene, render_duotone_scene
from tokenizer.data.clip_store import is_store, open_store
from tokenizer.data.doom import MOTIONS, STEADY_MOTIONS, render_doom_walk, render_steady_walk
from tokenizer.data.doom import SPLITS as DOOM_SPLITS
from tokenizer.data.manifest_table import read_rows
from tokenizer.data.safe_decode import decode_clip_at
from tokenizer.data.scenes import KINDS, render_scene
from tokenizer.data.video_io import (
    VideoError,
    display_name,
    horizontal_flip,
    iter_clips,
    list_videos,
    random_resized_crop,
    read_clip_at,
    resize_center_crop,
    rng_for,
    to_model_range,
)


class _Renderer(NamedTuple):
    """How a scene is rendered from (seed, split, size, frames), and what takes turns in consecutive seeds."""

    render: Callable[[int, str, int, int], tuple[np.ndarray, str]]
    turns: Sequence[str]
    labelled: bool  # whether these are classes
    splits: Sequence[str] = SPLITS


_RENDERERS = {
    "synthetic": _Renderer(render_scene, KINDS, labelled=False),
    "classed": _Renderer(render_classed_scene, CLASS_NAMES, labelled=True),
    "duotone": _Renderer(render_duotone_scene, CLASS_NAMES, labelled=True),
    "doom": _Renderer(render_doom_walk, MOTIONS, labelled=True, splits=DOOM_SPLITS),
    "steady_doom": _Renderer(render_steady_walk, STEADY_MOTIONS, labelled=True, splits=DOOM_SPLITS),
}
RENDERED = tuple(f"{kind}/" for kind in _RENDERERS)  # how the names of rendered scenes begin

log = logging.getLogger(__name__)


@dataclass
class DataConfig:
    """Where clips come from and what happens to them on the way.

    fps: None keeps the files' own rate. augment: random start, flip and crop, and fresh synthetic scenes every epoch.
    crop_scale: smallest side of the random crop, as a part of the short side; 1.0 is the centre crop.
    repeat: how often each source counts in an epoch; empty is once each.
    """

    sources: list[str] = field(default_factory=lambda: ["bundled:train"])
    num_frames: int = 16
    size: int = 128
    fps: float | None = None
    augment: bool = True
    crop_scale: float = 1.0
    flip: bool = True
    backend: str = "pyav"
    repeat: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ClipSample:
    """One clip, float32 [C, T, H, W] in [0, 1]. `kind` is known of rendered scenes, `label` of labelled files.

    `unreadable` names the files (with reasons) that were met before this clip was found in their stead.
    """

    video_CTHW: torch.Tensor
    name: str
    label: str | None
    kind: str | None
    unreadable: dict[str, str]


# With a generator a random clip of the item, without one the plain clip: (frames_THWC, kind of scene or None).
_Draw = Callable[[np.random.Generator | None], tuple[np.ndarray, str | None]]


@dataclass(frozen=True)
class _Item:
    """One entry of an epoch: its name, its label, and how to get its frames."""

    name: str
    label: str | None
    frames: _Draw


class ClipDataset:
    """A fixed, ordered list of clips; `get(index, epoch)` depends on (seed, epoch, index) alone.

    quarantine: name -> reason of every file that could not be read so far in this process (the loader adds those of
    its workers). Each is reported once, never tried again, and replaced by the next readable clip in the list.
    """

    def __init__(self, cfg: DataConfig, seed: int, items: list[_Item]) -> None:
        self.cfg = cfg
        self.names = [item.name for item in items]
        self.labels = [item.label for item in items]
        self.quarantine: dict[str, str] = {}
        self._seed = seed
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def get(self, index: int, epoch: int = 0) -> ClipSample:
        """Clip `index`, or the next readable one. UserError when not a single clip of the set can be read."""
        unreadable: dict[str, str] = {}
        for step in range(len(self)):
            item = self._items[(index + step) % len(self)]
            if item.name in self.quarantine:
                continue
            try:
                return self._read((index + step) % len(self), epoch, unreadable)
            except VideoError as error:
                unreadable[item.name] = error.reason
                self.put_aside(unreadable)
        name, reason = next(iter(self.quarantine.items()))
        raise UserError(f"{', '.join(self.cfg.sources)}: not one of {len(self)} clips can be read ({name}: {reason})")

    def get_this(self, index: int, epoch: int = 0) -> ClipSample:
        """Clip `index` itself, for work in which no other may stand in its place; VideoError where it is unreadable.

        Nothing is quarantined: what comes out does not depend on what this process has met before.
        """
        return self._read(index, epoch, {})

    def readable(self, indices: Iterable[int]) -> Iterator[tuple[int, ClipSample]]:
        """Those of these clips that can be read, with their index; the others are put aside."""
        for index in indices:
            try:
                yield index, self.get_this(index)
            except VideoError as error:
                self.put_aside({self.names[index]: error.reason})

    def _read(self, index: int, epoch: int, unreadable: dict[str, str]) -> ClipSample:
        item = self._items[index]
        rng = rng_for(self._seed, "clip", epoch, index) if self.cfg.augment else None
        frames_THWC, kind = item.frames(rng)
        if rng is not None:
            frames_THWC = _augment(frames_THWC, self.cfg, rng)
        return ClipSample(to_model_range(frames_THWC), item.name, item.label, kind, unreadable)

    def first(self, num_clips: int) -> ClipDataset:
        """The first clips of the list, at most `num_clips`, as a set of their own."""
        return ClipDataset(self.cfg, self._seed, self._items[:num_clips])

    def put_aside(self, unreadable: dict[str, str]) -> None:
        """Enter files into the quarantine, each reported the first time."""
        for name, reason in unreadable.items():
            if name not in self.quarantine:
                self.quarantine[name] = reason
                log.warning("skipped %s: %s (%d unreadable so far)", name, reason, len(self.quarantine))


def build_dataset(cfg: DataConfig, seed: int = 0) -> ClipDataset:
    """List the clips of all sources. UserError for a source that does not exist, is empty or is misspelt."""
    _check(cfg)
    repeats = cfg.repeat or [1] * len(cfg.sources)
    items: list[_Item] = []
    for source, times in zip(cfg.sources, repeats, strict=True):
        items += _items_of(source, cfg) * times
    if not items:
        raise UserError(f"data.sources={cfg.sources} with data.repeat={cfg.repeat} holds no clip; add a source")
    return ClipDataset(cfg, seed, items)


def _check(cfg: DataConfig) -> None:
    if cfg.repeat and (len(cfg.repeat) != len(cfg.sources) or min(cfg.repeat) < 0):
        raise UserError(f"data.repeat={cfg.repeat} must hold one count >= 0 for each of the {len(cfg.sources)} sources")
    if not 0 < cfg.crop_scale <= 1:
        raise UserError(f"data.crop_scale={cfg.crop_scale} must lie above 0 and not above 1.0 (1.0 is the centre crop)")
    if min(cfg.num_frames, cfg.size) < 1:
        raise UserError(f"data.num_frames={cfg.num_frames} and data.size={cfg.size} must be at least 1")
    if cfg.fps is not None and not cfg.fps > 0:
        raise UserError(f"data.fps={cfg.fps} must be above 0; leave it out for the rate of the files")


def _items_of(source: str, cfg: DataConfig) -> list[_Item]:
    kind = source.partition(":")[0]
    if kind == "bundled":
        split, numbers = _part(source)
        bundled = [video for i, video in enumerate(bundled_videos(split)) if i in numbers]
        return [_Item(f"bundled/{v.path.name}", v.label, _bundled(v.path, cfg)) for v in bundled]
    if kind in _RENDERERS:
        split, numbers = _part(source)
        return [_rendered(kind, split, i, cfg) for i in numbers]
    if is_store(source.partition(":")[0]):
        return _store_items(source, cfg)
    if source.lower().endswith(".csv"):
        return _manifest_items(Path(source), cfg)
    folder = Path(source).absolute().parent  # names begin with the folder or file that was given
    videos = [video.absolute() for video in list_videos(source)]
    return [_Item(display_name(video.relative_to(folder)), None, _file(video, cfg)) for video in videos]


def _part(source: str) -> tuple[str, range]:
    """ "kind:split:N" or "kind:split:A-B" -> the split and the numbers of its clips; bundled clips: all where none."""
    kind = source.partition(":")[0]
    splits = _RENDERERS[kind].splits if kind in _RENDERERS else SPLITS
    match = re.fullmatch(rf"(\w+):({'|'.join(splits)})(?::(?:(\d+)-)?(\d+))?", source)
    if match and (match[4] or match[1] == "bundled"):
        numbers = range(int(match[3] or 0), int(match[4] or len(bundled_videos(match[2]))))
        if numbers:
            return match[2], numbers
    plain = ", ".join(f"{kind}:{split}" + (":N" if kind in _RENDERERS else "") for split in splits)
    raise UserError(f"data source {source!r}: expected {plain} or {kind}:train:A-B (number A up to B - 1)")


def _store_items(source: str, cfg: DataConfig) -> list[_Item]:
    """Clips of a packed file, all or those of "FILE:N" or "FILE:A-B"."""
    path, _, part = source.partition(":")
    store = open_store(path)
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)", part or str(len(store)))
    numbers = range(int(match[1] or 0), int(match[2])) if match else range(0)
    if not numbers or numbers[-1] >= len(store):
        raise UserError(f"data source {source!r}: {path} holds {len(store)} clips; expected {path}:N or {path}:A-B")
    num_frames, side = store.shape[:2]
    if num_frames != cfg.num_frames or side < cfg.size:
        raise UserError(
            f"{path} holds clips of {num_frames} frames of {side}x{side}, not {cfg.num_frames} of at least {cfg.size}: "
            f"pack it with --num-frames {cfg.num_frames} --size {cfg.size}"
        )
    return [_Item(store.clips[i].name, store.clips[i].label, _stored(path, i, cfg)) for i in numbers]


def _manifest_items(manifest: Path, cfg: DataConfig) -> list[_Item]:
    """Rows of a manifest. Whether the files are there shows when they are read."""
    return [
        _Item(display_name(row.path), row.label or None, _file(row.file(manifest), cfg)) for row in read_rows(manifest)
    ]


# Where frames come from: a clip of size `_read_size`, kind known or None


def _read_size(cfg: DataConfig) -> int:
    """Side of the square that is decoded: just large enough that a random crop of it is never scaled up."""
    return math.ceil(cfg.size / cfg.crop_scale) if cfg.augment else cfg.size


def _bundled(path: Path, cfg: DataConfig) -> _Draw:
    """Our own files are trusted: they are decoded in this process."""

    def frames(rng: np.random.Generator | None) -> tuple[np.ndarray, str | None]:
        if rng is None:
            clip = next(iter_clips(path, cfg.num_frames, _read_size(cfg), cfg.fps, backend=cfg.backend))
        else:
            clip = read_clip_at(path, rng.random(), cfg.num_frames, _read_size(cfg), cfg.fps, cfg.backend)
        return clip.frames_THWC, None

    return frames


def _stored(path: str, index: int, cfg: DataConfig) -> _Draw:
    """Our own packed clip; with augmentation at its full side, so that a crop has room."""

    def frames(rng: np.random.Generator | None) -> tuple[np.ndarray, str | None]:
        store = open_store(path)
        frames_THWC = store.frames(index)
        if rng is None or cfg.crop_scale == 1:
            frames_THWC = resize_center_crop(frames_THWC, cfg.size)
        return frames_THWC, store.clips[index].kind

    return frames


def _file(path: Path, cfg: DataConfig) -> _Draw:
    """Anybody's files: a separate process decodes, so a crash or a hang costs one clip."""

    def frames(rng: np.random.Generator | None) -> tuple[np.ndarray, str | None]:
        position = 0.0 if rng is None else rng.random()
        clip = decode_clip_at(path, position, cfg.num_frames, _read_size(cfg), cfg.fps, cfg.backend)
        return clip.frames_THWC, None

    return frames


def _rendered(kind: str, split: str, index: int, cfg: DataConfig) -> _Item:
    """Scene `index`, or with augmentation a fresh one of the same kind or class each time."""
    render, turns, labelled, _ = _RENDERERS[kind]

    def frames(rng: np.random.Generator | None) -> tuple[np.ndarray, str | None]:
        seed = index if rng is None else index + len(turns) * int(rng.integers(1, 2**31))
        return render(seed, split, _read_size(cfg), cfg.num_frames)

    label = turns[index % len(turns)] if labelled else None
    return _Item(f"{kind}/{split}/{index:06d}", label, frames)


def _augment(frames_THWC: np.ndarray, cfg: DataConfig, rng: np.random.Generator) -> np.ndarray:
    if cfg.crop_scale < 1:
        smallest = max(cfg.crop_scale, cfg.size / min(frames_THWC.shape[1:3]))  # never scaled up
        frames_THWC = random_resized_crop(frames_THWC, cfg.size, (smallest, 1.0), rng)
    if cfg.flip and rng.random() < 0.5:
        frames_THWC = horizontal_flip(frames_THWC)
    return frames_THWC
