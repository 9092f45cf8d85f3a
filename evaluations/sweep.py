"""The measurements behind a quality-cost curve: each clip under each assignment and codec that some strategy asks for.

Clips are cut into units. Any number of processes may work on one folder, be killed and started again: a unit is
measured under a lock, written aside and renamed. A unit that is asked for more later measures only what it lacks.
What a clip gives depends on that clip alone, so the results are the same however the work was shared.

    made_from.json       what decides a measurement; a folder made from something else is refused
    units/000000.json    clip -> key -> figures; units/000000.safetensors: the features of a Frechet distance

Letters: S clips of the set, B clips of a batch, C T H W, F features.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from autoregressive.model import GPT
from evaluations.token_bits import gpt_bits, plain_bits
from evaluations.video_codecs import CODECS, RateSearch, decode
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import differences, to_dict
from tokenizer.common.errors import UserError
from tokenizer.common.image_quality import psnr, ssim
from tokenizer.common.locks import try_lock, wait_lock
from tokenizer.data.clips import ClipDataset
from tokenizer.data.video_io import to_model_range, to_uint8
from tokenizer.losses.perceptual import PerceptualDistance
from tokenizer.model import VideoTokenizer
from tokenizer.router.reconstruct import PSNR_OF_EQUAL

Figures = dict[str, float]
NOMINAL_FPS = 25.0  # what the encoders are told; the bytes of a clip hardly depend on it
REAL = "real"  # the key of the clip itself, whose features are the other side of a Frechet distance


class Extractor(Protocol):
    """What turns clips into the features of a Frechet distance."""

    name: str

    def __call__(self, video_BCTHW: Tensor) -> Tensor: ...


def row_key(row: int) -> str:
    """The key of a measurement under an assignment."""
    return f"row:{row}"


def codec_key(name: str, num_bytes: int) -> str:
    """The key of a measurement by a codec within so many bytes."""
    return f"{name}@{num_bytes}"


def clip_bytes(length_BN: Tensor, codebook_size: int, num_levels: int) -> Tensor:
    """int64 [B], whole bytes that the tokens of a clip take, those that say the lengths included."""
    return (plain_bits(length_BN, codebook_size, num_levels) / 8).ceil().long()


@dataclass
class Measure:
    """One clip under many keys."""

    tokenizer: VideoTokenizer
    perceptual: PerceptualDistance
    extractor: Extractor | None = None
    gpt: GPT | None = None
    batch_size: int = 8

    def facts(self) -> dict[str, Any]:
        """What decides a measurement, beside the clip and the key."""
        return {
            "tokenizer_sha256": self.tokenizer.sha256,
            "perceptual": self.perceptual.name,
            "extractor": self.extractor.name if self.extractor else None,
            "gpt": self.gpt is not None,
        }

    @torch.inference_mode()
    def __call__(self, video_CTHW: Tensor, keys: Sequence[str]) -> tuple[dict[str, Figures], dict[str, Tensor]]:
        """-> figures and features by key. Keys: those of `row_key` and `codec_key`, and REAL."""
        rows = [int(key.removeprefix("row:")) for key in keys if key.startswith("row:")]
        figures: dict[str, Figures] = {}
        features: dict[str, Tensor] = {}
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            self._rows(video_CTHW, some, figures, features)
        searches: dict[str, RateSearch] = {}
        for key in keys:
            name, _, num_bytes = key.partition("@")
            if num_bytes:
                self._codec(video_CTHW, name, int(num_bytes), searches, figures, features)
        if REAL in keys:
            figures[REAL] = {}
            if self.extractor:
                features[REAL] = self.extractor(video_CTHW[None])[0].cpu()
        return figures, features

    def _rows(
        self, video_CTHW: Tensor, rows: list[int], figures: dict[str, Figures], features: dict[str, Tensor]
    ) -> None:
        space, codebook_size = self.tokenizer.space, self.tokenizer.config.codebook_size
        length_BN = space.lengths_of(torch.tensor(rows))
        tokens = self.tokenizer.encode(video_CTHW.expand(len(rows), -1, -1, -1, -1), length_BN)
        measured = self._compare(self.tokenizer.decode(tokens), video_CTHW)
        bytes_B = clip_bytes(length_BN, codebook_size, len(space.levels))
        entropy_B = None if self.gpt is None else (gpt_bits(self.gpt, tokens) / 8).ceil()
        for b, row in enumerate(rows):
            key = row_key(row)
            figures[key] = {name: float(value[b]) for name, value in measured.items() if name != "features"}
            figures[key] |= {"tokens": int(space.tokens_A[row]), "bytes": int(bytes_B[b])}
            if entropy_B is not None:
                figures[key]["entropy_bytes"] = int(entropy_B[b])
            if "features" in measured:
                features[key] = measured["features"][b]

    def _codec(
        self,
        video_CTHW: Tensor,
        name: str,
        num_bytes: int,
        searches: dict[str, RateSearch],
        figures: dict[str, Figures],
        features: dict[str, Tensor],
    ) -> None:
        if name not in searches:
            searches[name] = RateSearch(CODECS[name], to_uint8(video_CTHW), NOMINAL_FPS)
        coded, reached = searches[name].at_most(num_bytes)
        ours_BCTHW = to_model_range(decode(coded))[None].to(self.tokenizer.device)
        measured = self._compare(ours_BCTHW, video_CTHW)
        key = codec_key(name, num_bytes)
        figures[key] = {name: float(value[0]) for name, value in measured.items() if name != "features"}
        figures[key] |= {"bytes": coded.num_bytes, "crf": coded.quality, "reached": float(reached)}
        if "features" in measured:
            features[key] = measured["features"][0]

    def _compare(self, ours_BCTHW: Tensor, video_CTHW: Tensor) -> dict[str, Tensor]:
        real_BCTHW = video_CTHW.to(ours_BCTHW.device).expand_as(ours_BCTHW)
        measured = {
            "psnr": psnr(ours_BCTHW, real_BCTHW).clamp(max=PSNR_OF_EQUAL),
            "ssim": ssim(ours_BCTHW, real_BCTHW),
            "lpips": self.perceptual.clip_distance(ours_BCTHW, real_BCTHW),
        }
        if self.extractor:
            measured["features"] = self.extractor(ours_BCTHW)
        return {name: value.cpu() for name, value in measured.items()}


@dataclass
class Measured:
    """Everything that was asked for: by clip name, then by key."""

    figures: dict[str, dict[str, Figures]]
    features: dict[str, dict[str, Tensor]]


def claim_folder(folder: Path, clips: ClipDataset, measure: Measure) -> None:
    """Measurements of other clips, weights or metrics must not end up in one folder: UserError."""
    names = "\0".join(clips.names).encode("utf-8", "surrogateescape")
    facts = measure.facts() | {"num_clips": len(clips), "clips_sha256": hashlib.sha256(names).hexdigest()}
    facts |= {"data": to_dict(clips.cfg)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "made_from.json"
    if not path.exists():
        atomic_write(path, json.dumps(facts, indent=1).encode())
    if different := differences(json.loads(path.read_text(encoding="utf-8")), facts):
        raise UserError(
            f"{folder} holds measurements of something else (there / now: {'; '.join(different)}); give another --out"
        )


def made_once(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """The tensor in `path`, made by the first process that asks for it while the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wait_lock(path.with_suffix(".lock")):
        if not path.is_file():
            atomic_write(path, save({"tensor": make().contiguous()}))
    return load_file(path)["tensor"]


