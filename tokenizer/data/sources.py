"""What a data source gives: its clips by number. One small picklable object a source, none a clip.

`find_source` reads the spelling (see `clips.py`); `RENDERED_KINDS` lists the kinds that are computed and not read.
Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from tokenizer.common.checkpoint import file_sha256
from tokenizer.common.clip_shape import Size, sides, size_text
from tokenizer.common.errors import UserError
from tokenizer.data.clip_store import is_store, open_store
from tokenizer.data.files import SPLITS, BundledVideo, Span, bundled_videos, display_name, list_videos
from tokenizer.data.safe_decode import decode_clip_at
from tokenizer.data.video_io import DecodedClip, iter_clips, read_clip_at, resize_center_crop
from tokenizer.data.video_table import (
    KEPT_BYTES,
    Strings,
    VideoTable,
    is_shard_source,
    kept_table,
    read_rows,
    shard_files,
    shard_table,
)


class Renderer(NamedTuple):
    """How a scene is rendered from (seed, split, size, frames), and what takes turns in consecutive seeds."""

    render: Callable[[int, str, int, int], tuple[np.ndarray, str]]
    turns: Sequence[str]
    labelled: bool  # whether these are classes
    splits: Sequence[str] = SPLITS


_RENDERING = threading.Lock()  # threads read ahead, and an engine has one camera
# version of the renderers; raise it if a seed renders another scene, classed ones included: old tables are then refused
SCENES = 5
RENDERED_KINDS = ("synthetic", "classed", "duotone", "doom", "steady_doom")


@functools.cache
def renderer_of(kind: str) -> Renderer:
    """The renderer of one of RENDERED_KINDS. Its module is imported here, so that a run on files needs none of them."""
    if kind == "synthetic":
        from tokenizer.data.scenes import KINDS, render_scene

        return Renderer(render_scene, KINDS, labelled=False)
    if kind in ("classed", "duotone"):
        from tokenizer.data.classed_scenes import CLASS_NAMES, render_classed_scene, render_duotone_scene

        render = render_classed_scene if kind == "classed" else render_duotone_scene
        return Renderer(render, CLASS_NAMES, labelled=True)
    from tokenizer.data import doom

    if kind == "doom":
        return Renderer(doom.render_doom_walk, doom.MOTIONS, labelled=True, splits=doom.SPLITS)
    return Renderer(doom.render_steady_walk, doom.STEADY_MOTIONS, labelled=True, splits=doom.SPLITS)


class Wanted(NamedTuple):
    """The form of the clips: frames, size of the picture that is decoded, frame rate, video reader.

    cropped: whether a random crop follows, which a stored clip then leaves room for.
    """

    num_frames: int
    size: Size
    fps: float | None
    backend: str
    cropped: bool


class Drawn(NamedTuple):
    """uint8 [T, H, W, C], the kind of a rendered scene, and unsupported features of the file."""

    frames_THWC: np.ndarray
    kind: str | None = None
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """The clips of one source, numbered from 0."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Unique within the source, but for files that are listed twice."""
        ...

    def label(self, number: int) -> str | None: ...

    def file(self, number: int) -> tuple[Path, Span | None] | None:
        """The user's file that holds a clip; None for clips of ours."""
        ...

    def draw(self, number: int, wanted: Wanted, rng: np.random.Generator | None) -> Drawn:
        """The plain clip, or with a generator a random one of the video or scene. VideoError if it cannot be read."""
        ...


@dataclass(frozen=True)
class VideoFiles:
    """Files of a folder or a manifest, or members of a tar file. A separate process decodes them."""

    folder: Path
    table: VideoTable

    def __len__(self) -> int:
        return len(self.table)

    def name(self, number: int) -> str:
        if self.table.keys is None:
            return display_name(self.table.path(number))
        return f"{display_name(Path(self.table.path(number)).name)}/{self.table.keys[number]}"

    def label(self, number: int) -> str | None:
        return self.table.label(number)

    def file(self, number: int) -> tuple[Path, Span | None]:
        return self.folder / self.table.path(number), self.table.span(number)

    def draw(self, number: int, wanted: Wanted, rng: np.random.Generator | None) -> Drawn:
        path, span = self.file(number)
        position = 0.0 if rng is None else rng.random()
        clip = decode_clip_at(
            path, position, wanted.num_frames, wanted.size, wanted.fps, wanted.backend, any_phase=rng is not None,
            span=span,
        )  # fmt: skip
        return Drawn(clip.frames_THWC, None, clip.notes)


