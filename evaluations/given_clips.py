"""Clips that another program made (`--ours`): which file belongs to which clip of the list, and their frames.

Frames come from arrays or from lossless video. An ordinary mp4 leaves even the original at 33 dB.

Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np

from evaluations.clip_list import ClipList, ListedClip, fingerprint
from evaluations.protocols import Protocol
from evaluations.system import Draft, Made, Source
from tokenizer.common.clip_shape import sides
from tokenizer.common.errors import UserError
from tokenizer.common.schema import read_json
from tokenizer.data.video_io import VIDEO_SUFFIXES, VideoError, display_name, read_clip

_LOSSLESS_CODECS = ("ffv1", "ffvhuff", "huffyuv", "utvideo", "rawvideo", "png", "qoi")
_X264_OPTIONS = re.compile(rb"x264 - core.*? options: ([^\0]*)")
_HEADER_BYTES = 1 << 16  # x264 writes its options into the first picture


def find_frames(folder: str | Path) -> list[Path]:
    """Clips in a folder, 2 before 10: the samples of a sampling command, else its .npy and video files."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{display_name(root)}: no such folder of clips")
    found = list(root.glob("samples/*/frames.npy"))
    if not found:
        found = [p for p in root.iterdir() if p.suffix.lower() in (".npy", *VIDEO_SUFFIXES) and p.name[0] != "."]
    if not found:
        raise UserError(f"{display_name(root)}: holds no .npy and no video; give a folder of lossless clips")
    if strange := [path for path in found if not path.is_file()]:
        raise UserError(f"{display_name(strange[0])}: is not a regular file")
    return sorted(found, key=lambda path: natural(str(path.relative_to(root))))


