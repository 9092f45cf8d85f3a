"""The tokens of one whole video on disk: clip after clip, with the time of every frame, read by range.

One .safetensors holds `codes` [L], `lengths` [B, N] and `seconds` [F], the time of each frame since the first. The last
clip repeats its last frame to be full; `seconds` tells how many frames are real. `VideoTokens.load` reads the file too.

A writer appends to plain files in a folder beside it, `.<name>.partial`, and copies them together at the end. So
memory does not grow with the video, and a killed writer resumes after its last complete clip.

Letters: L codes, B clips, N blocks, F real frames, T frames of a clip.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.clip_shape import plain_size
from tokenizer.common.config import defaults_of, differences
from tokenizer.common.errors import UserError
from tokenizer.common.schema import check_fields, parse_json, read_json
from tokenizer.tokens import VideoTokens, digest

_KIND, _VIDEO = "evatok.tokens", "evatok.video"  # keys of the metadata; the first is that of VideoTokens
_WAY_OUT = "make it again with python -m tokenizer.tokenize"
_COPIED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class VideoFacts:
    """What made the tokens. A writer resumes only a file begun with equal facts."""

    num_frames: int  # of a clip
    size: int | list[int]  # pixels: of a square, or [height, width]
    codebook_size: int
    num_blocks: int
    tokenizer_sha256: str
    router_sha256: str | None
    budget: str
    fps: float  # of the frames, for players; their own times are `seconds`
    read_at: float | None  # the rate that was asked for; None: the file's own frames
    source: str  # fingerprint of the video file
    backend: str = "pyav"
    trade_off: float | None = None  # w_q, of a router that predicts qualities

    @property
    def code_type(self) -> np.dtype:
        """How a code is stored."""
        return np.dtype("<i2" if self.codebook_size <= 1 << 15 else "<i4")


class TokenWriter:
    """Append the clips of one video, then `finish`. `num_clips` are there already, from an earlier run."""

    def __init__(self, path: str | Path, facts: VideoFacts) -> None:
        """Raises UserError if an earlier run began this file from something else."""
        self.path, self.facts = Path(path), facts
        self.folder = self.path.with_name(f".{self.path.name}.partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._agree()
        self._files = {name: self.folder / f"{name}.bin" for name in ("codes", "seconds", "lengths")}
        for file in self._files.values():
            file.touch()
        self.num_clips = self._keep_complete_clips()

    def append(self, tokens: VideoTokens, seconds: Sequence[Sequence[float]]) -> None:
        """Add clips with the times of their real frames; only the video's last clip may have fewer than T."""
        for b in range(len(tokens)):
            clip = tokens.clip(b)
            second_T = np.full(self.facts.num_frames, np.nan)
            second_T[: len(seconds[b])] = seconds[b]
            rows = {"codes": clip.code_L.numpy(), "seconds": second_T, "lengths": clip.length_BN.numpy()}
            for name, file in self._files.items():  # lengths last: a clip counts when its lengths are there
                with open(file, "ab") as out:
                    out.write(rows[name].astype(self._type(name)).tobytes())
            self.num_clips += 1

    def finish(self) -> Path:
        """Copy all into `path`, which appears complete or not at all, and remove the folder."""
        second_F = np.fromfile(self._files["seconds"], "<f8")
        second_F = second_F[~np.isnan(second_F)]
        second_F.tofile(self._files["seconds"].with_suffix(".real"))
        lengths_shape = [self.num_clips, self.facts.num_blocks]
        codes = self._files["codes"].stat().st_size // self.facts.code_type.itemsize
        # The widest type first keeps every tensor aligned.
        parts = (
            ("seconds", "F64", [len(second_F)], self._files["seconds"].with_suffix(".real")),
            ("lengths", "I32", lengths_shape, self._files["lengths"]),
            ("codes", {2: "I16", 4: "I32"}[self.facts.code_type.itemsize], [codes], self._files["codes"]),
        )
        facts = {key: getattr(self.facts, key) for key in ("num_frames", "size", "codebook_size", "tokenizer_sha256")}
        facts["sha256"] = digest(facts, _chunks(self._files["codes"], self._files["lengths"]))
        known = asdict(self.facts)
        known["sha256"] = digest(known | facts, _chunks(parts[0][-1]))
        meta = {_KIND: json.dumps(facts), _VIDEO: json.dumps(known)}
        header: dict[str, Any] = {"__metadata__": meta}
        end = 0
        for name, kind, shape, file in parts:
            start, end = end, end + file.stat().st_size
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        whole = self.folder / "whole.safetensors"
        with open(whole, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for *_, file in parts:
                with open(file, "rb") as part:
                    shutil.copyfileobj(part, out, _COPIED_AT_ONCE)
            out.flush()
            os.fsync(out.fileno())
        os.replace(whole, self.path)
        shutil.rmtree(self.folder)
        return self.path

    def _agree(self) -> None:
        file, mine = self.folder / "facts.json", asdict(self.facts)
        if not file.exists():
            atomic_write(file, json.dumps(mine).encode())
        before = defaults_of(VideoFacts) | read_json(file, {}, f"remove {self.folder}")  # older runs lack some
        if before != mine:
            raise UserError(
                f"{self.path}: an unfinished run used other settings (then / now: "
                f"{'; '.join(differences(before, mine))}); choose another --out, or remove {self.folder}"
            )

    def _type(self, name: str) -> np.dtype:
        return {"codes": self.facts.code_type, "seconds": np.dtype("<f8"), "lengths": np.dtype("<i4")}[name]

    def _keep_complete_clips(self) -> int:
        """Cut off what a killed run left of a clip. Returns the number of complete ones."""
        c = self.facts
        length_BN = np.fromfile(self._files["lengths"], "<i4")
        length_BN = length_BN[: len(length_BN) // c.num_blocks * c.num_blocks].reshape(-1, c.num_blocks)
        ends = np.cumsum(length_BN.sum(axis=1))
        codes = self._files["codes"].stat().st_size // c.code_type.itemsize
        seconds = self._files["seconds"].stat().st_size // (8 * c.num_frames)
        num_clips = min(int(np.searchsorted(ends, codes, side="right")), seconds)
        sizes = {
            "codes": int(ends[num_clips - 1]) * c.code_type.itemsize if num_clips else 0,
            "seconds": num_clips * 8 * c.num_frames,
            "lengths": num_clips * 4 * c.num_blocks,
        }
        for name, file in self._files.items():
            os.truncate(file, sizes[name])
        return num_clips


def _chunks(*files: Path) -> Iterator[bytes]:
    for file in files:
        with open(file, "rb") as part:
            while chunk := part.read(_COPIED_AT_ONCE):
                yield chunk


class TokenFile:
    """An opened file of tokens; codes are read when a range of clips is asked for."""

    def __init__(self, path: str | Path) -> None:
        """Raises UserError for a missing, damaged or foreign file."""
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{path}: is not a regular file")
        try:
            self._file = safe_open(str(path), framework="pt")
            meta = self._file.metadata() or {}
            if _KIND not in meta or _VIDEO not in meta:
                raise UserError(f"{path}: not the tokens of a whole video; make them with python -m tokenizer.tokenize")
            self.length_BN: Tensor = self._file.get_tensor("lengths").long()
            self.second_F: np.ndarray = self._file.get_tensor("seconds").numpy()
            self._codes = self._file.get_slice("codes")
            code_L = self._file.get_tensor("codes")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as video tokens: {error}") from error
        self.facts = self._checked(meta, code_L)
        self._end_B = [0, *self.length_BN.sum(dim=1).cumsum(0).tolist()]
        num_clips = -(-len(self.second_F) // self.facts.num_frames)
        if self._codes.get_shape() != [self._end_B[-1]] or len(self) != num_clips or not num_clips:
            raise UserError(
                f"{path}: is damaged: {self._codes.get_shape()} codes, lengths that add up to {self._end_B[-1]}, "
                f"{len(self)} clips for {len(self.second_F)} frames; {_WAY_OUT}"
            )

    def _checked(self, meta: dict[str, str], code_L: Tensor) -> VideoFacts:
        """What made the tokens, once all that the file holds has the sha256 that it states; older files have none."""
        origin = str(self.path)
        kind, known = (
            check_fields(parse_json(meta[key], origin, _WAY_OUT), {}, origin, _WAY_OUT) for key in (_KIND, _VIDEO)
        )
        stated, stated_known = kind.pop("sha256", None), known.pop("sha256", None)
        tokens = digest(kind, (code_L.numpy().tobytes(), self._file.get_tensor("lengths").numpy().tobytes()))
        if stated is not None and (stated, stated_known) != (
            tokens, digest(known | kind | {"sha256": stated}, (self.second_F.tobytes(),))
        ):  # fmt: skip
            raise UserError(f"{origin}: is damaged: what it holds differs from its sha256; {_WAY_OUT}")
        hints = get_type_hints(VideoFacts)
        facts = check_fields(defaults_of(VideoFacts) | known, hints, origin, _WAY_OUT)
        if strange := sorted(facts.keys() - hints.keys()):
            raise UserError(f"{origin}: of another version: holds {strange[0]!r}; {_WAY_OUT}")
        plain_size(facts["size"], f"{origin}: is damaged: size")
        if min(facts["num_frames"], facts["num_blocks"]) < 1 or facts["fps"] <= 0:
            raise UserError(f"{origin}: is damaged: frames, blocks and fps must be above 0; {_WAY_OUT}")
        return VideoFacts(**facts)

    def __len__(self) -> int:
        return len(self.length_BN)

    @property
    def num_tokens(self) -> int:
        return self._end_B[-1]

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return float(self.second_F[-1]) + 1 / self.facts.fps

    def clips(self, first: int, last: int) -> VideoTokens:
        """The tokens of clips first .. last - 1."""
        c = self.facts
        code_L = self._codes[self._end_B[first] : self._end_B[last]].long()
        return VideoTokens(
            code_L, self.length_BN[first:last], c.num_frames, c.size, c.codebook_size, c.tokenizer_sha256
        )

    def batches(self, first: int, last: int, batch_size: int) -> Iterator[tuple[int, VideoTokens]]:
        """(first clip, tokens) of clips first .. last - 1, `batch_size` clips at a time."""
        for start in range(first, last, batch_size):
            yield start, self.clips(start, min(start + batch_size, last))

    def frames_between(self, start: float, end: float | None) -> range:
        """The frames whose time is in [start, end). Raises UserError outside of the video."""
        end = self.duration if end is None else end
        if not 0 <= start < end <= self.duration + 1 / self.facts.fps:
            raise UserError(
                f"{self.path}: the range {start:g} .. {end:g} s is not inside of the video, "
                f"which lasts from 0 to {self.duration:.2f} s"
            )
        first, last = np.searchsorted(self.second_F, [start - 1e-6, end - 1e-6])
        if first == last:
            raise UserError(f"{self.path}: no frame begins between {start:g} and {end:g} s; widen the range")
        return range(int(first), int(last))
