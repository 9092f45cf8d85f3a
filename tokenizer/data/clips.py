"""Clips for training and measuring: a list of sources -> a ClipDataset with stable names and reproducible draws.

A source is a folder, a video file, a manifest .csv (see video_table.py), a shard .tar (see shards.py), or one of
    bundled:SPLIT         the real clips shipped with the package; SPLIT is train or heldout
    synthetic:SPLIT:N     N rendered scenes of known complexity
    classed:SPLIT:N       N rendered scenes with a class as label: shape, motion, speed; of two colours out of eight
    duotone:SPLIT:N       the same scenes, all of the same two colours
    doom:SPLIT:N          N walks through textured rooms, with the motion as label; SPLIT is train, validation or test
    steady_doom:SPLIT:N   the same with one motion at one speed in each walk (both need the extra [scenes])
    photos:FOLDER:N       N camera moves over the photographs in a folder, see photo_scenes.py
    FILE.safetensors:N    N clips that pack.py has rendered or decoded before, or without :N all
and each of these may end in A-B in place of N: number A up to B - 1 alone, as in bundled:train:0-84.

Different clips have different names: if two sources share a name, all names of the later one end in "#2" (its number).
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
import torch

from tokenizer.common.cli import MOST_FPS
from tokenizer.common.clip_shape import plain_size, sides
from tokenizer.common.device import rng_for, to_video
from tokenizer.common.errors import UserError
from tokenizer.data.files import Span
from tokenizer.data.safe_decode import fingerprint_of
from tokenizer.data.sources import (
    RENDERED_KINDS,
    BundledClips,
    RenderedScenes,
    Source,
    Wanted,
    find_sources_of,
    name_hashes,
    size_to_read,
)
from tokenizer.data.video_io import VideoError, horizontal_flip, random_resized_crop

RENDERED = tuple(f"{kind}/" for kind in RENDERED_KINDS)  # how the names of rendered scenes begin
NO_FILE = ""  # the fingerprint of a clip that comes from no file of the user's

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class DataConfig:
    """Which clips there are and what happens to them on the way.

    fps: None keeps the files' own rate. augment: random start, flip and crop, and fresh synthetic scenes every epoch;
    with a given fps the random start may lie between two frames of that rate, so all frames of a file are used.
    crop_scale: smallest side of the random crop, as a part of the short side; 1.0 is the centre crop.
    repeat: how often each source counts in an epoch; empty is once each.
    """

    sources: list[str] = field(default_factory=lambda: ["bundled:train"])
    num_frames: int = 16
    size: Any = 128  # pixels: one number for a square, or [height, width]
    fps: float | None = None
    augment: bool = True
    crop_scale: float = 1.0
    flip: bool = True
    backend: str = "pyav"
    repeat: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = plain_size(self.size, "data.size")


def check_used(data: DataConfig, val_data: DataConfig) -> None:
    """UserError for settings of a training's data that nothing would use, or that validate another task."""
    for name, section in (("data", data), ("val_data", val_data)):
        if section.crop_scale != 1 and not section.augment:
            raise UserError(
                f"{name}.crop_scale={section.crop_scale} is not used if {name}.augment=false: set {name}.crop_scale=1"
            )
    if val_data.fps != data.fps:
        raise UserError(f"val_data.fps={val_data.fps} is not data.fps={data.fps}: set both to the same")


@dataclass(frozen=True)
class ClipSample:
    """One clip, uint8 [C, T, H, W]. `kind` is known of rendered scenes, `label` of labelled files.

    `unreadable` names the files (with reasons) that were met before this clip was found in their stead.
    """

    frames_CTHW: torch.Tensor
    name: str
    label: str | None
    kind: str | None
    unreadable: dict[str, str]

    @property
    def video_CTHW(self) -> torch.Tensor:
        """float32 [C, T, H, W] in [0, 1]."""
        return to_video(self.frames_CTHW, "cpu")