class Sweep:
    """The units of one folder."""

    def __init__(
        self, folder: Path, clips: ClipDataset, keys: Mapping[str, Sequence[str]], measure: Measure, unit_size: int = 4
    ) -> None:
        """keys: for each clip by name, what to measure. Raises UserError where the folder is of something else."""
        self.folder, self.clips, self.keys, self.measure = folder, clips, keys, measure
        self.units = [range(i, min(i + unit_size, len(clips))) for i in range(0, len(clips), unit_size)]
        (folder / "units").mkdir(parents=True, exist_ok=True)

    def run(self) -> Measured | None:
        """Work until no unit is free. All measurements, or None where other processes still work on some."""
        mine = os.getpid() % len(self.units)  # start at different places, so that workers seldom meet
        order = [(mine + i) % len(self.units) for i in range(len(self.units))]
        for unit in tqdm(order, desc=f"measuring {len(self.clips)} clips", unit="unit"):
            with try_lock(self._path(unit, "lock")) as free:
                if free:
                    self._complete(unit)
        return self._collect()

    def _complete(self, unit: int) -> None:
        """Measure what the unit lacks and write it; the figures come last and say that the features are there."""
        figures, features = self._read(unit)
        changed = False
        for index in self.units[unit]:
            name = self.clips.names[index]
            missing = [key for key in self.keys[name] if key not in figures.get(name, {})]
            if not missing:
                continue
            sample = self.clips.get(index)
            if sample.name != name:  # the data set gives the next clip for a bad one
                raise UserError(f"{name}: cannot be read ({self.clips.quarantine[name]}); leave it out of the clips")
            found, vectors = self.measure(sample.video_CTHW, missing)
            figures.setdefault(name, {}).update(found)
            features |= {f"{index} {key}": vector.contiguous() for key, vector in vectors.items()}
            changed = True
        if changed:
            atomic_write(self._path(unit, "safetensors"), save(features))
            atomic_write(self._path(unit, "json"), json.dumps(figures, indent=1, sort_keys=True).encode())

    def _collect(self) -> Measured | None:
        measured = Measured({}, {})
        for unit, indices in enumerate(self.units):
            figures, features = self._read(unit)
            for index in indices:
                name = self.clips.names[index]
                if any(key not in figures.get(name, {}) for key in self.keys[name]):
                    return None
                measured.figures[name] = figures[name]
                measured.features[name] = {
                    key: features[f"{index} {key}"] for key in self.keys[name] if f"{index} {key}" in features
                }
        return measured

    def _read(self, unit: int) -> tuple[dict[str, dict[str, Figures]], dict[str, Tensor]]:
        if not self._path(unit, "json").is_file():
            return {}, {}
        figures = json.loads(self._path(unit, "json").read_text(encoding="utf-8"))
        return figures, load_file(self._path(unit, "safetensors"))

    def _path(self, unit: int, suffix: str) -> Path:
        return self.folder / "units" / f"{unit:06d}.{suffix}"