def natural(name: str) -> tuple[list[str | int], str]:
    """Key of the order in which 2 comes before 10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def sample_record(path: Path) -> dict[str, Any]:
    """What a sampling command wrote beside its frames; empty for a clip from elsewhere."""
    file = path.with_name("record.json")
    if path.name != "frames.npy" or not file.is_file():
        return {}
    record = read_json(file, {}, "sample it again")
    if not isinstance(record.get("name", ""), str):
        raise UserError(f"{display_name(file)}: is not the record of a sample")
    return record


def read_frames(path: Path, num_frames: int, force: bool = False) -> np.ndarray:
    """uint8 [T, H, W, 3] of a .npy file or a lossless video.

    Raises UserError for another array, for a clip of another length, and for lossy video unless `force`.
    """
    if path.suffix.lower() == ".npy":
        try:
            frames_THWC = np.load(path, mmap_mode="r", allow_pickle=False)  # a header may claim any size
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{display_name(path)}: cannot be read as an array ({error})") from error
        length = str(len(frames_THWC)) if frames_THWC.ndim else "0"
    else:
        if not force and (why := why_lossy(path)):
            raise UserError(
                f"{display_name(path)}: is not lossless ({why}), so a score would measure the codec too; write "
                ".npy, FFV1 or write_video(lossless=True), or give --force"
            )
        clip = read_clip(path, 0, num_frames + 1)  # one more shows whether the file goes on
        frames_THWC = clip.frames_THWC[: num_frames + 1 - clip.num_padded]
        length = str(len(frames_THWC)) if clip.num_padded else f"more than {num_frames}"
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3:
        raise UserError(
            f"{display_name(path)}: holds {frames_THWC.dtype} {frames_THWC.shape}, not uint8 frames [T, H, W, 3]"
        )
    if len(frames_THWC) != num_frames:
        raise UserError(f"{display_name(path)}: holds {length} frames, the protocol scores {num_frames}")
    return np.array(frames_THWC)  # in memory, and writable


def why_lossy(path: Path) -> str | None:
    """Why a video may not hold the frames that were written into it; None for a lossless one."""
    try:
        with av.open(str(path.absolute()), options={"protocol_whitelist": "file"}) as container:
            stream = container.streams.video[0]
            codec, pixels = stream.codec_context.name, stream.codec_context.pix_fmt or "unknown"
            packet = next(iter(container.demux(stream)))
            head = (stream.codec_context.extradata or b"") + bytes(packet)[:_HEADER_BYTES]
    except (av.FFmpegError, IndexError, OSError, StopIteration) as error:
        raise VideoError(path, f"cannot be opened ({error})") from error
    if not (pixels.startswith(("gbr", "rgb", "bgr", "0rgb", "argb", "abgr"))):
        return f"its pixels are {pixels}, not RGB"
    if codec in _LOSSLESS_CODECS:
        return None
    options = _X264_OPTIONS.search(head)
    if codec == "h264" and options and re.search(rb"\brc=cqp\b.*\bqp=0\b", options[1]):
        return None
    return f"codec {codec} without a sign of quantiser 0"


class GivenClips:
    """The system behind `--ours`: it reads clips from a folder.

    If each clip has an original, files and clips are paired (see `pair`). For a distance of sets no pairs are needed;
    the class of each sample goes into its record.
    """

    def __init__(self, folder: str, clips: ClipList, protocol: Protocol, force: bool) -> None:
        """UserError if the folder holds another number of clips, or it is not clear which file belongs to which."""
        self.num_frames, self.sides, self.force = protocol.num_frames, sides(protocol.size), force
        files = find_frames(folder)
        if len(files) != len(clips.clips):
            raise UserError(f"{folder}: holds {len(files)} clips for the {len(clips.clips)} of the protocol")
        records = [sample_record(file) for file in files]
        if protocol.paired:
            order = pair(folder, files, records, clips.clips)
            files, records = [files[i] for i in order], [records[i] for i in order]
        self.files, self.records = files, records

    def facts(self) -> dict[str, Any]:
        """The folder by the content of its files, in the order of the clips."""
        listing = json.dumps([[file.name, fingerprint(file)] for file in self.files])
        return {"folder": hashlib.sha256(listing.encode()).hexdigest()[:16], "forced_lossy": self.force}

    def stream(self, sources: Iterable[Source]) -> Iterator[Draft]:
        return map(Draft, sources)

    def finish(self, drafts: Sequence[Draft]) -> list[Made]:
        return [self._read(draft.source) for draft in drafts]

    def _read(self, source: Source) -> Made:
        file = self.files[source.clip.index]
        sampled = self.records[source.clip.index].get("class_name")
        frames_THWC = read_frames(file, self.num_frames, self.force)
        if frames_THWC.shape[1:3] != self.sides:
            (height, width), (rows, columns) = frames_THWC.shape[1:3], self.sides
            raise UserError(
                f"{display_name(file)}: holds frames of {height}x{width} pixels, the protocol's have {rows}x{columns}"
            )
        return Made(source, frames_THWC, {"sampled_class": sampled} if sampled else {})


def pair(
    folder: str, files: Sequence[Path], records: Sequence[dict[str, Any]], clips: Sequence[ListedClip]
) -> list[int]:
    """For each clip the place of its file: by name if all names agree, else by place in natural order.

    Names agree if every file is named after a clip: its path without suffix (/ written as _), or its file name alone,
    with @START for a window; a sample names its source in its record. UserError if only some names agree, and if the
    list is not in natural order, since the files may follow either order.
    """
    theirs = [
        _forms(str(record.get("file") or record.get("name")), record.get("start")) if record else [file.stem] * 4
        for file, record in zip(files, records, strict=True)
    ]
    ours = [_names_of_clip(clip) for clip in clips]
    for form in range(len(ours[0])):
        place = {names[form]: i for i, names in enumerate(theirs)}
        wanted = [names[form] for names in ours]
        if len(place) == len(files) and set(wanted) == place.keys():
            return [place[name] for name in wanted]
    known = {name for names in ours for name in names}
    strange = [file for file, names in zip(files, theirs, strict=True) if not known & set(names)]
    if sampled := [record for record in records if record]:
        raise UserError(
            f"{folder}: the samples are not of the clips of this protocol ({sampled[0].get('name')} continues "
            f"{sampled[0].get('file') or 'no clip'}); evaluate the GPT itself (--gpt-ckpt) under this protocol"
        )
    if 0 < len(strange) < len(files):
        raise UserError(
            f"{folder}: {len(files) - len(strange)} files are named after clips of the protocol, {strange[0].name} is "
            "not; name each file after its clip (per_clip.csv of another evaluation lists the names), or none"
        )
    if not strange:
        raise UserError(
            f"{folder}: the names of the files do not tell which clip each belongs to; name each file after its clip "
            "(per_clip.csv of another evaluation lists the names)"
        )
    in_order = sorted(clips, key=lambda clip: natural(clip.name))
    if different := [(a, b) for a, b in zip(clips, in_order, strict=True) if a is not b]:
        raise UserError(
            f"{folder}: the names of the files are not those of the clips, and the list is not in natural order "
            f"(clip {different[0][0].index} is {different[0][0].name}, by name {different[0][1].name}), so it is open "
            f"which file belongs to which clip; name each file after its clip, {Path(clips[0].name).stem}.npy and so on"
        )
    return list(range(len(files)))


def _names_of_clip(clip: ListedClip) -> list[str]:
    name, at, start = clip.name.rpartition("@")
    path = name if at and start == str(clip.start) else clip.name
    return _forms(path, clip.start)


def _forms(path: str, start: Any) -> list[str]:
    """Four ways to name a clip, the most exact first."""
    pure = PurePosixPath(path)
    stem = pure.with_suffix("") if pure.suffix.lower() in (".npy", *VIDEO_SUFFIXES) else pure
    full, short = str(stem).replace("/", "_"), stem.name
    return [f"{full}@{start}", f"{short}@{start}", full, short]
