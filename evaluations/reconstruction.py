"""rFVD, LPIPS, PSNR, SSIM and tokens of a tokenizer under a named protocol.

    bash scripts/test/eval_reconstruction.sh --protocol mini-recon --tok-config configs/mini/final.yaml \\
        --vq-ckpt ckpts/mini/final.safetensors --router-config configs/mini/router.yaml \\
        --router-ckpt ckpts/mini/router.safetensors --out results/eval/mini-recon

Writes OUT/metrics.json, OUT/per_clip.csv, the protocol card, and pictures of the best, median and worst clip.

Letters: B clips, C T H W, N temporal blocks, S clips of the list, A assignments.
"""

from __future__ import annotations

import argparse

from autoregressive.flags import parse
from evaluations.flags import REQUIRED, add_common_flags
from tokenizer.common.cli import BUDGET_FORMS, TRADE_OFF_HELP, Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Score what a tokenizer reconstructs, under a named protocol.")
    add_common_flags(parser)
    parser.add_argument("--router-config", metavar="R.yaml", help="YAML of the router, checked against its weights")
    parser.add_argument("--router-ckpt", metavar="R", help="weights of the router")
    parser.add_argument("--budget", type=str.strip, default="router", help=f"{BUDGET_FORMS} (default: router)")
    parser.add_argument("--trade-off", type=float, metavar="W_Q", help=TRADE_OFF_HELP)
    return parse(parser, REQUIRED)


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from evaluations.clip_list import ClipList
from evaluations.job import Evaluation, check_tokenizer, require, token_figures
from evaluations.shards import PRICE, made_once
from evaluations.system import Draft, Made, Source
from tokenizer.budget import Budget, choose_rows, find_price, keeps_quality, parse_budget
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.video_io import VideoError, to_model_range, to_uint8
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import TrainedRouter, router_of_flags


def main() -> None:
    args = parse_arguments()
    evaluation = Evaluation(args, "reconstruction")
    if evaluation.run_ours():
        return
    require(args, "vq_ckpt")
    tokenizer = load_tokenizer(args.vq_ckpt, evaluation.device, args.tok_config)
    check_tokenizer(evaluation.protocol, tokenizer)
    budget = parse_budget(args.budget, tokenizer.space, args.trade_off)
    router = router_of_flags(args, tokenizer.config, evaluation.device, budget, dash="-")
    system = Reconstruction(tokenizer, router, budget)
    evaluation.run(system, lambda folder: system.settle_price(folder, evaluation.clips))


class Reconstruction:
    """Encoded and decoded by the tokenizer, with the tokens that the router or the budget gives each clip."""

    def __init__(self, tokenizer: VideoTokenizer, router: TrainedRouter | None, budget: Budget) -> None:
        self.tokenizer, self.router, self.budget = tokenizer, router, budget
        self.price: float | None = None

    def settle_price(self, folder: Path, clips: ClipList) -> None:
        """For `average:N`: the price that the first process found. Another CPU would find another last digit."""
        if self.budget.average_tokens is not None:
            price = made_once(folder / PRICE, lambda: torch.tensor(self._price_of_the_set(clips), dtype=torch.float64))
            self.price = float(price)

    def facts(self) -> dict[str, Any]:
        """Weights and budget; the price follows from them, once it is settled."""
        return {
            "tokenizer_sha256": self.tokenizer.sha256,
            "router_sha256": self.router.sha256 if self.router and self.budget.needs_router else None,
            "budget": self.budget.text,
            **({} if self.price is None else {"price": self.price}),
            "trade_off": self.router.trade_off(self.budget) if self.router and self.budget.needs_router else None,
        }

    def stream(self, sources: Iterable[Source]) -> Iterator[Draft]:
        """Clips in order; everything happens in `finish`."""
        return map(Draft, sources)

    @torch.inference_mode()
    def finish(self, drafts: Sequence[Draft]) -> list[Made]:
        space = self.tokenizer.space
        videos = [to_model_range(draft.source.real.frames_THWC) for draft in drafts if draft.source.real]
        if not videos:
            return []
        video_BCTHW = torch.stack(videos)
        score_BA = self.router.rate(video_BCTHW, self.budget) if self.router and self.budget.needs_router else None
        search = self.router.search if self.router else None
        row_B = choose_rows(self.budget, score_BA, space, self.price, len(drafts), search)
        length_BN = space.lengths_of(row_B)
        ours_BCTHW = self.tokenizer.decode(self.tokenizer.encode(video_BCTHW, length_BN))
        figures = [token_figures(length_N.tolist()) for length_N in length_BN]
        if score_BA is not None and self.budget.max_distance is not None:
            for figure, score_A, row, kept in zip(
                figures, score_BA, row_B, keeps_quality(self.budget, score_BA, row_B), strict=True
            ):
                figure |= {"predicted_distance": -float(score_A[row]), "keeps_quality": bool(kept)}
        return [
            Made(draft.source, to_uint8(ours_CTHW), figure)
            for draft, ours_CTHW, figure in zip(drafts, ours_BCTHW, figures, strict=True)
        ]

    def _price_of_the_set(self, clips: ClipList) -> float:
        """A first pass of the router alone."""
        assert self.router is not None
        scores = []
        for clip in clips.clips:
            try:
                scores.append(self.router.rate(to_model_range(clip.read().frames_THWC)[None], self.budget))
            except VideoError:
                continue  # reported when it is scored
        if not scores or self.budget.average_tokens is None:
            raise UserError("not one clip of the list can be read")
        return find_price(torch.cat(scores), self.tokenizer.space, self.budget.average_tokens, self.router.search)


if __name__ == "__main__":
    run_cli(main)
