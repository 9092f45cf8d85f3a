"""Clips kept in one file, so that they are rendered or decoded once.

A store is a .safetensors file that `pack.py` writes and that is itself a data source. Raw, every pixel is kept (16
frames of 72x72: 249 KB a clip), and a read copies one clip from the mapped file. Compressed, each clip is H.264 in full
colour (crf 21: about 5 KB a clip of 72x72 and 37 dB), and a read decodes it in this process: read only stores that you
trust. Frames that equal the one before are stored once, so a paused camera still shows equal frames. The header holds
the names, labels and kinds of the clips, the sources they were made of, and the sha256 of the data and of all this.
Each clip has a checksum that is compared whenever it is read (45 microseconds of CPU for 249 KB).

`FrameCache` keeps decoded clips of a training that sees the same clips in every epoch. Its file is sparse and fills as
clips are decoded; all processes of a machine, and later runs, read it through the page cache. Each clip has a checksum:
one that was half written when a run was killed is decoded again. Plain reads, not a mapping: a clip of 249 KB takes 46
microseconds of CPU, mapped 33, decoded some 20,000, and a page of a mapping that cannot be read ends the process.

Letters: N clips, T frames, C colours, H W rows and columns.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from tokenizer.common.checkpoint import write_tensors, written_aside
from tokenizer.common.errors import UserError
from tokenizer.common.schema import check_fields, parse_json
from tokenizer.data.files import VideoError, open_regular

_KIND, _MOST_HEADER = "clip_store", 100 << 20  # bytes; as the library has it
_WRITTEN_BY = "python -m tokenizer.data.pack writes one"
_FIELDS = {"clips": list[list], "sources": list[str], "versions": dict, "sha256": str}


@dataclass(frozen=True)
class StoredClip:
    """What a store keeps of a clip beside its frames."""

    name: str
    label: str | None
    kind: str | None


class ClipStore:
    """An open store: `clips`, and `frames(index)`. UserError for a file that is none."""

    def __init__(self, path: str | Path) -> None:
        header, start = _read_header(Path(path))
        facts = parse_json(str(header["__metadata__"][_KIND]), str(path), _WRITTEN_BY)
        check_fields(facts, _FIELDS, str(path), _WRITTEN_BY)
        self.path = str(path)
        try:
            self.clips = [StoredClip(*clip) for clip in facts["clips"]]
            self._parts = _map_parts(Path(path), header, start)
            _check_parts(self._parts, len(self.clips))
            if facts.get("header_sha256") not in (None, _header_digest(facts)):
                raise ValueError("its header differs from its sha256")
            if "checksums" not in self._parts and self.digest() != facts["sha256"]:  # a file of before them
                raise ValueError("its clips differ from their sha256")
        except (
            KeyError,
            TypeError,
            ValueError,
            OverflowError,
            OSError,
        ) as error:  # a cut file is shorter than its header promises
            raise UserError(f"{path}: damaged clip store ({error}); {_WRITTEN_BY}") from error
        self.sources: list[str] = facts["sources"]
        self.versions: dict[str, Any] = facts["versions"]
        self.sha256: str = facts["sha256"]

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        num_frames, height, width = self.frames(0).shape[:3]
        return num_frames, height, width

    def frames(self, index: int) -> np.ndarray:
        """Clip `index`: uint8 [T, H, W, C]. VideoError if it is damaged."""
        data = _stored(self._parts, index)
        if "checksums" in self._parts and self._parts["checksums"][index] != _checksum(data):
            raise VideoError(self.path, f"clip {index} is damaged: its bytes differ from their checksum")
        return data if "frames" in self._parts else _decode(data.tobytes())[self._parts["shown"][index]]

    def digest(self) -> str:
        """sha256 of the frames, or of the packets, as they are in the file now."""
        return _digest({name: np.asarray(part) for name, part in self._parts.items()})


@functools.lru_cache(maxsize=8)
def open_store(path: str) -> ClipStore:
    """The store at `path`, opened once by each process."""
    return ClipStore(path)


def is_store(source: str) -> bool:
    return source.lower().endswith(".safetensors")


def write_raw(path: Path, frames_NTHWC: np.ndarray, clips: Sequence[StoredClip], facts: dict[str, Any]) -> None:
    """uint8 frames (a memory map may be larger than memory) and their names, labels and sources."""
    _write(path, {"frames": frames_NTHWC}, clips, facts)


def write_compressed(
    path: Path, encoded: Sequence[tuple[bytes, list[int]]], clips: Sequence[StoredClip], facts: dict[str, Any]
) -> None:
    """Clips as `compress` returns them."""
    parts: dict[str, np.ndarray] = {
        "packets": np.frombuffer(bytearray().join(data for data, _ in encoded), np.uint8),
        "ends": np.cumsum([0, *(len(data) for data, _ in encoded)]).astype(np.int64),
        "shown": np.asarray([shown for _, shown in encoded], np.int64),
    }
    _write(path, parts, clips, facts)


def compress(frames_THWC: np.ndarray, crf: int) -> tuple[bytes, list[int]]:
    """H.264 of the frames that differ from the one before, and for each frame which of these it shows."""
    new = [True, *(bool((a != b).any()) for a, b in zip(frames_THWC[1:], frames_THWC[:-1], strict=True))]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": str(crf), "preset": "slow"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.thread_count = 1
        for frame_HWC in frames_THWC[np.asarray(new)]:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return _without_banner(buffer.getvalue()), (np.cumsum(new) - 1).tolist()


def _decode(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r", format="h264") as container:
        container.streams.video[0].thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _without_banner(data: bytes) -> bytes:
    """H.264 without x264's note of its own settings, 700 bytes of each clip (SEI units, type 6)."""
    units = data.split(b"\x00\x00\x01")
    kept = [unit for unit in units[1:] if unit[0] & 31 != 6]
    return b"".join(b"\x00\x00\x01" + unit for unit in kept)