@dataclass(frozen=True)
class BundledClips:
    """The clips that come with the package. They are trusted and decoded in this process."""

    split: str
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, number: int) -> str:
        return f"bundled/{self._video(number).path.name}"

    def label(self, number: int) -> str | None:
        return self._video(number).label

    def file(self, number: int) -> None:
        return None

    def draw(self, number: int, wanted: Wanted, rng: np.random.Generator | None) -> Drawn:
        path = self._video(number).path
        clip: DecodedClip
        if rng is None:
            clip = next(iter_clips(path, wanted.num_frames, wanted.size, wanted.fps, backend=wanted.backend))
        else:
            clip = read_clip_at(
                path, rng.random(), wanted.num_frames, wanted.size, wanted.fps, wanted.backend, any_phase=True
            )
        return Drawn(clip.frames_THWC)

    def _video(self, number: int) -> BundledVideo:
        return bundled_videos(self.split)[self.numbers[number]]


@dataclass(frozen=True)
class RenderedScenes:
    """Scenes of one kind; with a generator a fresh scene of the same kind or class each time."""

    kind: str
    split: str
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, number: int) -> str:
        return f"{self.kind}/{self.split}/{self.numbers[number]:06d}"

    def label(self, number: int) -> str | None:
        renderer = renderer_of(self.kind)
        return renderer.turns[self.numbers[number] % len(renderer.turns)] if renderer.labelled else None

    def file(self, number: int) -> None:
        return None

    def draw(self, number: int, wanted: Wanted, rng: np.random.Generator | None) -> Drawn:
        renderer, seed = renderer_of(self.kind), self.numbers[number]
        if rng is not None:
            seed += len(renderer.turns) * int(rng.integers(1, 2**31))
        with _RENDERING:
            frames_THWC, kind = renderer.render(seed, self.split, max(sides(wanted.size)), wanted.num_frames)
        return Drawn(resize_center_crop(frames_THWC, wanted.size), kind)  # scenes are square


@dataclass(frozen=True)
class PhotoScenes:
    """Camera moves over the photographs of a folder; with a generator a fresh scene of the same motion each time."""

    folder: Path
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, number: int) -> str:
        return f"photos/{display_name(Path(self.folder.name))}/{self.numbers[number]:06d}"

    def label(self, number: int) -> None:
        return None

    def file(self, number: int) -> None:
        return None

    def draw(self, number: int, wanted: Wanted, rng: np.random.Generator | None) -> Drawn:
        from tokenizer.data.photo_scenes import MOTIONS, load_photos, render_photo_scene

        seed = self.numbers[number] + (0 if rng is None else len(MOTIONS) * int(rng.integers(1, 2**31)))
        photos = load_photos(self.folder)
        frames_THWC, kind = render_photo_scene(seed, photos, max(sides(wanted.size)), wanted.num_frames)
        return Drawn(resize_center_crop(frames_THWC, wanted.size), kind)  # scenes are square


@dataclass(frozen=True)
class StoredClips:
    """Clips of a file that `pack.py` wrote, at the size they were packed with."""

    path: str
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, number: int) -> str:
        return open_store(self.path).clips[self.numbers[number]].name

    def label(self, number: int) -> str | None:
        return open_store(self.path).clips[self.numbers[number]].label

    def file(self, number: int) -> None:
        return None

    def draw(self, number: int, wanted: Wanted, rng: np.random.Generator | None) -> Drawn:
        store = open_store(self.path)
        frames_THWC = store.frames(self.numbers[number])
        if rng is None or not wanted.cropped:
            frames_THWC = resize_center_crop(frames_THWC, wanted.size)
        return Drawn(frames_THWC, store.clips[self.numbers[number]].kind)


