"""Clips that two GPTs generate for the classes of real test clips, as features: a stage of scripts/mini/reproduce.py.

The GPT of the adaptive tokenizer and the GPT of the uniform one generate one clip for the class of each real clip, in
turns, so that their times compare. Writes OUT/samples.safetensors: features of the real and of all generated clips,
tokens of each clip, and the seconds that sampling took (CPU time on a CPU).

Letters: S clips, F numbers in a feature.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from autoregressive.condition import names_of
from autoregressive.presets import check_tokenizer_fits, load_gpt
from autoregressive.sample_grid import tokens_of
from autoregressive.sampler import Request, Sampler, SamplingConfig
from autoregressive.sequence import length_rule
from evaluations.metrics.extractors import Extractor, load_extractor
from evaluations.shards import write_shard
from tokenizer.common.cli import Parser, at_least
from tokenizer.common.device import pick_device
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.video_io import to_model_range, to_uint8
from tokenizer.presets import load_tokenizer

KINDS = ("adaptive", "uniform")
GUIDANCE = 2.5  # the paper's, for its smallest GPT
_SLOTS = 10  # clips that are sampled side by side, and at a turn


def parse_args() -> argparse.Namespace:
    parser = Parser("Generate clips with two GPTs and keep their features.")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", required=True, metavar="T", help=f"{kind} tokenizer")
        parser.add_argument(f"--gpt-{kind}", required=True, metavar="G", help="GPT on its tokens")
    parser.add_argument("--clips", required=True, metavar="SOURCE", help="real clips with a class each")
    parser.add_argument("--samples", required=True, type=at_least(2), metavar="N", help="real and generated clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    return parser.parse_args()


class Generation:
    """What one GPT has generated so far, clip by clip."""

    def __init__(self, tokenizer: str, gpt: str, seed: int, device: torch.device) -> None:
        self.tokenizer, self.gpt = load_tokenizer(tokenizer, device), load_gpt(gpt, device)
        check_tokenizer_fits(self.gpt, self.tokenizer)
        self.sampler = Sampler(self.gpt.model, SamplingConfig(_SLOTS, seed=seed, guidance=(GUIDANCE,)))
        self.tokens: list[float] = []
        self.seconds: list[float] = []  # of the turn, shared out among its clips
        self.features: list[Tensor] = []

    def add(self, labels: Sequence[str | None], first: int, extractor: Extractor) -> None:
        """Sample and decode a clip for each label, the first of them number `first`."""
        layout = self.gpt.model.layout
        names = names_of(self.gpt.class_names, layout.num_classes)
        rule = length_rule(layout)
        requests = [Request((first + i,), names.index(str(label)), rule=rule) for i, label in enumerate(labels)]
        clock = time.process_time if self.gpt.model.device.type == "cpu" else time.perf_counter
        began = clock()
        samples = sorted(self.sampler.run(requests), key=lambda sample: sample.request.key)
        self.seconds += [(clock() - began) / len(samples)] * len(samples)
        self.tokens += [float(sum(sample.lengths)) for sample in samples]
        video_BCTHW = self.tokenizer.decode(tokens_of(samples, layout, self.tokenizer))
        self.features += [extractor(to_model_range(to_uint8(video_CTHW))[None]) for video_CTHW in video_BCTHW]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    device = pick_device("auto")
    extractor = load_extractor("effnet", device=device)
    made = {kind: Generation(getattr(args, kind), getattr(args, f"gpt_{kind}"), args.seed, device) for kind in KINDS}
    size = made["adaptive"].tokenizer.config.size
    clips = build_dataset(DataConfig([args.clips], size=size, augment=False)).first(args.samples)
    if len(clips) < args.samples:
        raise UserError(f"{args.clips} holds {len(clips)} clips, fewer than --samples {args.samples}")
    for start in range(0, len(clips), _SLOTS):
        for each in made.values():
            each.add(clips.labels[start : start + _SLOTS], start, extractor)
    real = [extractor(clips.get_this(i).video_CTHW[None]) for i in range(len(clips))]
    features = {"real": torch.cat(real), **{kind: torch.cat(each.features) for kind, each in made.items()}}
    records = {kind: {"tokens": each.tokens, "seconds": each.seconds} for kind, each in made.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    write_shard(args.out / "samples.safetensors", records, features)
    for kind, each in made.items():
        print(f"{kind}: {fmean(each.tokens):.1f} tokens, {fmean(each.seconds):.3f} seconds a clip")


if __name__ == "__main__":
    run_cli(main)
