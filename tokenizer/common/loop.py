"""The beat of every training: step, log, validate, save. Each stage brings its batches and its loss.

A run can be killed at any moment and started again with the same command; on CPU it then ends with the same bits.
Three rules make that true: batches are a function of the step, every random draw is a function of (seed, step), and
the learning rate is a function of the step. What is left to remember is TrainState.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tokenizer.common import ranks
from tokenizer.common.background import BackgroundWriter
from tokenizer.common.checkpoint import CheckpointStore, atomic_write, file_sha256, save_model
from tokenizer.common.compiled import not_compiled
from tokenizer.common.errors import UserError
from tokenizer.common.optim import OptimConfig
from tokenizer.common.reporter import Reporter
from tokenizer.common.run_config import RunConfig
from tokenizer.common.runtime import pick_device, set_deterministic, slow_precision
from tokenizer.common.state import Adversary, TrainState
from tokenizer.common.step import LossFn, Summed, TooManySkipped, train_step
from tokenizer.common.survive import claim, note_unreadable, only_run_in, stop_signals

__all__ = [
    "Adversary",
    "LossFn",
    "RunConfig",
    "Summed",
    "TrainState",
    "fit",
    "num_clips",
    "portion",
    "start_run",
    "train_step",
]


def start_run(run: RunConfig) -> torch.device:
    """Threads, seeds, kernels, the run's other processes: an entry point calls it before it builds the model."""
    ranks.join(on_cpu=run.device == "cpu" or not torch.cuda.is_available())
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    set_deterministic(run.seed)
    return pick_device(run.device)


def fit(
    run: RunConfig,
    optim: OptimConfig,
    config: Mapping[str, Any],
    state: TrainState,
    batches: Callable[[int], Iterator[Any]],
    loss_fn: LossFn,
    validate: Callable[[int], Mapping[str, float]] | None = None,
    finish: Callable[[], None] | None = None,
) -> None:
    """Train `state` in `run.dir` up to `run.steps`, resuming by itself, and write `final/`.

    `config` is the whole config as plain data; it is stored with the run and inside the weights. `batches(s)` yields
    the batches from step s on. `loss_fn(batch, step)` returns the loss and its terms (detached scalars); what it
    draws at random comes from `generator_for(seed, name, step)` or torch's global generator, reseeded at every step.
    `validate(step)` and `finish()` run with the averaged weights, in eval mode, without gradients.

    Raises UserError for a folder of another run and for a loss or gradient that is not finite (naming step and term),
    KeyboardInterrupt after SIGINT or SIGTERM, once a checkpoint is saved.
    """
    if not run.dir:
        raise UserError("run.dir is empty: name the results folder, run.dir=DIR")
    folder = Path(run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    start_run(run)
    with only_run_in(folder) if ranks.is_main() else nullcontext():
        if ranks.is_main():
            claim(folder, config, run.allow_changes)
            if warning := slow_precision(state.device, run.precision):
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        store = CheckpointStore(folder / "checkpoints", run.keep_last, run.keep_every)
        if state.load(store) and ranks.is_main():
            print(f"resuming {folder} after step {state.step}", file=sys.stderr, flush=True)
        reporter = Reporter(run, config, state.step, state.device, state.period)
        with closing(reporter):
            if state.step < run.steps:
                _train(run, optim, config, state, batches, loss_fn, validate, reporter, BackgroundWriter(store))
        if ranks.is_main():
            _write_final(folder / "final", state, config)
            print(f"{state.step} steps done: {folder / 'final' / 'model.safetensors'}", flush=True)
            if finish is not None:
                with _averaged_weights(state):
                    finish()
        ranks.wait_for_all()


def _train(
    run: RunConfig,
    optim: OptimConfig,
    config: Mapping[str, Any],
    state: TrainState,
    batches: Callable[[int], Iterator[Any]],
    loss_fn: LossFn,
    validate: Callable[[int], Mapping[str, float]] | None,
    reporter: Reporter,
    writer: BackgroundWriter,
) -> None:
    source = iter(batches(0 if run.overfit_one_batch else state.step))
    if run.overfit_one_batch:
        source = itertools.repeat(next(source))
    state.train_mode(True)
    with stop_signals() as stop, _joined(writer):
        while state.step < run.steps:
            # step
            with reporter.clock.waiting():
                batch = next(source)
            note_unreadable(Path(run.dir), batch)
            try:
                with reporter.speed.counting(num_clips(batch, run)):
                    values = train_step(run, optim, state, batch, loss_fn)
            except TooManySkipped:
                _save(state, config, reporter, writer)
                raise
            last = state.step == run.steps

            # log
            reporter.step(state.step, values, state.untold)

            # validate: on rank 0, while the others wait in their next step
            if validate is not None and ranks.is_main() and (state.step % run.validate_every == 0 or last):
                try:
                    with _averaged_weights(state):
                        measured = validate(state.step)
                except Exception:  # of memory, say: it must not cost the steps before it
                    _save(state, config, reporter, writer)
                    raise
                reporter.validated(state.step, measured)

            # save
            stopped = ranks.any_rank(bool(stop))
            if state.step % run.checkpoint_every == 0 or last or stopped:
                _save(state, config, reporter, writer)
            if stopped and not last:
                writer.join()
                ranks.wait_for_all()
                name = stop[0] if stop else "a signal to another process"
                raise KeyboardInterrupt(f"stopped by {name} after step {state.step}; the same command continues")


def _save(state: TrainState, config: Mapping[str, Any], reporter: Reporter, writer: BackgroundWriter) -> None:
    if ranks.is_main():
        with reporter.saving():
            state.save(writer, config)


def num_clips(batch: Any, run: RunConfig) -> int:
    """Clips of a step, on all processes: run.batch_size, unless the batch itself counts them."""
    return getattr(batch, "num_in_step", 0) or run.batch_size


def portion(run: RunConfig) -> int:
    """Clips that a process computes at once in a step, and so what a validation may take at once."""
    return max(1, run.batch_size // (ranks.num_ranks() * run.accumulate))


@contextmanager
def _joined(writer: BackgroundWriter) -> Iterator[None]:
    """Nobody leaves before the last checkpoint is written."""
    try:
        yield
    except BaseException:
        try:
            writer.join()
        except OSError as error:  # the first trouble is the one to raise
            print(f"warning: the last checkpoint could not be written: {error}", file=sys.stderr, flush=True)
        raise
    writer.join()


@contextmanager
def _averaged_weights(state: TrainState) -> Iterator[None]:
    """The model as it will be used: averaged weights, fp32, eval mode, no gradients; afterwards training goes on."""
    state.train_mode(False)
    try:
        with state.ema.applied(state.model), torch.no_grad(), not_compiled():
            yield
    finally:
        state.train_mode(True)


def _write_final(folder: Path, state: TrainState, config: Mapping[str, Any]) -> None:
    """`model.safetensors` (averaged), `model.raw.safetensors`, and their SHA256SUMS."""
    sums = folder / "SHA256SUMS"
    sums.unlink(missing_ok=True)  # a kill in between must not leave sums of other weights
    files = {"model.safetensors": ("ema", state.ema.tensors())}
    files["model.raw.safetensors"] = ("raw", dict(state.model.state_dict()))
    for name, (weights, tensors) in files.items():
        save_model(folder / name, tensors, config, {"kind": state.kind, "weights": weights, "step": str(state.step)})
    atomic_write(sums, "".join(f"{file_sha256(folder / name)}  {name}\n" for name in files).encode())
