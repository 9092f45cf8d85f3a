"""The measurements behind a quality-cost curve: each clip under each assignment and codec that some strategy needs.

Any number of processes may share the work (tokenizer/common/work_units.py). What a clip gives depends on that clip
alone. A later job in the same folder measures only new clips and settings.

    made_from.json                what decides a measurement; a folder made from something else is refused
    units/<asked>/000000...       figures by clip and key, and the features of a Frechet distance

Letters: S clips of the set, B clips of a batch, C T H W, F features.

How many bits the tokens of a clip take: each code written plainly, or entropy-coded by the GPT's probabilities.

Letters: B clips, L packed tokens, Q ids of a sequence, V ids of a GPT.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.model import GPT
from autoregressive.presets import TrainedGPT
from autoregressive.sequence import ClipCodes
from evaluations.quality_cost.clips import CurveClips
from evaluations.quality_cost.video_codecs import CODECS, RateSearch, decode
from evaluations.scoring import Scorer
from evaluations.shards import read_shard, write_shard
from tokenizer.common.errors import UserError
from tokenizer.common.work_units import WorkUnits, claim_folder
from tokenizer.data.video_io import to_uint8
from tokenizer.model import VideoTokenizer
from tokenizer.tokens import VideoTokens


def plain_bits(length_BN: Tensor, codebook_size: int, num_levels: int = 1) -> Tensor:
    """float64 [B]: tokens x log2(codebook), and for each block log2(num_levels) for the number that follows.

    The default of one level leaves the length tokens out. Fractions count: a clip can be written as one number.
    """
    return length_BN.sum(dim=1).double() * math.log2(codebook_size) + length_BN.shape[1] * math.log2(num_levels)


@torch.inference_mode()
def gpt_bits(model: GPT, tokens: VideoTokens, label: int | None = None) -> Tensor:
    """float64 [B]: what an arithmetic coder needs that knows the GPT and the grammar, length tokens included.

    -log2 p, summed over codes and length tokens; p is shared out among the ids that the grammar allows in each place.
    The class is not written: `label` is known on both sides, None is the open condition. Clip by clip, so that
    the result does not depend on the batch.
    """
    layout = model.layout
    if layout.condition_tokens:
        raise UserError("this GPT continues given frames; the size of whole clips needs a class-to-video GPT")
    if tokens.codebook_size != layout.codebook_size or model.training:
        raise UserError(
            f"tokens of a codebook of {tokens.codebook_size} and a GPT of {layout.codebook_size} codes, "
            f"{'training' if model.training else 'evaluating'}: both must agree, and the GPT be set to eval()"
        )
    bits = []
    for b in range(len(tokens)):
        clip = tokens.clip(b)
        lengths = tuple(clip.length_BN[0].tolist())
        id_Q = layout.encode(ClipCodes(clip.code_L.cpu(), lengths, label)).to(model.device)
        said_L = id_Q[1:]
        logits_LV = model(id_Q[:-1], (len(said_L),)).double()
        is_code_V = torch.arange(layout.num_ids, device=model.device) < layout.codebook_size
        allowed_LV = is_code_V == (said_L < layout.codebook_size)[:, None]
        log_p_LV = logits_LV.masked_fill(~allowed_LV, -math.inf).log_softmax(dim=1)
        bits.append(-log_p_LV.gather(1, said_L[:, None]).sum() / math.log(2))
    return torch.stack(bits).cpu()


Figures = dict[str, float]
NOMINAL_FPS = 25.0  # what the encoders are told; the bytes of a clip hardly depend on it
REAL = "real"  # the key of the clip itself, whose features are the other side of a Frechet distance


def row_key(row: int) -> str:
    return f"row:{row}"


def codec_key(name: str, num_bytes: int) -> str:
    return f"{name}@{num_bytes}"


def clip_bytes(length_BN: Tensor, codebook_size: int, num_levels: int) -> Tensor:
    """int64 [B], whole bytes that the tokens of a clip take, length tokens included."""
    return (plain_bits(length_BN, codebook_size, num_levels) / 8).ceil().long()


@dataclass
class Measure:
    """One clip under many keys. Frames are scored as uint8, one clip at a time, like everywhere in evaluations."""

    tokenizer: VideoTokenizer
    scorer: Scorer
    gpt: TrainedGPT | None = None
    batch_size: int = 8

    @property
    def metrics(self) -> tuple[str, ...]:
        """Figures of a clip that measure quality."""
        perceptual = self.scorer.perceptual
        return ("psnr", "ssim", *([perceptual.name] if perceptual else ()))

    def facts(self) -> dict[str, Any]:
        """What decides a measurement, beside the clip and the key."""
        return {
            "tokenizer_sha256": self.tokenizer.sha256,
            **self.scorer.facts(),
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
            scores = self.scorer.qualities([real_THWC], [ours_THWC])[0]
            figures[key] = {name: scores[name] for name in self.metrics} | sizes
            if self.scorer.extractor:
                features[key] = self.scorer.features([ours_THWC])[0]
        if REAL in keys:
            figures[REAL] = {}
            if self.scorer.extractor:
                features[REAL] = self.scorer.features([real_THWC])[0]
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
                sizes: Figures = {"tokens": int(space.tokens_of(torch.tensor(row))), "bytes": bytes_B[b]}
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


@dataclass
class Measured:
    """Everything that was asked for: by clip name, then by key."""

    figures: dict[str, dict[str, Figures]] = field(default_factory=dict)
    features: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def claim(folder: Path, clips: CurveClips, measure: Measure) -> None:
    """UserError if the folder holds measurements of other clips, weights or metrics. Clips count by their content."""
    listing = json.dumps([clips.names, clips.contents])
    digest = hashlib.sha256(listing.encode()).hexdigest()
    facts = measure.facts() | clips.facts | {"num_clips": len(clips), "clips_sha256": digest}
    claim_folder(folder, facts, "give another --out")


class Sweep:
    """The measurements that strategies and codecs need, in units of a few clips."""

    def __init__(
        self, folder: Path, clips: CurveClips, keys: Mapping[str, Sequence[str]], measure: Measure, unit_size: int = 4
    ) -> None:
        """keys: for each clip by name, what to measure."""
        self.folder, self.clips, self.keys, self.measure = folder, clips, keys, measure
        self.members = [range(i, min(i + unit_size, len(clips))) for i in range(0, len(clips), unit_size)]
        asked = hashlib.sha256(json.dumps([unit_size, keys]).encode()).hexdigest()[:16]
        self.units = WorkUnits(folder / "units" / asked, len(self.members))

    def work(self, merge: Callable[[], None]) -> bool:
        """Work until no unit is free; whoever finds all done calls `merge`. False while others are still at work."""
        return self.units.work(self._measure_unit, merge, f"measuring {len(self.clips)} clips")

    def measured(self) -> Measured:
        """All measurements, clip by clip; for use in `merge`."""
        everything = Measured()
        for path in self.units.paths:
            figures, features = read_shard(path)
            everything.figures |= figures
            for name, found in figures.items():
                places = {key: f"{name} {key}" for key in found}
                everything.features[name] = {key: features[at] for key, at in places.items() if at in features}
        return everything

    def _measure_unit(self, unit: int) -> None:
        """What an earlier job in this folder measured of these clips is taken over."""
        known: dict[str, dict[str, Figures]] = {}
        vectors: dict[str, Tensor] = {}
        for path in sorted((self.folder / "units").glob(f"*/{unit:06d}.safetensors")):
            earlier, its_vectors = read_shard(path)
            for name, found in earlier.items():
                known.setdefault(name, {}).update(found)
            vectors |= its_vectors
        figures: dict[str, dict[str, Figures]] = {}
        for index in self.members[unit]:
            name = self.clips.names[index]
            before = known.get(name, {})
            missing = [key for key in self.keys[name] if key not in before]
            found, new = self.measure(self.clips.read(index), missing) if missing else ({}, {})
            figures[name] = {key: found[key] if key in found else before[key] for key in self.keys[name]}
            vectors |= {f"{name} {key}": vector for key, vector in new.items()}
        wanted = (f"{name} {key}" for name, found in figures.items() for key in found)
        features = {place: vectors[place].contiguous() for place in wanted if place in vectors}
        write_shard(self.units.path(unit), figures, features)
