"""One update: gradients of all parts of a batch over all processes, clipping, and the commit of all networks or none.

The loss that is minimised is (sum of the losses of all parts on all processes) / (sum of their weights). A loss
function that returns a plain mean gives each part the same weight, which is exact if the parts hold equally many
clips. If they hold unequal numbers of tokens it returns `Summed(total, weight)`, divided by the global count.

A step first computes everything and changes nothing that lasts. Then `commit` checks that every number is finite on
every process; only then optimisers, scalers, buffers (spectral norm, LeCam) and the averaged weights move. Otherwise
the step is skipped, for all networks.

A GPU checks for itself whether the numbers are finite. The host reads the verdict and the figures a step later, so
that neither waits for the other; with fp16 it reads them at once.
"""

from __future__ import annotations

import logging
import math
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenizer.common import distributed
from tokenizer.common.device import autocast, derive_seed, send
from tokenizer.common.errors import UserError
from tokenizer.training.optim import Rewarm, learning_rate, set_rate
from tokenizer.training.train_state import SKIP_WINDOW, RunConfig, Trainable, TrainState

log = logging.getLogger(__name__)


class Summed(NamedTuple):
    """A loss that is a sum over `weight` things (e.g. tokens), with gradients."""

    total: Tensor
    weight: float | Tensor


class Tally(NamedTuple):
    """Counts that are added up over parts and processes; `read` turns the sum into the figures to log."""

    count_K: Tensor
    read: Callable[[Tensor], Mapping[str, float]]


Terms = Mapping[str, Tensor | float | Tally]
LossFn = Callable[[Any, int], tuple[Tensor | Summed, Terms]]
"""(batch, step) -> the loss and its terms: detached scalars, averaged over parts and processes by weight, and vectors
of counts, which are added up."""

Values = dict[str, Any] | UserDict[str, Any]  # what a step logs: floats, and lists of counts
StepFn = Callable[[Any], Values]
"""batch -> what to log, after one whole step of a TrainState; reading it may wait for a GPU, see `Step`."""


class Fetched:
    """A tensor on its way to the CPU; `read` waits for it."""

    def __init__(self, x: Tensor) -> None:
        self._copy = x.to("cpu", non_blocking=True)  # torch pins what it copies to
        self._arrived = torch.cuda.Event() if x.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(x.device))

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


class NotFinite(Exception):
    """A loss, a term or a gradient is inf or NaN: the update must not be made."""

    def __init__(self, network: Trainable, name: str, value: float) -> None:
        name = name if network.name == "model" else f"{network.name}/{name}"
        super().__init__(f"{name} is {value}")
        self.network = network


class TooManySkipped(UserError):
    """More updates were skipped than run.max_skipped allows; the weights are those of the last good update."""


def train_step(run: RunConfig, state: TrainState, batch: Any, loss_fn: LossFn) -> Values:
    """One step of the model alone; returns its loss and terms, learning rate and gradient norm before clipping."""
    update = Update(state.main, run, state.step)
    parts = split(batch, run.accumulate)
    for number, part in enumerate(parts):
        with update.forward(number, len(parts)):
            loss, terms = loss_fn(part, state.step)
        update.backward(loss, terms)
    return commit(run, state, [update])


def split(batch: Any, num_parts: int) -> Sequence[Any]:
    """The batch itself, or the parts that its own `split` gives."""
    if num_parts == 1:
        return [batch]
    if not hasattr(batch, "split"):
        raise UserError(f"run.accumulate={num_parts}: the batches of this stage cannot be split; set run.accumulate=1")
    return batch.split(num_parts)


def commit(run: RunConfig, state: TrainState, updates: Sequence[Update]) -> Values:
    """Make all updates of a step if every number is finite on every process, else none; the step is counted.

    Returns what to log. Raises UserError for numbers that are not finite if run.max_skipped is 0, TooManySkipped if
    more than so many of a network's last 100 updates were skipped; on a GPU of the step before, or once this step's
    values are read. With fp16 an overflow of the gradients is no failure: the update is left out and the scale is
    lowered, as GradScaler does, unless the scale fell below 1.
    """
    for update in updates:
        update.finish(state.rewarm)
    try:
        state.settle()  # the step before: its averages need the weights that this one is about to change
    except UserError:
        for update in updates:
            update.drop()
        raise
    step = Step(run, state, updates)
    state.step += 1
    if not state.late:
        return step.data
    finite = torch.stack([update.finite for update in updates]).all()
    for update in updates:
        update.apply_if(finite)
    state.unsettled = step
    return step


