"""Use a trained router: load it, and ask it for scores or for lengths under a budget (arXiv 2603.12267).

    router = load_router("ckpts/mini/router.safetensors")
    length_BN = router.assign(video_BCTHW, "tokens:512")

A router trained with labels=quality predicts the quality of every row. From one set of weights it serves every
trade-off (`quality_weight`) and every budget, `quality:Q` among them. A blockwise router (model.kind=blockwise) serves
all budgets but that one, and decides each block of a live stream as soon as its frames are there (`live`).

Letters: B clips, C T H W, N temporal blocks, A assignments (rows).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.budget import Budget, Search, choose_rows, parse_budget, warn_of_missed
from tokenizer.common.clip_shape import check_same_shape, sides
from tokenizer.common.config import differences, from_dict, load_section, to_dict
from tokenizer.common.device import autocast
from tokenizer.common.errors import UserError
from tokenizer.model import TokenizerConfig
from tokenizer.router.blockwise import BEAM, LiveChoice, Rule, search, worth_of
from tokenizer.router.model import BlockwiseRouter, Router, RouterConfig
from tokenizer.router.reward import TOTAL_WEIGHT, TableStats, distance, reward_of_quality
from tokenizer.router.stem import build_stem


class TrainedRouter:
    """A frozen router with its assignments. Made by `load_router`.

    search: None, if `rate` gives a score for every row; else what reads that of a blockwise router.

    quality_weight: the w_q of a router that predicts qualities (labels=quality), within [0, 2]; it may be set anew at
    any time. None of one that has learned a single trade-off.
    stats: of the table that a router of qualities learned from; its predictions are distances by them.
    """

    search: Search | None = None

    def __init__(
        self,
        model: Router,
        sha256: str,
        origin: str,
        quality_weight: float | None = None,
        stats: TableStats | None = None,
    ) -> None:
        """Raises UserError if a router on V-JEPA 2 does not find the weights it learned with."""
        self.quality_weight, self.stats = quality_weight, stats
        self.model = model.eval().requires_grad_(False)
        self.stem = build_stem(model.config, next(model.parameters()).device)
        self.stem.check(model, origin)
        self.sha256 = sha256
        self.origin = origin

    @property
    def config(self) -> RouterConfig:
        return self.model.config

    @property
    def space(self) -> AssignmentSpace:
        return self.model.space

    def scores(self, video_BCTHW: Tensor, together: bool = False) -> Tensor:
        """Pixels in [0, 1] -> score_BA, float32 on the CPU; higher is better, only differences within a clip count.

        Of a router of qualities: the rewards at `quality_weight`. `together`: see `predict`.
        """
        predicted_BA = self.predict(video_BCTHW, together)  # [B, A]
        if self.quality_weight is None:
            return predicted_BA
        return reward_of_quality(predicted_BA, self.space, self.quality_weight).float()  # [B, A]

    def distances(self, video_BCTHW: Tensor, together: bool = False) -> Tensor:
        """Pixels in [0, 1] -> the predicted distance of every row, float64 [B, A] on the CPU; lower is better.

        It is the distance of the proxy's reconstruction, which the table holds. Raises UserError for a router that
        predicts no distances.
        """
        return distance(self.predict(video_BCTHW, together), self._table_stats("predicted distances"))

    def rate(self, video_BCTHW: Tensor, budget: Budget, together: bool = False) -> Tensor:
        """What `budget` compares, [B, A], higher is better: scores, or for `quality:Q` negative distances.

        Raises UserError if the router cannot serve the budget, see `check_budget`.
        """
        self.check_budget(budget)
        if budget.max_distance is not None:
            return -self.distances(video_BCTHW, together)
        return self.scores(video_BCTHW, together)

    def values_of(self, rated_BA: Tensor, row_BR: Tensor, price: float = 0.0) -> Tensor:
        """What a budget at `price` compares of some rows, float64 [B, R]; rated_BA: from `rate`."""
        return rated_BA.double().gather(1, row_BR) - price * self.space.tokens_of(row_BR)

    def live(self, budget: str) -> Callable[[], Callable[[Tensor], int]] | None:
        """Without look-ahead: call it at the start of each clip; what it returns takes the frames of the next block and
        returns its length. None if the router must see the whole clip."""
        return None

    def trade_off(self, budget: Budget) -> float | None:
        """The w_q that a choice under `budget` depends on; None for quality:Q and for a router of one trade-off."""
        return None if budget.max_distance is not None else self.quality_weight

    def check_budget(self, budget: Budget) -> None:
        """Raises UserError for `quality:Q` if the router predicts no distances, or if its table never reached Q."""
        if (most := budget.max_distance) is None:
            return
        stats = self._table_stats(f"budget {budget.text!r}")
        if not stats.lpips_min <= most <= stats.lpips_max:
            raise UserError(
                f"budget {budget.text!r}: the distances of the table that {self.origin} learned from reach from "
                f"{stats.lpips_min:.4g} to {stats.lpips_max:.4g}; give a Q between them"
            )

    def _table_stats(self, wanted: str) -> TableStats:
        if self.quality_weight is None:
            raise UserError(f"{wanted}: {self.origin} predicts no distances; give a router trained with labels=quality")
        if self.stats is None:
            raise UserError(
                f"{wanted}: {self.origin} does not hold the statistics of its table (table_stats); train stage 3 again"
            )
        return self.stats

    @torch.no_grad()
    def predict(self, video_BCTHW: Tensor, together: bool = False) -> Tensor:
        """Pixels in [0, 1] -> the output of the model, float32 [B, A] on the CPU: scores, or standardised qualities.

        Clips are rated one by one in float32, so that no bit depends on the batch or on the precision of a training
        that asks. `together`: all clips at once, for a training on a GPU, in which one by one would take longer than
        the step and a tie may fall either way. Raises UserError for clips of another shape.
        """
        wanted = (3, self.config.num_frames, *sides(self.config.size))
        if video_BCTHW.ndim != 5 or tuple(video_BCTHW.shape[1:]) != wanted:
            raise UserError(f"{self.origin} reads clips of shape {wanted}, not {tuple(video_BCTHW.shape[1:])}")
        device = next(self.model.parameters()).device
        # A matrix product rounds differently for other batch sizes, and the two best rows may be that close.
        parts = [video_BCTHW] if together else video_BCTHW.split(1)
        with autocast(device, "none"):  # bf16 would make near-best rows equal
            return torch.cat([self.model(self.stem(part.to(device))).float().cpu() for part in parts])  # [B, A]

    def assign(
        self,
        video_BCTHW: Tensor,
        budget: str | Budget = "router",
        price: float | None = None,
        together: bool = False,
        prefix: Sequence[int] = (),
    ) -> Tensor:
        """length_BN, int64 on the CPU: the assignment of each clip under `budget` (forms: see tokenizer.budget).

        `price` goes with `average:N`: what `find_price` returned for the scores of the whole set. `together`: see
        `predict`. prefix: lengths that the first blocks must have. Warns of clips for which no row is predicted to keep
        Q of `quality:Q`: they get the best predicted.
        """
        if isinstance(budget, str):
            budget = parse_budget(budget, self.space)
        score_BA = self.rate(video_BCTHW, budget, together) if budget.needs_router else None
        row_B = choose_rows(budget, score_BA, self.space, price, len(video_BCTHW), self.search, prefix)  # [B]
        if score_BA is not None:
            warn_of_missed(budget, score_BA, row_B)
        return self.space.lengths_of(row_B)


class TrainedBlockwise(TrainedRouter):
    """A frozen router that rates the levels of one block after the other (blockwise.py).

    `rate` gives the states of the blocks, [B, N, D], which `search` reads. Without a limit each block is decided by
    itself, as in a live stream; within tokens:N a beam looks ahead in the clip.
    """

    model: BlockwiseRouter

    def __init__(
        self,
        model: BlockwiseRouter,
        sha256: str,
        origin: str,
        quality_weight: float | None = None,
        stats: TableStats | None = None,
    ) -> None:
        super().__init__(model, sha256, origin, quality_weight, stats)
        self._head = copy.deepcopy(model.block_head).double().cpu()
        self.search = self._search

    def scores(self, video_BCTHW: Tensor, together: bool = False) -> Tensor:
        raise UserError(f"{self.origin} rates blocks, not whole assignments: this needs model.kind=table")

    def rate(self, video_BCTHW: Tensor, budget: Budget, together: bool = False) -> Tensor:
        self.check_budget(budget)
        return self.predict(video_BCTHW, together)

    def check_budget(self, budget: Budget) -> None:
        if budget.max_distance is not None:
            raise UserError(
                f"budget {budget.text!r}: {self.origin} decides block by block and predicts no distance of a whole "
                "assignment; give a router of model.kind=table trained with labels=quality"
            )

    def values_of(self, rated_BA: Tensor, row_BR: Tensor, price: float = 0.0) -> Tensor:
        return worth_of(rated_BA, self._head, self._rule(price), row_BR)

    @torch.no_grad()
    def live(self, budget: str) -> Callable[[], Callable[[Tensor], int]] | None:
        parsed = parse_budget(budget, self.space)
        if not parsed.needs_router or parsed.average_tokens is not None:
            return None
        self.check_budget(parsed)
        return lambda: LiveChoice(self.model, self._head, self._rule(parsed.price, parsed.max_tokens))

    def _rule(self, price: float, max_tokens: int | None = None, prefix: Sequence[int] = ()) -> Rule:
        return Rule(self.space, self.quality_weight, price, max_tokens, prefix)

    def _search(
        self, rated: Tensor, price: float = 0.0, max_tokens: int | None = None, prefix: Sequence[int] = ()
    ) -> Tensor:
        width = 1 if max_tokens is None else BEAM
        return search(rated, self._head, self._rule(price, max_tokens, prefix), width)[:, 0]


def load_router(
    path: str | Path,
    device: str | torch.device = "cpu",
    config_path: str | Path | None = None,
    quality_weight: float | None = None,
) -> TrainedRouter:
    """A trained router from a .safetensors file, a folder, or "owner/name" on the hub; the config is inside the file.

    quality_weight: another w_q than the file's, within [0, 2], for a router trained with labels=quality; UserError for
    any other.
    `config_path`: a YAML whose `model` section must agree with it. Raises UserError naming both files and every
    differing key if it does not, and for damaged, pickled or foreign files.
    """
    model = Router.from_pretrained(path)
    config, file_config = model.config, model.file_config
    if config_path is not None:
        wanted = load_section(RouterConfig, config_path, "model")
        config.vjepa2.encoder = wanted.vjepa2.encoder  # the path of the weights may differ; their sha256 is checked
        if different := differences(to_dict(wanted), to_dict(config)):
            raise UserError(f"{config_path} and {path} do not belong together; model differs in {'; '.join(different)}")
    predicts_quality = file_config.get("labels") == "quality"
    if quality_weight is not None and not predicts_quality:
        raise UserError(
            f"{path} has learned one trade-off: only a router trained with labels=quality takes another w_q"
        )
    if quality_weight is not None and not 0 <= quality_weight <= TOTAL_WEIGHT:
        raise UserError(f"w_q = {quality_weight:g} must lie within [0, {TOTAL_WEIGHT:g}]")
    stats = None
    if predicts_quality:
        quality_weight = file_config["quality_weight"] if quality_weight is None else quality_weight
        stored: Any = file_config.get("table_stats")  # absent from files of the first routers of qualities
        stats = from_dict(TableStats, stored, f"{path} (table_stats)") if stored else None
    if isinstance(model, BlockwiseRouter):
        return TrainedBlockwise(model.to(device), model.sha256, str(path), quality_weight, stats)
    return TrainedRouter(model.to(device), model.sha256, str(path), quality_weight, stats)


def check_router_fits(router: TrainedRouter, tokenizer: TokenizerConfig) -> None:
    """Raises UserError if router and tokenizer differ in levels, blocks, or the shape of a clip."""
    ours, theirs = router.config, tokenizer
    if list(ours.levels) != list(theirs.levels) or ours.num_blocks != theirs.num_blocks:
        raise UserError(
            f"{router.origin} chooses among levels {list(ours.levels)} for {ours.num_blocks} blocks, but the tokenizer "
            f"has levels {list(theirs.levels)} for {theirs.num_blocks} blocks; use a router trained on its table"
        )
    check_same_shape(theirs, "the tokenizer", ours, router.origin, "use a router trained for it")


def router_of_flags(
    args: argparse.Namespace, tokenizer: TokenizerConfig, device: torch.device, budget: Budget, dash: str = "_"
) -> TrainedRouter | None:
    """The router of --router_ckpt, --router_config and --trade-off, on `device`; None if none is given.

    Raises UserError if the budget needs one, and if it does not fit the tokenizer or cannot serve the budget. dash: how
    the command spells its flags.
    """
    if args.router_ckpt is None:
        if args.router_config is not None:
            raise UserError(f"--router{dash}config without --router{dash}ckpt: give the weights too, or neither")
        if budget.needs_router:
            raise UserError(
                f"--budget {budget.text} needs a router: give --router{dash}ckpt, or a budget without one, such as "
                f"uniform:{tokenizer.levels[-1]}"
            )
        return None
    router = load_router(args.router_ckpt, device, args.router_config, args.trade_off)
    check_router_fits(router, tokenizer)
    router.check_budget(budget)
    return router