def find_sources_of(source: str, num_frames: int, size: Size) -> list[Source]:
    """The clips that a spelling names, see `clips.py`; a row of shards gives one source each.

    num_frames, size: what a packed file must hold. Raises UserError for a source that does not exist or is misspelt.
    """
    if not source.strip():
        raise UserError(f"data source {source!r} is empty: name a folder, a file or a built-in source")
    kind = source.partition(":")[0]
    if kind == "bundled":
        return [BundledClips(*_part(source))]
    if kind in RENDERED_KINDS:
        return [RenderedScenes(kind, *_part(source))]
    if kind == "photos":
        return [_photos(source)]
    if is_store(source) or is_store(source.rpartition(":")[0]):
        return [_stored(source, num_frames, size)]
    if is_shard_source(source):
        return [VideoFiles(Path("/"), shard_table(file)) for file in shard_files(source)]
    path = Path(source)
    if path.suffix.lower() == ".csv":
        return [VideoFiles(path.absolute().parent, manifest_table(path))]
    folder = path.absolute().parent  # names begin with the folder or file that was given
    videos = (str(video.absolute().relative_to(folder)) for video in list_videos(path))
    return [VideoFiles(folder, VideoTable.of((video, "", "", None) for video in videos))]


def manifest_table(manifest: Path) -> VideoTable:
    """The rows of a manifest. Whether the files are there shows when they are read."""

    def build() -> VideoTable:
        return VideoTable.of((row.path, row.label, "", None) for row in read_rows(manifest))

    if not manifest.is_file() or manifest.stat().st_size < KEPT_BYTES:
        return build()
    return kept_table(manifest, file_sha256(manifest)[:16], build)


def name_hashes(source: Source) -> np.ndarray:
    """uint64, one for each clip: equal for equal names."""
    if isinstance(source, VideoFiles) and source.table.keys is None:
        return source.table.paths.hashes()
    return Strings.of(source.name(number) for number in range(len(source))).hashes()


def size_to_read(size: Size, crop_scale: float, augment: bool) -> Size:
    """Of the picture that is decoded: just large enough that a random crop of it is never scaled up."""
    return [math.ceil(side / crop_scale) for side in sides(size)] if augment else size


def _part(source: str) -> tuple[str, range]:
    """ "kind:split:N" or "kind:split:A-B" -> the split and the numbers of its clips; "bundled:split" has all."""
    kind = source.partition(":")[0]
    splits = renderer_of(kind).splits if kind in RENDERED_KINDS else SPLITS
    match = re.fullmatch(rf"(\w+):({'|'.join(splits)})(?::(?:(\d{{1,12}})-)?(\d{{1,12}}))?", source)
    if match and (match[4] or kind == "bundled"):
        last = len(bundled_videos(match[2])) if kind == "bundled" else int(match[4])
        numbers = range(int(match[3] or 0), min(last, int(match[4] or last)))
        if numbers:
            return match[2], numbers
    plain = ", ".join(f"{kind}:{split}" + (":N" if kind in RENDERED_KINDS else "") for split in splits)
    raise UserError(f"data source {source!r}: expected {plain} or {kind}:train:A-B (number A up to B - 1)")


def _photos(source: str) -> PhotoScenes:
    """ "photos:FOLDER:N" or "photos:FOLDER:A-B"."""
    match = re.fullmatch(r"photos:(.+):(?:(\d{1,12})-)?(\d{1,12})", source)
    numbers = range(int(match[2] or 0), int(match[3])) if match else range(0)
    if match is None or not numbers:
        raise UserError(f"data source {source!r}: expected photos:FOLDER:N or photos:FOLDER:A-B (number A up to B - 1)")
    if not Path(match[1]).is_dir():
        raise UserError(f"data source {source!r}: {match[1]} is not a folder")
    return PhotoScenes(Path(match[1]).absolute(), numbers)


def _stored(source: str, num_frames: int, size: Size) -> StoredClips:
    """Clips of a packed file, all or those of "FILE:N" or "FILE:A-B"."""
    path, _, part = (source, "", "") if is_store(source) else source.rpartition(":")
    store = open_store(path)
    match = re.fullmatch(r"(?:(\d{1,12})-)?(\d{1,12})", part or str(len(store)))
    numbers = range(int(match[1] or 0), int(match[2])) if match else range(0)
    if not numbers or numbers[-1] >= len(store):
        raise UserError(f"data source {source!r}: {path} holds {len(store)} clips; expected {path}:N or {path}:A-B")
    frames, *stored = store.shape
    if frames != num_frames or any(side < least for side, least in zip(stored, sides(size), strict=True)):
        raise UserError(
            f"{path} holds clips of {frames} frames of {stored[0]}x{stored[1]}, not {num_frames} of at least "
            f"{size_text(size)}: pack it with --num-frames {num_frames} --size {size_text(size)}"
        )
    return StoredClips(path, numbers)