class Column(Sequence[T], Generic[T]):
    """A column of the data set, a name or a label for each clip, computed on reading."""

    def __init__(self, length: int, read: Callable[[int], T]) -> None:
        self._length, self._read = length, read

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return self._read(index % self._length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Part(NamedTuple):
    """A source, how often an epoch goes through it, and what its names end in."""

    source: Source
    times: int = 1
    tag: str = ""


class ClipDataset:
    """A fixed, ordered list of clips; `get(index, epoch)` depends on (seed, epoch, index) alone.

    order: numbers of the clips of `parts` that make the list; None takes all. Everything here is small or an array: a
    worker process gets it by fork or by pickling, whichever way Python starts one.
    quarantine: name -> reason of every file that could not be read so far in this process (the loader adds those of
    its workers). Each is reported once, never tried again, and replaced by the next readable clip in the list.
    """

    def __init__(self, cfg: DataConfig, seed: int, parts: Sequence[Part], order: np.ndarray | None = None) -> None:
        self.cfg = cfg
        self.quarantine: dict[str, str] = {}
        self._seed = seed
        self._parts = tuple(parts)
        self._starts = [0, *accumulate(len(part.source) * part.times for part in parts)]
        self._order = order
        self._noted: set[str] = set()
        size = size_to_read(cfg.size, cfg.crop_scale, cfg.augment)
        self._wanted = Wanted(cfg.num_frames, size, cfg.fps, cfg.backend, cfg.augment and cfg.crop_scale < 1)

    def __len__(self) -> int:
        return self._starts[-1] if self._order is None else len(self._order)

    @property
    def names(self) -> Sequence[str]:
        """Of each clip; equal only for the same clip listed twice."""
        return Column(len(self), self._name)

    @property
    def labels(self) -> Sequence[str | None]:
        """Of each clip; None if it has none."""
        return Column(len(self), self._label)

    def file(self, index: int) -> tuple[Path, Span | None] | None:
        """The user's file that holds a clip, and which part of it; None for clips of ours."""
        part, number = self._locate(index)
        return part.source.file(number)

    def fingerprint(self, index: int) -> str:
        """Of the content of its file, see `files.fingerprint`; `NO_FILE` for clips of ours. VideoError if it fails."""
        file = self.file(index)
        return NO_FILE if file is None else fingerprint_of(*file)

    def get(self, index: int, epoch: int = 0) -> ClipSample:
        """Clip `index`, or the next readable one. UserError if not a single clip of the set can be read."""
        unreadable: dict[str, str] = {}
        for step in range(len(self)):
            place = (index + step) % len(self)
            name = self.names[place]
            if name in self.quarantine:
                continue
            try:
                return self._read(place, epoch, unreadable)
            except VideoError as error:
                unreadable[name] = error.reason
                self.put_aside(unreadable)
        name, reason = next(iter(self.quarantine.items()))
        raise UserError(f"{', '.join(self.cfg.sources)}: not one of {len(self)} clips can be read ({name}: {reason})")

    def get_this(self, index: int, epoch: int = 0) -> ClipSample:
        """Clip `index` itself, for work in which no other can replace it; VideoError if it is unreadable.

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

    def first(self, num_clips: int) -> ClipDataset:
        """The first clips of the list, at most `num_clips`, as a set of their own."""
        order = np.arange(self._starts[-1]) if self._order is None else self._order
        return ClipDataset(self.cfg, self._seed, self._parts, order[:num_clips])

    def put_aside(self, unreadable: dict[str, str]) -> None:
        """Enter files into the quarantine, each reported the first time."""
        for name, reason in unreadable.items():
            if name not in self.quarantine:
                self.quarantine[name] = reason
                log.warning("skipped %s: %s (%d unreadable so far)", name, reason, len(self.quarantine))

    def _read(self, index: int, epoch: int, unreadable: dict[str, str]) -> ClipSample:
        part, number = self._locate(index)
        rng = rng_for(self._seed, "clip", epoch, index) if self.cfg.augment else None
        name, label = part.source.name(number) + part.tag, part.source.label(number)
        frames_THWC, kind, notes = part.source.draw(number, self._wanted, rng)
        self._report(name, notes)
        if rng is not None:
            frames_THWC = _augment(frames_THWC, self.cfg, rng)
        frames_CTHW = torch.from_numpy(np.ascontiguousarray(frames_THWC.transpose(3, 0, 1, 2)))
        return ClipSample(frames_CTHW, name, label, kind, unreadable)

    def _locate(self, index: int) -> tuple[Part, int]:
        """The part that holds a clip, and the clip's number in it."""
        place = int(index if self._order is None else self._order[index])
        number = bisect_right(self._starts, place) - 1
        part = self._parts[number]
        return part, (place - self._starts[number]) % len(part.source)

    def _name(self, index: int) -> str:
        part, number = self._locate(index)
        return part.source.name(number) + part.tag

    def _label(self, index: int) -> str | None:
        part, number = self._locate(index)
        return part.source.label(number)

    def _report(self, name: str, notes: Sequence[str]) -> None:
        """Warn of unsupported features of videos, once of each kind in a process."""
        for note in notes:
            kind = note.partition(":")[0]
            if kind not in self._noted:
                self._noted.add(kind)
                log.warning("%s: %s (further clips with this are not reported)", name, note)


def build_dataset(cfg: DataConfig, seed: int = 0) -> ClipDataset:
    """List the clips of all sources. UserError for a source that does not exist, is empty or is misspelt."""
    return ClipDataset(cfg, seed, [part for parts in _build(cfg) for part in parts])


def build_datasets(cfg: DataConfig, seed: int = 0) -> list[ClipDataset]:
    """The same as one data set for each source, in order; a source of repeat 0 gives an empty one."""
    return [ClipDataset(replace(cfg, sources=[s]), seed, p) for s, p in zip(cfg.sources, _build(cfg), strict=True)]


def _build(cfg: DataConfig) -> list[list[Part]]:
    """The parts of each source, with tags that keep different clips apart."""
    _check(cfg)
    repeats = cfg.repeat or [1] * len(cfg.sources)
    parts: list[list[Part]] = []
    for number, (name, times) in enumerate(zip(cfg.sources, repeats, strict=True), start=1):
        found = find_sources_of(name, cfg.num_frames, cfg.size)
        before = [part.source for others in parts for part in others]
        tag = f"#{number}" if any(_share_a_name(a, b) for a in before for b in found) else ""
        parts.append([Part(source, times, tag) for source in found])
    if not any(part.times * len(part.source) for found in parts for part in found):
        raise UserError(f"data.sources={cfg.sources} with data.repeat={cfg.repeat} holds no clip; add a source")
    return parts


def _share_a_name(a: Source, b: Source) -> bool:
    """Whether two different clips would have the same name."""
    _, places_a, places_b = np.intersect1d(name_hashes(a), name_hashes(b), return_indices=True)
    return any(not _is_same(a, int(i), b, int(j)) for i, j in zip(places_a, places_b, strict=True))


def _is_same(a: Source, i: int, b: Source, j: int) -> bool:
    """Whether two clips of the same name are the same clip."""
    if (file := a.file(i)) is not None:
        return file == b.file(j)
    return type(a) is type(b) and (isinstance(a, BundledClips | RenderedScenes) or a == b)


def _check(cfg: DataConfig) -> None:
    if cfg.repeat and (len(cfg.repeat) != len(cfg.sources) or min(cfg.repeat) < 0):
        raise UserError(f"data.repeat={cfg.repeat} must hold one count >= 0 for each of the {len(cfg.sources)} sources")
    if not 0 < cfg.crop_scale <= 1:
        raise UserError(f"data.crop_scale={cfg.crop_scale} must lie above 0 and not above 1.0 (1.0 is the centre crop)")
    if cfg.num_frames < 1:
        raise UserError(f"data.num_frames={cfg.num_frames} must be at least 1")
    if cfg.fps is not None and not 0 < cfg.fps <= MOST_FPS:
        raise UserError(
            f"data.fps={cfg.fps} must be above 0 and at most {MOST_FPS}; leave it out for the rate of the files"
        )


def _augment(frames_THWC: np.ndarray, cfg: DataConfig, rng: np.random.Generator) -> np.ndarray:
    if cfg.crop_scale < 1:
        (height, width), (rows, columns) = frames_THWC.shape[1:3], sides(cfg.size)
        smallest = max(cfg.crop_scale, rows / height, columns / width)  # never scaled up
        frames_THWC = random_resized_crop(frames_THWC, cfg.size, (smallest, 1.0), rng)
    if cfg.flip and rng.random() < 0.5:
        frames_THWC = horizontal_flip(frames_THWC)
    return frames_THWC
