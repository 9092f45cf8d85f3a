"""What the two evaluations of a GPT share: flags, models, and one stream of samples for the clips of the list.

Letters: C T H W, K tokens of a block, L codes of the given frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from autoregressive.sample_grid import tokens_of
from autoregressive.sample_job import SamplingModels
from autoregressive.sampler import Request, Sample, Sampler
from autoregressive.sequence import longest_sequence
from evaluations.job import Evaluation, require, token_figures
from evaluations.system import Draft, Made, Source
from tokenizer.common.errors import UserError
from tokenizer.data.video_io import to_uint8

MakeRequest = Callable[[Source], Request]


class Generator(SamplingModels):
    """A GPT with its tokenizer. `request_of` gives the request for a clip of the list."""

    def __init__(self, evaluation: Evaluation, guidance: tuple[float, ...] = (1.0,)) -> None:
        """Raises UserError if weights are missing or do not belong together."""
        require(evaluation.args, "vq_ckpt", "gpt_ckpt")
        super().__init__(evaluation.args, evaluation.device, guidance)
        self.precision = evaluation.args.precision
        self.request_of: MakeRequest | None = None
        self.slots_in_use = 0.0  # share of the sampler's slots, over the steps of its fullest stream
        self._sampler: Sampler | None = None

    def facts(self) -> dict[str, Any]:
        """Weights, and how ids are drawn; the number of slots too, because rounding may change with it."""
        return {
            "tokenizer_sha256": self.tokenizer.sha256,
            "gpt_sha256": self.gpt.sha256,
            "precision": self.precision,
            "tokens_per_block": list(self.rule.forced),
            "max_tokens": self.rule.max_tokens,
            **self.config.facts(),
        }

    @torch.inference_mode()
    def stream(self, sources: Iterable[Source]) -> Iterator[Draft]:
        """Samples in the order in which they end; a slot that becomes free draws the next source."""
        request_of = self.request_of
        assert request_of is not None
        waiting: dict[tuple[int | str, ...], Source] = {}

        def requests() -> Iterator[Request]:
            for source in sources:
                request = request_of(source)
                waiting[request.key] = source
                yield request

        if self._sampler is None:
            self._sampler = Sampler(self.gpt.model, self.config, longest_sequence(self.layout, self.rule))
        before = replace(self._sampler.counts)
        for sample in self._sampler.run(requests()):
            reason = None if sample.broken is None else f"breaks the grammar: {sample.broken}"
            yield Draft(waiting.pop(sample.request.key), sample, reason)
        counts = self._sampler.counts
        if steps := counts.steps - before.steps:
            in_use = (counts.row_steps - before.row_steps) / (steps * self.config.slots)
            self.slots_in_use = max(self.slots_in_use, in_use)

    def finish(self, drafts: Sequence[Draft]) -> list[Made]:
        if not drafts:
            return []
        samples: list[Sample] = [draft.made for draft in drafts]
        video_BCTHW = self.tokenizer.decode(tokens_of(samples, self.layout, self.tokenizer))
        return [
            Made(draft.source, to_uint8(video_CTHW), token_figures(sample.lengths))
            for draft, sample, video_CTHW in zip(drafts, samples, video_BCTHW, strict=True)
        ]


def check_task(generator: Generator, frame_prediction: bool) -> None:
    """Raises UserError for a model of the other kind."""
    if bool(generator.layout.condition_lengths) != frame_prediction:
        kind, script = (
            ("class-to-video", "eval_c2v.sh") if frame_prediction else ("frame prediction", "eval_frame_pred.sh")
        )
        raise UserError(f"{generator.gpt.origin}: is a model of {kind}; use scripts/test/{script}")
