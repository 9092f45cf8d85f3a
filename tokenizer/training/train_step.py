"""One update: the loss of all parts of a batch over all processes, gradients, clipping, and the other player's turn.

What is minimised is (sum of the losses of all parts on all processes) / (sum of their weights). A loss function that
returns a plain mean weighs each part alike, which is exact as long as the parts hold equally many clips. One whose
parts hold unequal numbers of tokens returns `Summed(total, weight)` and is then divided by the global count: never a
mean of means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenizer.common import distributed
from tokenizer.common.device import autocast, derive_seed
from tokenizer.common.errors import UserError
from tokenizer.training.optim import OptimConfig, learning_rate
from tokenizer.training.train_state import Player, RunConfig, TrainState


class Summed(NamedTuple):
    """A loss that is a sum over `weight` things (tokens, say), with gradients."""

    total: Tensor
    weight: float | Tensor


class Tally(NamedTuple):
    """Counts of which only some figures are wanted, those of the sum over all parts and processes."""

    count_K: Tensor
    read: Callable[[Tensor], Mapping[str, float]]


Terms = Mapping[str, Tensor | float | Tally]
LossFn = Callable[[Any, int], tuple[Tensor | Summed, Terms]]
"""(batch, step) -> the loss and its terms: detached scalars, averaged over parts and processes by weight, and vectors
of counts, which are added up, a Tally to be read then."""

Values = dict[str, Any]  # what a step logs: floats, and lists of counts

_ADVERSARYS = {"loss": "adversary/total", "lr": "adversary/lr", "grad_norm": "adversary/grad_norm"}


class NotFinite(Exception):
    """A loss or a gradient is inf or NaN: the update must not be made."""

    def __init__(self, name: str, value: float) -> None:
        super().__init__(f"{name} is {value}")
        self.name, self.value = name, value


class TooManySkipped(UserError):
    """The steps in a row that run.max_skipped allows are used up; the weights are those of the last good update."""


def train_step(run: RunConfig, optim: OptimConfig, state: TrainState, batch: Any, loss_fn: LossFn) -> Values:
    """One step of `state`: the gradients of the learner, those of the adversary unless it rests, then both updates.

    Returns the loss, its terms, the learning rate and the gradient's norm before clipping; the adversary's under
    `adversary/total`, `adversary/lr`, `adversary/grad_norm`. A number that is not finite on any process stops the run
    (UserError) or, where run.max_skipped allows it, makes this a step without update on all of them.
    """
    learner, opponent, adversary = state.learner, state.opponent, state.adversary
    turns = [_Turn(run, optim, learner, loss_fn, state.step, "step")]
    if adversary is not None and opponent is not None:
        turns.append(_Turn(run, adversary.optim, opponent, adversary.loss, state.step, "adversary"))
    parts = split(batch, run.accumulate)
    try:
        for number, part in enumerate(parts):
            for turn in turns:
                with ExitStack() as still:
                    for other in (opponent, learner):
                        if other is not None and other is not turn.player:
                            still.enter_context(other.frozen())
                    turn.play(part, number, len(parts))
        found = [turn.clip() for turn in turns]
        for turn in turns:
            turn.update()
        state.ema.update(state.model, state.step)
        state.skipped_in_a_row = 0
        values = found[0]
        theirs = {_ADVERSARYS.get(name, name): value for turn in found[1:] for name, value in turn.items()}
        state.untold = theirs or state.untold
        values |= theirs
    except NotFinite as problem:
        values = {"loss": math.nan}
        _skip(run, state, problem)
    state.step += 1
    return values | ({"skipped": state.skipped} if run.max_skipped else {})


def split(batch: Any, num_parts: int) -> Sequence[Any]:
    """The batch itself, or the parts that its own `split` gives."""
    if num_parts == 1:
        return [batch]
    if not hasattr(batch, "split"):
        raise UserError(f"run.accumulate={num_parts}: the batches of this stage cannot be split; set run.accumulate=1")
    return batch.split(num_parts)


class _Turn:
    """One player's part in a step. A player that rests does none of it."""

    def __init__(
        self,
        run: RunConfig,
        optim: OptimConfig,
        player: Player,
        loss_fn: Callable[[Any, int], Any],
        step: int,
        name: str,
    ) -> None:
        self.run, self.optim, self.player, self.loss_fn, self.step, self.name = run, optim, player, loss_fn, step, name
        self.figures = _Figures()
        self._assumed = 0.0  # the weight that the gradients were divided by
        player.optimizer.zero_grad(set_to_none=True)

    def play(self, part: Any, number: int, num_parts: int) -> None:
        """Add the gradients of one part of the batch. Raises NotFinite, on every process, before they are touched."""
        place = distributed.rank() * num_parts + number
        torch.manual_seed(derive_seed(self.run.seed, self.name, self.step, *([place] if place else [])))
        device = next(self.player.module.parameters()).device
        with autocast(device, self.run.precision):
            answer = self.loss_fn(part, self.step)
        if answer is None:
            return
        loss, terms = answer
        total, weight = loss if isinstance(loss, Summed) else Summed(loss, 1.0)
        weight_of_all = self.figures.add(total, float(weight), terms)
        _check(self.figures.values())
        if number == 0:  # the later parts are assumed to weigh as much; `clip` makes good for the difference
            self._assumed = weight_of_all * num_parts
        # the gate averages over the processes, but the sum is wanted
        self.player.backward(total * (distributed.num_ranks() / self._assumed), last=number == num_parts - 1)

    def clip(self) -> Values:
        """Make the gradients ready. The turn's figures, none after a rest; NotFinite for a gradient that is not."""
        if not self._assumed:
            return {}
        player, module = self.player, self.player.module
        if self.figures.weight != self._assumed:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._assumed / self.figures.weight)
        rate = learning_rate(self.step, self.run.steps, self.optim)
        for group in player.optimizer.param_groups:
            group["lr"] = rate
        player.scaler.unscale_(player.optimizer)
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), self.optim.clip_norm))
        # with fp16 the scaler skips an overflowing step and lowers its scale; only a scale that ran out is a failure
        if not math.isfinite(norm) and (not player.scaler.is_enabled() or player.scaler.get_scale() < 1):
            broken = (n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
            raise NotFinite(f"the gradient of {next(broken, 'all parameters together')}", norm)
        return self.figures.values() | {"lr": rate, "grad_norm": norm}

    def update(self) -> None:
        """Step the optimiser, and give every process the buffers of rank 0."""
        if self._assumed:
            self.player.scaler.step(self.player.optimizer)
            self.player.scaler.update()
            distributed.copy_from_main(self.player.module.buffers())


class _Figures:
    """The loss and its terms, added up over parts and processes."""

    def __init__(self) -> None:
        self.weight = 0.0
        self._scalars: dict[str, float] = {}
        self._counts: dict[str, Tensor] = {}
        self._readers: dict[str, Callable[[Tensor], Mapping[str, float]]] = {}

    def add(self, total: Tensor, weight: float, terms: Terms) -> float:
        """Take in one part of every process; returns the weight of these parts together."""
        self._readers = {name: term.read for name, term in terms.items() if isinstance(term, Tally)}
        plain = {name: term.count_K if isinstance(term, Tally) else term for name, term in terms.items()}
        counts = {name: x.detach().cpu().double() for name, x in plain.items() if isinstance(x, Tensor) and x.ndim == 1}
        means = {name: float(value) for name, value in plain.items() if name not in counts}
        row = [weight, float(total.detach()), *(weight * value for value in means.values())]
        flat = distributed.sum_over_ranks(torch.cat([torch.tensor(row, dtype=torch.float64), *counts.values()]))
        scalars = dict(zip(("loss", *means), flat[1 : len(row)].tolist(), strict=True))
        self.weight += float(flat[0])
        self._scalars = {name: self._scalars.get(name, 0.0) + value for name, value in scalars.items()}
        for name, piece in zip(counts, flat[len(row) :].split([len(c) for c in counts.values()]), strict=True):
            self._counts[name] = self._counts[name] + piece if name in self._counts else piece
        return float(flat[0])

    def values(self) -> Values:
        """Means by weight, counts, and what is read off them."""
        values: Values = {name: value / self.weight for name, value in self._scalars.items()}
        for name, count_K in self._counts.items():
            values |= self._readers[name](count_K) if name in self._readers else {name: count_K.tolist()}
        return values


def _check(values: Values) -> None:
    """NotFinite for a term that is not; the sum is the last to be blamed: a term that broke it says more."""
    broken = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        name = next((name for name in broken if name != "loss"), "loss")
        raise NotFinite(name, values[name])


def _skip(run: RunConfig, state: TrainState, problem: NotFinite) -> None:
    """Count a step without update; UserError where that is one too many in a row."""
    for player in (state.learner, state.opponent):
        if player is not None:
            player.optimizer.zero_grad(set_to_none=True)
    if run.max_skipped == 0:
        raise UserError(
            f"step {state.step}: {problem}; the run stopped before this update. Started again it resumes from the last "
            "checkpoint: with run.max_skipped=3 it steps over bad batches, with run.allow_changes=true optim.lr=LOWER "
            "it goes on with another rate"
        ) from problem
    state.skipped += 1
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row > run.max_skipped:
        state.step += 1
        raise TooManySkipped(
            f"step {state.step - 1}: {problem}; {state.skipped_in_a_row} steps in a row without an update "
            f"(run.max_skipped={run.max_skipped}). The weights before them are saved; check the data, or go on with "
            "run.allow_changes=true optim.lr=LOWER"
        ) from problem
