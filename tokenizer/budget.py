"""Budgets: from the text of a budget to one assignment per clip.

Every form that asks a router applies one rule to each clip by itself:

    row = argmax(score - price * tokens)  over the rows of at most `max_tokens` tokens

`router` is price 0 without a limit, `tokens:N` sets the limit, `price:P` sets the price (units of the score per token),
and `average:N` finds the price at which a whole set of clips spends N tokens per clip (`find_price`). `fixed:a,b,c,d`
and `uniform:K` give every clip the same row and need no router.

`quality:Q` asks a router that predicts distances (labels=quality) and inverts the rule:

    row = argmin(tokens)  over the rows whose predicted distance is at most Q

A clip without such a row gets the row of the least predicted distance; `keeps_quality` tells them apart.

Of equal rows the one with the fewest tokens wins, then the smallest row number. A choice depends on no other clip of
the batch.

A router without scores of every row (kind = "blockwise") brings a `Search` of its own, which applies the first rule.

Letters: B clips of a batch, S clips of a whole set, A assignments (rows).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.cli import BUDGET_FORMS as FORMS
from tokenizer.common.errors import UserError

BISECTION_STEPS = 100  # halves the interval past float64 resolution


class Search(Protocol):
    """row_B: the best row of each clip by what its router returned for it, at a price, within a limit."""

    def __call__(
        self, rated: Tensor, price: float = ..., max_tokens: int | None = ..., prefix: Sequence[int] = ...
    ) -> Tensor: ...


@dataclass(frozen=True)
class Budget:
    """A parsed budget. Either `fixed_row` or `max_distance` is set, or the first rule applies with the other fields."""

    text: str
    fixed_row: int | None = None
    max_tokens: int | None = None
    average_tokens: float | None = None  # its price is found later, for the whole set
    price: float = 0.0
    max_distance: float | None = None  # Q of quality:Q, a perceptual distance; lower is better

    @property
    def needs_router(self) -> bool:
        """Whether the choice depends on a router's scores."""
        return self.fixed_row is None


def parse_budget(text: str, space: AssignmentSpace, trade_off: float | None = None) -> Budget:
    """Read one of the forms `router | tokens:N | average:N | price:P | quality:Q | fixed:a,b,c,d | uniform:K`.

    Raises UserError for any other text, for a limit below the smallest assignment, for lengths outside the levels, and
    if `trade_off`, a w_q that is asked for, changes nothing because the budget compares no scores.
    Whether a Q can be reached is the router's to know: `TrainedRouter.check_budget`.
    """
    form, colon, value = text.strip().partition(":")
    if trade_off is not None and form in ("quality", "fixed", "uniform"):
        raise UserError(f"--trade-off {trade_off:g} changes nothing under the budget {text!r}: leave one out")
    match form, colon:
        case "router", "":
            return Budget(text)
        case "tokens", ":":
            limit = _whole_number(text, value)
            _check_reachable(text, limit, space)
            return Budget(text, max_tokens=limit)
        case "average", ":":
            average = _finite_number(text, value)
            _check_reachable(text, average, space)
            return Budget(text, average_tokens=average)
        case "price", ":":
            return Budget(text, price=_finite_number(text, value))
        case "quality", ":":
            return Budget(text, max_distance=_finite_number(text, value))
        case "fixed", ":":
            lengths = [_whole_number(text, part) for part in value.split(",")]
            if len(lengths) != space.num_blocks:
                raise UserError(f"budget {text!r}: {len(lengths)} lengths, but a clip has {space.num_blocks} blocks")
            return Budget(text, fixed_row=_row_of(text, lengths, space))
        case "uniform", ":":
            return Budget(text, fixed_row=_row_of(text, [_whole_number(text, value)] * space.num_blocks, space))
    raise UserError(f"budget {text!r} is none of {FORMS}")


def choose_rows(
    budget: Budget,
    score_BA: Tensor | None,
    space: AssignmentSpace,
    price: float | None = None,
    num_clips: int = 1,
    search: Search | None = None,
    prefix: Sequence[int] = (),
) -> Tensor:
    """The row of each clip under `budget`: int64 of shape (B,), on the CPU.

    score_BA: what the router's `rate` returns for this budget, higher is better: scores, or for `quality:Q` the
    negative predicted distance. May be None for `fixed` and `uniform`, which then answer for `num_clips` clips.
    price: what `find_price` returned for the whole set, needed by `average:N` alone. search: the router's own, which
    reads what its `rate` returned. prefix: lengths that the first blocks must have.
    Raises UserError if the scores or the price are missing, for scores that are not finite, and if the prefix leaves
    no row within the limit.
    """
    if budget.fixed_row is not None:
        return torch.full((num_clips if score_BA is None else len(score_BA),), budget.fixed_row)
    if score_BA is None:
        raise UserError(f"budget {budget.text!r} needs a router; give one, or use uniform:K or fixed:a,b,c,d")
    if budget.average_tokens is None:
        price = budget.price
    elif price is None:
        raise UserError(f"budget {budget.text!r} needs one price for the whole set of clips: find it with find_price")
    if search is not None:
        return search(_finite(score_BA), price, budget.max_tokens, prefix)
    score_BA = _checked_scores(score_BA, space)
    if prefix:
        inside_R = space.rows_with_prefix(prefix)
        check_prefix(space, prefix, budget.max_tokens)
        score_BA = torch.full_like(score_BA, -torch.inf).index_copy(1, inside_R, score_BA[:, inside_R])
    if budget.max_distance is not None:
        fits_BA = score_BA >= -budget.max_distance
        tokens_BA = space.tokens_A.double().where(fits_BA, torch.inf)
        fewest_B1 = tokens_BA.amin(dim=1, keepdim=True)  # inf if no row fits: then all rows compete
        return space.best_row(score_BA.where(tokens_BA == fewest_B1, -torch.inf))
    return space.best_row(score_BA - price * space.tokens_A.double(), budget.max_tokens)  # [B, A] -> [B]


