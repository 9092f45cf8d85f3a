"""Assignments without a table: how a blockwise router chooses, and what it learns.

The head gives a number for every level of block t, from the frames of blocks <= t and the levels of blocks < t:

    labels=hard, soft   logits of p(k_t | blocks <= t, k_1 .. k_t-1); a prefix is worth the log of its probability
    labels=quality      the quality expected of the clip if block t gets that level, whatever follows; a prefix is worth
                        w_q * quality - w_l * tokens / std, so one router serves every w_q

A beam of width W extends W prefixes by one block and keeps the best W. Width 1 decides block t for good as soon as its
frames are there: a live stream. A wider one looks ahead within the clip, as a limit on its tokens needs.

Letters: B clips, N blocks, m levels, W prefixes of a beam, D width, G prefixes of a training step, R measured rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.budget import check_prefix
from tokenizer.common.device import autocast
from tokenizer.router.model import BlockHead, BlockwiseRouter
from tokenizer.router.reward import TOTAL_WEIGHT, best_uniform, reward_percentile

BEAM = 16  # prefixes, if a limit on the tokens of a clip is to be kept


@dataclass(frozen=True)
class Rule:
    """What a choice obeys. `quality_weight`: the w_q of a head that predicts qualities; None for one of logits."""

    space: AssignmentSpace
    quality_weight: float | None = None
    price: float = 0.0  # a token, in units of a prefix's worth
    max_tokens: int | None = None
    prefix: Sequence[int] = ()  # lengths of the first blocks, given

    @property
    def cost(self) -> float:
        """Of a token: its price, and its part in the reward."""
        w_q = self.quality_weight
        return self.price + (0.0 if w_q is None else (TOTAL_WEIGHT - w_q) / self.space.tokens_std)


@dataclass(frozen=True, eq=False)
class Beam:
    """Prefixes of each clip, the best first."""

    place_BWt: Tensor  # int64, places of the levels chosen
    before_BWD: Tensor  # the sum of the head's vectors for them
    worth_BW: Tensor  # float64, without the cost of tokens; -inf if a limit or a given length is not kept
    tokens_BW: Tensor  # int64

    @staticmethod
    def start(num_clips: int, head: BlockHead) -> Beam:
        width = head.chosen_NmD.shape[2]
        zero_BW = torch.zeros(num_clips, 1, dtype=torch.double)
        empty = torch.zeros(num_clips, 1, 0, dtype=torch.long)
        return Beam(empty, torch.zeros(num_clips, 1, width, dtype=torch.double), zero_BW, zero_BW.long())

    def extend(self, state_BD: Tensor, head: BlockHead, rule: Rule, width: int) -> Beam:
        """By block t: all children of all prefixes, of which the best `width` stay; of equals those of fewer tokens."""
        t, space = self.place_BWt.shape[2], rule.space
        level_m = torch.tensor(space.levels)
        out_BWm = head(state_BD[:, None], self.before_BWD)
        if rule.quality_weight is None:
            worth_BWm = self.worth_BW[..., None] + out_BWm.log_softmax(dim=-1)
        else:
            worth_BWm = rule.quality_weight * out_BWm
        tokens_BWm = self.tokens_BW[..., None] + level_m
        refused_BWm = self.worth_BW[..., None].isneginf().expand_as(worth_BWm)
        if rule.max_tokens is not None:
            rest = (space.num_blocks - 1 - t) * space.levels[0]  # the least that later blocks take
            refused_BWm = refused_BWm | (tokens_BWm + rest > rule.max_tokens)
        if t < len(rule.prefix):
            refused_BWm = refused_BWm | (level_m != rule.prefix[t])
        worth_BWm = worth_BWm.masked_fill(refused_BWm, -torch.inf)
        best_BW = _best((worth_BWm - rule.cost * tokens_BWm).flatten(1), tokens_BWm.flatten(1), width)
        parent_BW, place_BW = best_BW // len(level_m), best_BW % len(level_m)
        before_BWD = self.before_BWD.take_along_dim(parent_BW[..., None], dim=1) + head.chosen_NmD[t, place_BW]
        place_BWt = torch.cat([self.place_BWt.take_along_dim(parent_BW[..., None], 1), place_BW[..., None]], dim=2)
        worth_BW, tokens_BW = (x_BWm.flatten(1).gather(1, best_BW) for x_BWm in (worth_BWm, tokens_BWm))
        return Beam(place_BWt, before_BWD, worth_BW, tokens_BW)


def _best(value_BK: Tensor, tokens_BK: Tensor, width: int) -> Tensor:
    order_BK = tokens_BK.argsort(dim=1, stable=True)
    best_BK = value_BK.gather(1, order_BK).argsort(dim=1, descending=True, stable=True)
    return order_BK.gather(1, best_BK[:, :width])


@torch.no_grad()
def search(state_BND: Tensor, head: BlockHead, rule: Rule, width: int) -> Tensor:
    """row_BW, int64: the assignments that a beam ends with, the best first.

    `head`: in float64 on the CPU, so that a choice does not depend on how many clips are asked together. Raises
    UserError if the prefix leaves no assignment within `max_tokens`.
    """
    check_prefix(rule.space, rule.prefix, rule.max_tokens)
    beam = Beam.start(len(state_BND), head)
    for state_BD in state_BND.double().unbind(dim=1):
        beam = beam.extend(state_BD, head, rule, width)
    return rule.space.rows_of(torch.tensor(rule.space.levels)[beam.place_BWt])


@torch.no_grad()
def worth_of(state_BND: Tensor, head: BlockHead, rule: Rule, row_BR: Tensor) -> Tensor:
    """What `rule` compares of whole assignments, float64 [B, R]."""
    place_BRN = rule.space.places_of(row_BR)
    chosen_BRND = head.chosen_NmD[torch.arange(rule.space.num_blocks), place_BRN]
    out_BRNm = head(state_BND.double()[:, None], chosen_BRND.cumsum(dim=2) - chosen_BRND)
    if rule.quality_weight is None:
        worth_BR = out_BRNm.log_softmax(dim=-1).gather(-1, place_BRN[..., None])[..., 0].sum(dim=-1)
    else:
        worth_BR = rule.quality_weight * out_BRNm[:, :, -1].gather(-1, place_BRN[:, :, -1:])[..., 0]
    return worth_BR - rule.cost * rule.space.tokens_of(row_BR)


class LiveChoice:
    """The lengths of one clip, each as soon as the frames of its block are there."""

    def __init__(self, model: BlockwiseRouter, head: BlockHead, rule: Rule) -> None:
        self._model, self._head, self._rule = model, head, rule
        self._past, self._beam = model.no_past(), Beam.start(1, head)

    @torch.no_grad()
    def __call__(self, block_BCTHW: Tensor) -> int:
        """The next block, [1, 3, T, H, W] in [0, 1] -> its length."""
        t = self._beam.place_BWt.shape[2]
        with autocast(block_BCTHW.device, "none"):
            state_BD, self._past = self._model.step(block_BCTHW, t, self._past)
        self._beam = self._beam.extend(state_BD.double().cpu(), self._head, self._rule, 1)
        return self._rule.space.levels[int(self._beam.place_BWt[0, 0, t])]


# --- training --------------------------------------------------------------------------------------------------------


def draw_rows(measured_BR: Tensor, num: int, random_BR: Tensor) -> Tensor:
    """index_BG, int64: `num` measured rows of each clip, without repetition; random_BR: uniform numbers that decide."""
    return random_BR.masked_fill(~measured_BR, -1.0).topk(min(num, int(measured_BR.sum(dim=1).min())), dim=1).indices


def block_targets(value_BR: Tensor, place_BRN: Tensor, index_BG: Tensor, num_levels: int, reduce: str) -> Tensor:
    """What the head learns at each block of the drawn rows, from the measured rows that share the prefix: [B, G, N, m].

    value_BR: rewards or qualities, NaN if not measured. reduce: over the rows that begin with blocks < t of row g and
    give block t this level, "max" (the best continuation), "logsumexp" (soft) or "mean". NaN or -inf if there is none.

    Every prefix that was measured teaches, not only that of the best row: its lengths tell what comes later in the
    clip, which a router does not know when it chooses them.
    """
    there_BR = ~value_BR.isnan()
    shares_BGR = there_BR[:, None].expand(-1, index_BG.shape[1], -1)  # rows that begin like row g
    target_BGtm = []
    for place_BR in place_BRN.unbind(dim=2):
        per_level = []
        for level in range(num_levels):
            here_BGR = shares_BGR & (place_BR == level)[:, None]
            if reduce == "mean":
                sums_BG = value_BR.nan_to_num()[:, None].where(here_BGR, 0.0).sum(dim=2)
                per_level.append(sums_BG / here_BGR.sum(dim=2))  # 0 / 0 is NaN
            else:
                inside_BGR = value_BR[:, None].where(here_BGR, -torch.inf)
                per_level.append(inside_BGR.amax(dim=2) if reduce == "max" else inside_BGR.logsumexp(dim=2))
        target_BGtm.append(torch.stack(per_level, dim=2))
        shares_BGR = shares_BGR & (place_BR[:, None] == place_BR.gather(1, index_BG)[..., None])
    return torch.stack(target_BGtm, dim=2)


def measure_rows(row_S: Tensor, rows_SR: Tensor, reward_SR: Tensor, space: AssignmentSpace) -> dict[str, float]:
    """Chosen rows against the best measured: equal rows and blocks, mean tokens; of whole tables the percentile too."""
    best_S = rows_SR.gather(1, reward_SR.argmax(dim=1, keepdim=True))[:, 0]
    figures = {
        "top1": (row_S == best_S).double().mean().item(),
        "same_blocks": (space.lengths_of(row_S) == space.lengths_of(best_S)).double().mean().item(),
        "mean_tokens": space.tokens_of(row_S).double().mean().item(),
        "best_tokens": space.tokens_of(best_S).double().mean().item(),
    }
    if rows_SR.shape[1] == space.num_rows:
        figures["percentile"] = reward_percentile(reward_SR, row_S)
        figures["best_uniform"] = best_uniform(reward_SR, space)[1]
    return figures