class Step(UserDict[str, Any]):
    """The values of a step, read from the device when one looks at them, or by `TrainState.settle`.

    Reading also does what hangs on the verdict: the averaged weights, the count of skipped updates.
    """

    def __init__(self, run: RunConfig, state: TrainState, updates: Sequence[Update]) -> None:
        self._run, self._state, self._updates, self._number = run, state, updates, state.step
        self._found = Fetched(torch.cat([update.found for update in updates]))

    @cached_property
    def data(self) -> dict[str, Any]:  # type: ignore[override]
        """Raises as `commit` does."""
        run, state, updates, self._updates = self._run, self._state, self._updates, []
        state.unsettled = None
        found = self._found.read().split([len(update.found) for update in updates])
        try:
            for update, part in zip(updates, found, strict=True):
                update.read(part)
        except NotFinite as problem:
            if not state.late:
                for update in updates:
                    update.drop()
            return _skip(run, state, problem, self._number)
        values = {name: value for update in updates for name, value in update.values().items()}
        overflowed = any(update.overflowed for update in updates)
        if not state.late:
            for update in updates:
                update.drop() if overflowed else update.apply()
        if not overflowed:
            state.ema.update(state.model, self._number)
            if theirs := {name: value for name, value in values.items() if name.startswith("discriminator/")}:
                state.unlogged = theirs
        return values | _skips(run, state)


class Update:
    """The gradients of one network in one step, until they are applied or dropped."""

    def __init__(self, network: Trainable, run: RunConfig, step: int) -> None:
        self.network, self.run, self.step = network, run, step
        self.figures = _Figures()
        self.overflowed = False
        self._part, self._num_parts = 0, 1
        self._unequal = self._unscaled = False
        self._norm = self._rate = 0.0
        # spectral norm, LeCam and batch norm move in forward
        self._buffers = [buffer.clone() for buffer in network.buffers]
        network.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def forward(self, number: int, num_parts: int) -> Iterator[None]:
        """Around the loss of part `number`: its seed, which depends on step, part and process, and the precision."""
        self._part, self._num_parts = number, num_parts
        place = distributed.rank() * num_parts + number
        torch.manual_seed(derive_seed(self.run.seed, "step", self.step, *([place] if place else [])))
        with autocast(self.network.optimizer.param_groups[0]["params"][0].device, self.run.precision):
            yield

    def backward(self, loss: Tensor | Summed, terms: Terms) -> None:
        """Add the gradients of one part of the batch."""
        total, weight = loss if isinstance(loss, Summed) else Summed(loss, 1.0)
        self.figures.add(total, weight, terms)
        if self._part == 0:  # the weight that gradients are divided by; the later parts are assumed to weigh as much
            self._assumed = self.figures.weight * self._num_parts
        self._unequal |= self._part > 0 and isinstance(loss, Summed)
        # DDP averages over the processes, but the sum is wanted
        factor = (distributed.num_ranks() / self._assumed).to(total.dtype)
        self.network.backward(total * factor, self._part == self._num_parts - 1)

    def finish(self, rewarm: Rewarm | None = None) -> None:
        """Scale and clip the gradients, find the learning rate; `found` is what the host will read."""
        network = self.network
        if self._unequal:
            for parameter in network.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._assumed / self.figures.weight)
        network.scaler.unscale_(network.optimizer)
        self._unscaled = True
        self._rate = learning_rate(self.step, self.run.steps, network.optim, rewarm)
        learned = [(name, p, p.grad) for name, p in network.module.named_parameters() if p.grad is not None]
        self._names = [name for name, _, _ in learned]
        norm_P = torch.stack(torch._foreach_norm([grad for _, _, grad in learned]))
        norm = torch.linalg.vector_norm(norm_P)
        nn.utils.clip_grads_with_norm_([p for _, p, _ in learned], network.optim.clip_norm, norm)
        self.found = torch.cat([norm[None], norm_P, self.figures.row])
        self.finite = self.found.isfinite().all()

    def read(self, found: Tensor) -> None:
        """Take in `found`, now on the CPU. Raises NotFinite, on all processes alike."""
        network, norm_P = self.network, found[1 : 1 + len(self._names)]
        self.figures.row, self._norm = found[1 + len(self._names) :], float(found[0])
        for name, value in self.figures.blamed():
            if not math.isfinite(value):
                raise NotFinite(network, name, value)
        if math.isfinite(self._norm):
            return
        if network.scaler.is_enabled() and network.scaler.get_scale() >= 1:
            self.overflowed = True
            return
        broken = (name for name, norm in zip(self._names, norm_P.tolist(), strict=True) if not math.isfinite(norm))
        raise NotFinite(network, f"the gradient of {next(broken, 'all parameters together')}", self._norm)

    def apply(self) -> None:
        """Give every process the buffers of rank 0, and step the optimiser."""
        distributed.copy_from_main(self.network.buffers)
        set_rate(self.network.optimizer, self._rate)
        self.network.scaler.step(self.network.optimizer)
        self.network.scaler.update()

    def apply_if(self, finite: Tensor) -> None:
        """The same on a device that looks for itself: if `finite`, a bool there, is False, nothing changes."""
        network, optimizer = self.network, self.network.optimizer
        for buffer, before in zip(network.buffers, self._buffers, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        distributed.copy_from_main(network.buffers)
        set_rate(optimizer, self._rate)
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # how a gradient scaler tells AdamW
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]

    def drop(self) -> None:
        """Leave everything as it was before the step, but for a scale that an overflow lowers."""
        network = self.network
        for buffer, before in zip(network.buffers, self._buffers, strict=True):
            buffer.copy_(before)
        if self._unscaled:  # also frees the scaler for its next `unscale_`
            network.overflows += self.overflowed
            network.scaler.update(None if self.overflowed else network.scaler.get_scale())
        network.optimizer.zero_grad(set_to_none=True)

    def values(self) -> dict[str, Any]:
        """Loss, terms, learning rate and gradient norm; a discriminator's under `discriminator/`."""
        values = self.figures.values() | {"lr": self._rate, "grad_norm": self._norm}
        prefix = "" if self.network.name == "model" else f"{self.network.name}/"
        return {prefix + name: value for name, value in values.items()}


