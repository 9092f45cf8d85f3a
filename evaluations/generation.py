"""What the two evaluations of a GPT share: flags, models, and samples of the clips of a shard.

Letters: C T H W, K tokens of a block, L codes of the given frames.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from autoregressive.presets import TrainedGPT, check_tokenizer_fits, load_gpt
from autoregressive.sample_grid import tokens_of
from autoregressive.sampler import Request, Sample, Sampler, SamplingConfig
from autoregressive.sequence import SequenceLayout, length_rule, longest_sequence
from evaluations.clip_list import ListedClip
from evaluations.job import Evaluation, Made, require, token_figures
from tokenizer.common.cli import Parser, at_least, positive
from tokenizer.common.device import PRECISIONS, pick_dtype
from tokenizer.common.errors import UserError
from tokenizer.data.video_io import VideoError, to_uint8
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer

MakeRequest = Callable[[ListedClip], tuple[Request, dict[str, Any]]]  # -> the request, and fields of its `Made`


def add_sampling_flags(parser: Parser) -> None:
    """Spelt as in the sampling commands."""
    add = parser.add_argument
    add("--gpt-model", metavar="SIZE", help="GPT-B | GPT-L | GPT-LP | GPT-mini | GPT-debug: check that G has this size")
    add("--gpt-ckpt", metavar="G", help="weights of the GPT: .safetensors or a run folder")
    add("--per-proc-batch-size", type=at_least(1), default=8, metavar="N", help="slots of the sampler (default: 8)")
    add("--seed", type=int, default=0, help="of the samples; the clip list has its own (default: 0)")
    add("--temperature", type=positive, default=1.0)
    add("--top-k", type=at_least(0), default=0, metavar="N", help="0 keeps all ids (default)")
    add("--top-p", type=positive, default=1.0)
    precision = os.environ.get("PRECISION", "none")
    add("--precision", default=precision, help=f"of the GPT: {' | '.join(PRECISIONS)} (default: PRECISION, else none)")
    add("--check-special-token-mask", action="store_true", help="draw only what the grammar allows; else broken clips "
        "are counted and left out")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the sampler's step")


class Generator:
    """A GPT with its tokenizer. `request_of` says what is asked for a clip of the list."""

    def __init__(self, evaluation: Evaluation, guidance: tuple[float, ...] = (1.0,)) -> None:
        """Raises UserError where weights are missing or do not belong together."""
        args = evaluation.args
        require(args, "vq_ckpt", "gpt_ckpt")
        self.tokenizer: VideoTokenizer = load_tokenizer(args.vq_ckpt, evaluation.device, args.tok_config)
        self.gpt: TrainedGPT = load_gpt(args.gpt_ckpt, evaluation.device, args.gpt_model)
        check_tokenizer_fits(self.gpt, self.tokenizer)
        self.gpt.model.to(pick_dtype(args.precision))
        self.precision = args.precision
        self.config = sampling_config(args, guidance)
        self.rule = length_rule(self.layout)
        self.request_of: MakeRequest | None = None
        self._sampler: Sampler | None = None

    @property
    def layout(self) -> SequenceLayout:
        """How the GPT's sequences are laid out."""
        return self.gpt.model.layout

    def facts(self) -> dict[str, Any]:
        """Weights, and how ids are drawn; the number of slots too, because rounding may change with it."""
        return {
            "tokenizer_sha256": self.tokenizer.sha256,
            "gpt_sha256": self.gpt.sha256,
            "precision": self.precision,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.config).items()},
        }

    @torch.inference_mode()
    def make(self, clips: Sequence[ListedClip]) -> Iterator[Made]:
        """Sample and decode; in the order in which the samples end."""
        assert self.request_of is not None
        wanted: dict[tuple[int | str, ...], tuple[ListedClip, dict[str, Any]]] = {}
        for clip in clips:
            try:
                request, more = self.request_of(clip)
            except VideoError as error:
                yield Made(clip, None, skipped=error.reason)
                continue
            wanted[request.key] = (clip, more | {"request": request})
        if self._sampler is None:
            self._sampler = Sampler(self.gpt.model, self.config, longest_sequence(self.layout, self.rule))
        for sample in self._sampler.run(each.pop("request") for _, each in wanted.values()):
            clip, more = wanted[sample.request.key]
            yield self._made(clip, sample, more)

    def _made(self, clip: ListedClip, sample: Sample, more: dict[str, Any]) -> Made:
        if sample.broken is not None:
            return Made(clip, None, skipped=f"breaks the grammar: {sample.broken}", **more)
        video_BCTHW = self.tokenizer.decode(tokens_of([sample], self.layout, self.tokenizer))
        return Made(clip, to_uint8(video_BCTHW[0]), token_figures(sample.lengths), **more)


def sampling_config(args: argparse.Namespace, guidance: tuple[float, ...]) -> SamplingConfig:
    """The flags of the command line."""
    return SamplingConfig(
        slots=args.per_proc_batch_size,
        seed=args.seed,
        guidance=guidance,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        check_grammar=args.check_special_token_mask,
        compile=args.compile,
    )


def check_task(generator: Generator, frame_prediction: bool) -> None:
    """Raises UserError for a model of the other kind."""
    if bool(generator.layout.condition_lengths) != frame_prediction:
        kind, script = (
            ("class-to-video", "eval_c2v.sh") if frame_prediction else ("frame prediction", "eval_frame_pred.sh")
        )
        raise UserError(f"{generator.gpt.origin}: is a model of {kind}; use scripts/test/{script}")
