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
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from autoregressive.presets import TrainedGPT
from evaluations.metrics.extractors import Extractor
from evaluations.metrics.image_quality import score_clip
from evaluations.token_bits import gpt_bits, plain_bits
from evaluations.video_codecs import CODECS, RateSearch, decode
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import differences, to_dict
from tokenizer.common.errors import UserError
from tokenizer.common.locks import try_lock, wait_lock
from tokenizer.data.clips import ClipDataset
from tokenizer.data.video_io import to_model_range, to_uint8
from tokenizer.losses.perceptual import PerceptualDistance
from tokenizer.model import VideoTokenizer

Figures = dict[str, float]
NOMINAL_FPS = 25.0  # what the encoders are told; the bytes of a clip hardly depend on it
REAL = "real"  # the key of the clip itself, whose features are the other side of a Frechet distance


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
    """One clip under many keys. Frames are scored as uint8, one clip at a time, like everywhere in evaluations."""

    tokenizer: VideoTokenizer
    perceptual: PerceptualDistance
    extractor: Extractor | None = None
    gpt: TrainedGPT | None = None
    batch_size: int = 8

    @property
    def metrics(self) -> tuple[str, ...]:
        """Figures of a clip that measure quality."""
        return ("psnr", "ssim", self.perceptual.name)

    def facts(self) -> dict[str, Any]:
        """What decides a measurement, beside the clip and the key."""
        return {
            "tokenizer_sha256": self.tokenizer.sha256,
            "perceptual": self.perceptual.name,
            "extractor": self.extractor and {"name": self.extractor.name, "sha256": self.extractor.sha256},
            "gpt_sha256": self.gpt and self.gpt.sha256,
        }

    @torch.inference_mode()
    def __call__(self, video_CTHW: Tensor, keys: Sequence[str]) -> tuple[dict[str, Figures], dict[str, Tensor]]:
        """-> figures and features by key. Keys: those of `row_key` and `codec_key`, and REAL."""
        real_THWC = to_uint8(video_CTHW)
        figures: dict[str, Figures] = {}
        features: dict[str, Tensor] = {}
        rows = [int(key.removeprefix("row:")) for key in keys if key.startswith("row:")]
        made = itertools.chain(self._by_rows(video_CTHW, rows), self._by_codecs(real_THWC, keys))
        for key, ours_THWC, sizes in made:
            scores = score_clip(real_THWC, ours_THWC, self.perceptual)
            figures[key] = {name: scores[name] for name in self.metrics} | sizes
            if self.extractor:
                features[key] = self._features(ours_THWC)
        if REAL in keys:
            figures[REAL] = {}
            if self.extractor:
                features[REAL] = self._features(real_THWC)
        return figures, features

    def _by_rows(self, video_CTHW: Tensor, rows: Sequence[int]) -> Iterator[tuple[str, np.ndarray, Figures]]:
        """Reconstructions under these assignments, with what their tokens take."""
        space, codebook_size = self.tokenizer.space, self.tokenizer.config.codebook_size
        for start in range(0, len(rows), self.batch_size):
            some = rows[start : start + self.batch_size]
            length_BN = space.lengths_of(torch.tensor(some))
            tokens = self.tokenizer.encode(video_CTHW.expand(len(some), -1, -1, -1, -1), length_BN)
            ours_BCTHW = self.tokenizer.decode(tokens)
            bytes_B = clip_bytes(length_BN, codebook_size, len(space.levels)).tolist()
            entropy_B = (gpt_bits(self.gpt.model, tokens) / 8).ceil().long().tolist() if self.gpt else None
            for b, row in enumerate(some):
                sizes: Figures = {"tokens": int(space.tokens_A[row]), "bytes": bytes_B[b]}
                if entropy_B is not None:
                    sizes["entropy_bytes"] = entropy_B[b]
                yield row_key(row), to_uint8(ours_BCTHW[b]), sizes

    def _by_codecs(self, real_THWC: np.ndarray, keys: Sequence[str]) -> Iterator[tuple[str, np.ndarray, Figures]]:
        """What codecs make of the clip within so many bytes; a codec's earlier encodings serve the next size too."""
        searches: dict[str, RateSearch] = {}
        for key in keys:
            name, _, num_bytes = key.partition("@")
            if num_bytes:
                search = searches.setdefault(name, RateSearch(CODECS[name], real_THWC, NOMINAL_FPS))
                coded, reached = search.at_most(int(num_bytes))
                yield key, decode(coded), {"bytes": coded.num_bytes, "crf": coded.quality, "reached": float(reached)}

    def _features(self, frames_THWC: np.ndarray) -> Tensor:
        assert self.extractor is not None
        return self.extractor(to_model_range(frames_THWC)[None])[0]


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