class _Figures:
    """The loss and its terms, added up over parts and processes, as one row of float64 on their device.

    row: weight, loss, the other scalars times their weight, counts.
    """

    row: Tensor

    def add(self, total: Tensor, weight: float | Tensor, terms: Terms) -> None:
        """Take in one part of every process; the only exchange of a part."""
        plain = {name: term.count_K if isinstance(term, Tally) else term for name, term in terms.items()}
        scalars: dict[str, Tensor] = {"loss": _float64(total, total.device)}
        counts: dict[str, Tensor] = {}
        for name, value in plain.items():
            value = _float64(value, total.device)
            (counts if value.ndim else scalars)[name] = value
        loss, *others = scalars.values()
        each = _float64(weight, total.device)
        # a Summed loss is a sum already; terms are means
        row = torch.cat([torch.stack([each, loss, *(other * each for other in others)]), *counts.values()])
        row = distributed.sum_over_ranks(row)
        self.row = self.row + row if hasattr(self, "row") else row
        self._names, self._sizes = list(scalars), {name: len(count_K) for name, count_K in counts.items()}
        self._readers = {name: term.read for name, term in terms.items() if isinstance(term, Tally)}

    @property
    def weight(self) -> Tensor:
        return self.row[0]

    def means(self) -> dict[str, float]:
        """By weight; once `row` is on the CPU, as for the methods below."""
        weight, *sums = self.row[: 1 + len(self._names)].tolist()
        return {name: value / weight for name, value in zip(self._names, sums, strict=True)}

    def blamed(self) -> list[tuple[str, float]]:
        """(name, mean) of every scalar, the loss last: a term that broke the sum says more."""
        return sorted(self.means().items(), key=lambda x: x[0] == "loss")

    def values(self) -> dict[str, Any]:
        """Means, counts, and the figures computed from them."""
        values: dict[str, Any] = self.means()
        counts = self.row[1 + len(self._names) :].split([*self._sizes.values()])
        for name, count_K in zip(self._sizes, counts, strict=True):
            values |= self._readers[name](count_K) if name in self._readers else {name: count_K.tolist()}
        return values


def _float64(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return send(value.detach(), device).double()
    return torch.full((), value, dtype=torch.float64, device=device)


def _skip(run: RunConfig, state: TrainState, problem: NotFinite, step: int) -> dict[str, Any]:
    """Count a skipped update for the network whose number was not finite. UserError if it is one too many."""
    network = problem.network
    if run.max_skipped == 0:
        raise UserError(
            f"step {step}: {problem}; the run stopped before this update. Rerun the same command to resume from the "
            "last checkpoint; run.max_skipped=3 skips bad batches, run.allow_changes=true optim.lr=LOWER goes on with "
            "another learning rate"
        ) from problem
    network.skipped += 1
    oldest = step - SKIP_WINDOW * network.every
    network.skipped_at = [*(at for at in network.skipped_at if at > oldest), step]
    number = len(network.skipped_at)
    log.warning(
        "step %d: %s; update skipped (%d of the %s's last %d)", step, problem, number, network.name, SKIP_WINDOW
    )
    if number > run.max_skipped:
        raise TooManySkipped(
            f"step {step}: {problem}; {number} of the last {SKIP_WINDOW} updates of the {network.name} were skipped "
            f"(run.max_skipped={run.max_skipped}). The last good weights are saved; check the data, or go on with "
            "run.allow_changes=true optim.lr=LOWER"
        ) from problem
    return {"loss": math.nan} | _skips(run, state)


def _skips(run: RunConfig, state: TrainState) -> dict[str, int]:
    """How many updates each network skipped so far, if they may be skipped at all."""
    values: dict[str, int] = {}
    for network in state.trainables:
        prefix = "" if network.name == "model" else f"{network.name}/"
        values |= {f"{prefix}skipped": network.skipped} if run.max_skipped else {}
        values |= {f"{prefix}overflows": network.overflows} if network.scaler.is_enabled() else {}
    return values