def _write(path: Path, parts: dict[str, np.ndarray], clips: Sequence[StoredClip], facts: dict[str, Any]) -> None:
    checksums = [_checksum(_stored(parts, index)) for index in range(len(clips))]
    parts = {**parts, "checksums": np.array(checksums, np.int64)}
    known = {**facts, "clips": [[clip.name, clip.label, clip.kind] for clip in clips], "sha256": _digest(parts)}
    known["header_sha256"] = _header_digest(known)
    tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
    with written_aside(path) as aside:
        write_tensors(aside, tensors, {_KIND: json.dumps(known, sort_keys=True)})


def _stored(parts: Mapping[str, np.ndarray], index: int) -> np.ndarray:
    """The frames or the packets of a clip, copied out of the file."""
    if "frames" in parts:
        return np.array(parts["frames"][index])
    begin, end = parts["ends"][index : index + 2]
    return np.array(parts["packets"][begin:end])


def _check_parts(parts: Mapping[str, np.ndarray], num_clips: int) -> None:
    """KeyError or ValueError if the parts do not fit together."""
    if "frames" in parts:
        fits = parts["frames"].ndim == 5 and len(parts["frames"]) == num_clips
    else:
        ends, shown = parts["ends"], parts["shown"]
        fits = ends.shape == (num_clips + 1,) and shown.ndim == 2 and len(shown) == num_clips
        fits = fits and ends[0] == 0 and ends[-1] == len(parts["packets"]) and bool((np.diff(ends) >= 0).all())
    if not fits or len(parts.get("checksums", range(num_clips))) != num_clips:
        raise ValueError("its parts do not fit together")


def _header_digest(facts: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in facts.items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digest(parts: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(parts[name].data if parts[name].flags.c_contiguous else parts[name].tobytes())
    return digest.hexdigest()


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and the offset of its data."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            known = file.read(length) if length < min(os.path.getsize(path), _MOST_HEADER) else b"{}"
        header = parse_json(known, str(path), _WRITTEN_BY)
        if _KIND in dict(header.get("__metadata__", {})):
            return header, 8 + length
    except VideoError as error:
        raise UserError(f"{path}: {error.reason}; {_WRITTEN_BY}") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a clip store ({error}); {_WRITTEN_BY}") from error
    raise UserError(f"{path}: not a clip store; {_WRITTEN_BY}")


def _map_parts(path: Path, header: dict[str, Any], start: int) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file whose data begins at `start`, memory-mapped."""
    return {
        name: np.memmap(
            path, np.uint8 if part["dtype"] == "U8" else np.int64, "r", start + part["data_offsets"][0],
            tuple(part["shape"]),
        )
        for name, part in header.items()
        if name != "__metadata__"
    }  # fmt: skip


log = logging.getLogger(__name__)


class FrameCache:
    """`num_clips` places for clips of `shape` in `folder`. facts: what decides the pixels; others get another file."""

    def __init__(self, folder: Path, num_clips: int, shape: tuple[int, ...], facts: Mapping[str, Any]) -> None:
        known = json.dumps([num_clips, shape, dict(facts)], sort_keys=True)
        name = hashlib.sha256(known.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.path = folder / f"frames-{name}.u8"
        self._num_clips, self._shape = num_clips, shape
        self._bytes = int(np.prod(shape))
        self._is_full = False

    def get(self, index: int) -> np.ndarray | None:
        """Clip `index`, a copy; None if it is not here."""
        try:
            with open(self.path, "rb") as file:
                file.seek(index * 4)
                (checksum,) = np.frombuffer(file.read(4), np.uint32)
                if not checksum:
                    return None
                file.seek(self._start(index))
                clip = np.fromfile(file, np.uint8, self._bytes)
        except (FileNotFoundError, ValueError):  # not begun, or shorter than its table of checksums
            return None
        return clip.reshape(self._shape) if len(clip) == self._bytes and _checksum(clip) == checksum else None

    def put(self, index: int, clip: np.ndarray) -> None:
        """Keep a clip. On a full disk nothing more is kept, which is logged once."""
        if self._is_full:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, np.ascontiguousarray(clip).data.cast("B"), self._start(index))
                os.pwrite(descriptor, np.uint32(_checksum(clip)).tobytes(), index * 4)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._is_full = True
            log.warning("%s: decoded clips are no longer kept (%s); they are decoded in every epoch", self.path, error)

    def _start(self, index: int) -> int:
        """Offset of a clip: behind the checksums, 4 bytes each, 0 for a missing clip."""
        return self._num_clips * 4 + index * self._bytes


def _checksum(clip: np.ndarray) -> int:
    """Never 0."""
    return zlib.crc32(np.ascontiguousarray(clip).data.cast("B")) or 1
