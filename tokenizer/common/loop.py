"""The beat of every training: step, log, validate, save. Each stage brings its batches and its loss.

A run can be killed at any moment and started again with the same command; on CPU it then ends with the same bits.
Three rules make that true: batches are a function of the step, every random draw is a function of (seed, step), and
the learning rate is a function of the step. What is left to remember is TrainState.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from tokenizer.common.checkpoint import CheckpointStore, atomic_write, file_sha256, save_model
from tokenizer.common.errors import UserError
from tokenizer.common.metrics_log import Clock, MetricsLog, Progress
from tokenizer.common.optim import OptimConfig
from tokenizer.common.run_config import RunConfig
from tokenizer.common.runtime import autocast, pick_device, set_deterministic
from tokenizer.common.state import Adversary, TrainState
from tokenizer.common.step import LossFn, Summed, TooManySkipped, train_step
from tokenizer.common.survive import claim, only_run_in, stop_signals

__all__ = ["Adversary", "LossFn", "RunConfig", "Summed", "TrainState", "fit", "start_run", "train_step"]


def start_run(run: RunConfig) -> torch.device:
    """Threads, seeds, kernels, the run's other processes: an entry point calls it before it builds the model."""
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
    with only_run_in(folder):
        claim(folder, config)
        store = CheckpointStore(folder / "checkpoints", run.keep_last)
        log = MetricsLog(folder / "metrics.jsonl")
        if state.load(store):
            print(f"resuming {folder} after step {state.step}", file=sys.stderr, flush=True)
        log.rewind(state.step)
        if state.step < run.steps:
            _train(run, optim, state, batches, loss_fn, validate, log, lambda: state.save(store, config))
        _write_final(folder / "final", state, config)
        print(f"{state.step} steps done: {folder / 'final' / 'model.safetensors'}", flush=True)
        if finish is not None:
            with _averaged_weights(run, state):
                finish()


def _train(
    run: RunConfig,
    optim: OptimConfig,
    state: TrainState,
    batches: Callable[[int], Iterator[Any]],
    loss_fn: LossFn,
    validate: Callable[[int], Mapping[str, float]] | None,
    log: MetricsLog,
    save: Callable[[], None],
) -> None:
    clock = Clock()
    source = iter(batches(state.step))
    state.train_mode(True)
    with closing(Progress(run.steps, state.step)) as progress, stop_signals() as stop:
        while state.step < run.steps:
            # step
            with clock.waiting():
                batch = next(source)
            try:
                values = train_step(run, optim, state, batch, loss_fn)
            except TooManySkipped:
                save()
                raise
            progress.advance()
            last = state.step == run.steps

            # log
            if state.step % run.log_every == 0 or last:
                seconds, data_wait = clock.lap()
                log.write(state.step, {**values, "seconds": seconds, "data_wait": data_wait})
                progress.report(values["loss"], clock.seconds_per_step, data_wait)

            # validate
            if validate is not None and (state.step % run.validate_every == 0 or last):
                with _averaged_weights(run, state):
                    measured = {f"val/{name}": float(value) for name, value in validate(state.step).items()}
                log.write(state.step, measured)
                progress.say(f"step {state.step}  " + "  ".join(f"{k} {v:.4g}" for k, v in measured.items()))
                clock.restart()

            # save
            if state.step % run.checkpoint_every == 0 or last or stop:
                log.sync()
                save()
            if stop and not last:
                raise KeyboardInterrupt(f"stopped by {stop[0]} after step {state.step}; the same command continues")


@contextmanager
def _averaged_weights(run: RunConfig, state: TrainState) -> Iterator[None]:
    """The model as it will be used: averaged weights, eval mode, no gradients; afterwards training goes on."""
    state.train_mode(False)
    try:
        with state.ema.applied(state.model), torch.no_grad(), autocast(state.device, run.precision):
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