def keeps_quality(budget: Budget, score_BA: Tensor, row_B: Tensor) -> Tensor:
    """Whether the chosen row of each clip is predicted to keep Q of `quality:Q`, bool (B,); True for other budgets."""
    if budget.max_distance is None:
        return torch.ones(len(row_B), dtype=torch.bool)
    return score_BA.cpu().double().gather(1, row_B[:, None])[:, 0] >= -budget.max_distance


def warn_of_missed(budget: Budget, score_BA: Tensor, row_B: Tensor) -> None:
    """Warn of the clips for which no row is predicted to keep Q of `quality:Q`."""
    if missed := int((~keeps_quality(budget, score_BA, row_B)).sum()):
        warnings.warn(
            f"budget {budget.text!r}: no assignment is predicted to keep it for {missed} of {len(row_B)} clips; they "
            "get the assignment of the least predicted distance",
            stacklevel=3,
        )


def check_prefix(space: AssignmentSpace, prefix: Sequence[int], max_tokens: int | None) -> None:
    """Raises UserError if no assignment that begins with `prefix` has at most `max_tokens` tokens."""
    shortest = sum(prefix) + (space.num_blocks - len(prefix)) * space.levels[0]
    if max_tokens is not None and shortest > max_tokens:
        raise UserError(f"budget 'tokens:{max_tokens}': no assignment that begins with {list(prefix)} is that short")


def find_price(score_SA: Tensor, space: AssignmentSpace, average_tokens: float, search: Search | None = None) -> float:
    """The price at which the clips of a whole set spend at most `average_tokens` each on average, and as close to it as
    one price can.

    The mean falls in steps as the price rises; the bisection ends on the lowest price whose mean is not above the wish.
    It is negative if the wish is above what the router would spend by itself. At a step all clips that tie take the
    cheaper row, so identical clips are treated alike, and the mean may stay below the wish. search: see `choose_rows`.
    """
    _check_reachable(f"average:{average_tokens:g}", average_tokens, space)
    if search is None:
        score_SA = _checked_scores(score_SA, space)
    budget = Budget(f"average:{average_tokens:g}", average_tokens=average_tokens)

    def mean_tokens(price: float) -> float:
        return space.tokens_of(choose_rows(budget, score_SA, space, price, search=search)).double().mean().item()

    # At a price that is high enough no difference of scores pays for a token, at one that is low enough any does.
    bound = 1.0
    while mean_tokens(bound) > average_tokens:
        bound *= 2
    while (most := mean_tokens(-bound)) <= average_tokens and most < space.max_tokens:
        bound *= 2
    low, high = -bound, bound
    if most <= average_tokens:
        return low
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        if mean_tokens(middle) <= average_tokens:
            high = middle
        else:
            low = middle
    return high


def _checked_scores(score_BA: Tensor, space: AssignmentSpace) -> Tensor:
    if score_BA.ndim != 2 or score_BA.shape[1] != space.num_rows or len(score_BA) == 0:
        raise UserError(f"scores of shape {tuple(score_BA.shape)} do not rate the {space.num_rows} rows of each clip")
    return _finite(score_BA).detach().cpu().double()  # float64: a price must not round two rows together


def _finite(score: Tensor) -> Tensor:
    if not score.isfinite().all():
        raise UserError("a router's scores are not all finite; its weights are damaged or its input is")
    return score


def _check_reachable(text: str, tokens: float, space: AssignmentSpace) -> None:
    if tokens < space.min_tokens:
        raise UserError(f"budget {text!r} is below the smallest assignment; the minimum is {space.min_tokens} tokens")


def _row_of(text: str, lengths: list[int], space: AssignmentSpace) -> int:
    outside = [length for length in lengths if length not in space.levels]
    if outside:
        levels = ", ".join(map(str, space.levels))
        raise UserError(f"budget {text!r}: {outside[0]} is not a level of this tokenizer; its levels are {levels}")
    return int(space.rows_of(torch.tensor(lengths)))


def _whole_number(text: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"budget {text!r}: {value!r} is not a whole number; the forms are {FORMS}") from None


def _finite_number(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"budget {text!r}: {value!r} is not a finite number; the forms are {FORMS}")
    return number
