"""The training loop of every stage: step, log, validate, save. Each stage brings its batches and its step.

Rerun the same command to resume; on CPU a resumed run ends with the bits of an uninterrupted one, because batches,
random draws and the learning rate are functions of (seed, step). Everything else is in TrainState.

Checkpoints are copied to memory and written by another thread. A run folder has one run at a time and one config; a
signal stops the run after the current step.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from tokenizer.common import distributed
from tokenizer.common.checkpoint import Checkpoint, CheckpointStore, atomic_write, file_sha256, save_model
from tokenizer.common.config import differences, dump_yaml, read_yaml, to_dict, with_defaults
from tokenizer.common.device import pick_device, set_deterministic, slow_precision
from tokenizer.common.errors import UserError
from tokenizer.common.schema import check_fields, fits, parse_json, read_json_value
from tokenizer.common.work_units import no_locks
from tokenizer.training.logger import Reporter
from tokenizer.training.optim import Rewarm, learning_rate
from tokenizer.training.train_state import FREE_TO_CHANGE, NEVER_TO_CHANGE, RunConfig, TrainState
from tokenizer.training.train_step import Fetched, StepFn, TooManySkipped, Values

_SAME_STOP = 2.0  # seconds within which a second SIGINT is another copy of the first


class BackgroundWriter:
    """One write at a time. An error of the thread is raised by the next `save` or by `join`."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy everything to the CPU and start writing it; waits first for the write before."""
        self.join()
        copies = {
            group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for group, tensors in checkpoint.groups.items()
        }
        self._thread = threading.Thread(target=self._write, args=(replace(checkpoint, groups=copies),))
        self._thread.start()

    def join(self) -> None:
        """Wait until everything is on disk. Raises the error of the writing thread, e.g. OSError for a full disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            self.store.save(checkpoint)
        except BaseException as error:  # handed on by `join`
            self._error = error


class AnyRank:
    """Whether a flag is true on any rank, the same answer everywhere; on GPUs that of the call before.

    So no process waits for its GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Fetched | None = None

    def __call__(self, flag: bool) -> bool:
        if distributed.num_ranks() == 1:
            return flag
        before = self._last
        self._last = Fetched(distributed.sum_over_ranks(torch.full((), float(flag), device=self._device)))
        answer = self._last if self._device.type == "cpu" else before
        return answer is not None and bool(answer.read())


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Yields a list that receives the name of a SIGINT, SIGTERM or SIGUSR1 (SLURM's notice that the time is up).

    The loop looks at it between two steps. One stop may arrive several times: from the scheduler and from torchrun,
    which passes it on. A second Ctrl-C stops at once; the last checkpoint is kept.
    """
    received: list[str] = []
    first = 0.0  # seconds

    def remember(number: int, _frame: Any) -> None:
        nonlocal first
        if number == signal.SIGINT and received and time.monotonic() - first > _SAME_STOP:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        received.append(signal.Signals(number).name)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """UserError for a second run in the folder: the two would damage each other's checkpoints."""
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data workers would inherit it
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"{folder}: another run is writing here; wait for it or choose run.dir=OTHER") from error
        except OSError as error:
            raise no_locks(folder, error) from error
        yield


def claim(
    folder: Path,
    config: Any,
    noted: Mapping[str, Any] | None = None,
    allow_changes: bool = False,
    write: bool = True,
) -> None:
    """Write `config.yaml`, or only check it. UserError for a folder that was made with another config.

    Keys that the file lacks, because they came later, count as their defaults. With `allow_changes` the differences are
    printed, the old config is kept as `config.<n>.yaml`, and only another model or other tokens are refused.
    """
    noted = noted or {}
    text = dump_yaml(to_dict(config) | to_dict(noted))
    path = folder / "config.yaml"
    if path.exists():
        there = with_defaults(with_defaults(read_yaml(path), config, str(path)), noted, str(path))
        found = differences(there, yaml.safe_load(text))
        changed = [line for line in found if line.partition(":")[0] not in FREE_TO_CHANGE]
        fatal = [line for line in changed if line.partition(":")[0].partition(".")[0] in NEVER_TO_CHANGE]
        if changed and (fatal or not allow_changes):
            way_out = "choose run.dir=OTHER" if fatal else "choose run.dir=OTHER, or go on with run.allow_changes=true"
            raise UserError(
                f"{folder}: was made with another config (there / here): {'; '.join(fatal or changed)}; {way_out}"
            )
        if changed and write:
            kept = folder / f"config.{len(list(folder.glob('config.*.yaml'))) + 1}.yaml"
            atomic_write(kept, path.read_bytes())
            print(f"{folder}: goes on with changes (before / now): {'; '.join(changed)}; {kept.name} is the old config")
    if write:
        atomic_write(path, text.encode())


def follow_schedule(folder: Path, run: RunConfig, state: TrainState) -> Rewarm | None:
    """The transition to the present learning-rate schedule, if run.steps was changed on a resume; see `Rewarm`.

    UserError if the learning rate would jump by more than 1 % and run.rewarm does not say how fast it may change.
    """
    path, config = folder / "schedule.json", folder / "config.yaml"
    entries = read_json_value(path, "choose run.dir=OTHER") if path.exists() else []
    if not fits(entries, list[list[int]]) or any(len(entry) != len(Rewarm._fields) for entry in entries):
        raise UserError(f"{path}: damaged: holds no changes of the schedule; choose run.dir=OTHER")
    before = ((read_yaml(config) if config.exists() else {}).get("run") or {}).get("steps", run.steps)
    last = Rewarm(*entries[-1]) if entries else None
    if before == run.steps or not 0 < state.step < run.steps:
        return last
    for trainable in state.trainables:
        was = learning_rate(state.step - 1, before, trainable.optim, last)
        would = learning_rate(state.step - 1, run.steps, trainable.optim)
        if abs(would - was) <= 0.01 * was:
            continue
        if not run.rewarm:
            raise UserError(
                f"{folder}: run.steps={before} there, {run.steps} here: after step {state.step} the learning rate of "
                f"the {trainable.name} would jump from {was:.3g} to {would:.3g}. Set run.rewarm=N to move there over N "
                "steps (run.rewarm=1 jumps), or choose run.dir=OTHER"
            )
        entries.append(Rewarm(state.step, before, run.rewarm))
        atomic_write(path, json.dumps(entries).encode())
        return entries[-1]
    return last


def note_unreadable(folder: Path, batch: Any) -> None:
    """Add the damaged files of this batch to `quarantine.jsonl`, one object a line, each file once.

    Other workers, other processes and an earlier start of the run may have added the same file.
    """
    met: Mapping[str, str] = getattr(batch, "unreadable", {})
    if not met:
        return
    with open(folder / "quarantine.jsonl", "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)  # until the file is closed
        except OSError as error:
            raise no_locks(folder, error) from error
        file.seek(0)
        known = set()
        for line in file:
            with suppress(UserError):  # a note that a kill cut short; others may still be written
                known.add(check_fields(parse_json(line, file.name, ""), {"file": str}, file.name, "")["file"])
        for name, reason in met.items():
            if name not in known:
                file.write(json.dumps({"file": name, "reason": reason}) + "\n")


def start_run(run: RunConfig) -> torch.device:
    """Set threads, seeds and deterministic kernels and join the other processes; called before the model is built."""
    distributed.join(on_cpu=run.device == "cpu" or not torch.cuda.is_available())
    if run.num_threads is not None:
        torch.set_num_threads(run.num_threads)
    # sharp attention multiplies probabilities below 1e-38: as denormals they take a third of a CPU's step
    torch.set_flush_denormal(True)
    set_deterministic(run.seed)
    return pick_device(run.device)


def resumes(run: RunConfig) -> bool:
    """Whether `run.dir` holds a checkpoint, the same answer on all processes."""
    return distributed.from_main(any((Path(run.dir) / "checkpoints").glob("*/state.json")) if run.dir else False)


def fit(
    run: RunConfig,
    config: Any,
    state: TrainState,
    batches: Callable[[int], Iterator[Any]],
    step_fn: StepFn,
    validate: Callable[[int], Mapping[str, float]] | None = None,
    finish: Callable[[], None] | None = None,
    noted: Mapping[str, Any] | None = None,
) -> None:
    """Train `state` in `run.dir` up to `run.steps`, resuming by itself, and write `final/`.

    `config`, a dataclass, and `noted`, what else decides the weights, are stored with the run and inside the weights;
    a run goes on with equal ones only. `batches(s)` yields the batches from step s on. `step_fn(batch)` makes one whole
    step of `state` (`train_step`, or the tokenizer's own with its discriminator) and returns what to log; it draws from
    `generator_for(seed, name, step)` or from torch's global generator, which is seeded at every step.
    `validate(step)` runs on every process, which share its clips and return the same figures; `finish()` on rank 0.
    Both run with the averaged weights, in eval mode, without gradients.

    Raises UserError for a folder of another run and for a loss or gradient that is not finite (naming step and term),
    KeyboardInterrupt after SIGINT or SIGTERM, once a checkpoint is saved.
    """
    if not run.dir:
        raise UserError("run.dir is empty: name the results folder, run.dir=DIR")
    folder = Path(run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    start_run(run)
    with only_run_in(folder) if distributed.is_main() else nullcontext():
        if distributed.is_main():
            claim(folder, config, noted, run.allow_changes, write=False)
            if warning := slow_precision(state.device, run.precision):
                print(f"warning: {warning}", file=sys.stderr, flush=True)
        stored = to_dict(config) | to_dict(noted or {})
        store = CheckpointStore(folder / "checkpoints", run.keep_last, run.keep_every)
        if state.load(store) and distributed.is_main():
            print(f"resuming {folder} after step {state.step}", file=sys.stderr, flush=True)
        if distributed.is_main():
            state.rewarm = follow_schedule(folder, run, state)
            claim(folder, config, noted, run.allow_changes)
        state.rewarm = distributed.from_main(state.rewarm)
        reporter = Reporter(run, stored, state.step, state.device)
        with closing(reporter):
            if state.step < run.steps or _validation_due(run, state, validate, reporter):
                _train(run, stored, state, batches, step_fn, validate, reporter, BackgroundWriter(store))
        if distributed.is_main():
            _write_final(folder / "final", state, stored)
            print(f"{state.step} steps done: {folder / 'final' / 'model.safetensors'}", flush=True)
            if finish is not None:
                with _averaged_weights(state):
                    finish()
        distributed.wait_for_all()


def _train(
    run: RunConfig,
    config: Mapping[str, Any],
    state: TrainState,
    batches: Callable[[int], Iterator[Any]],
    step_fn: StepFn,
    validate: Callable[[int], Mapping[str, float]] | None,
    reporter: Reporter,
    writer: BackgroundWriter,
) -> None:
    source = iter(batches(0 if run.overfit_one_batch else state.step))
    source = itertools.repeat(next(source)) if run.overfit_one_batch else source
    state.train_mode(True)
    unreported: list[tuple[int, Values, int]] = []
    stopped_anywhere, save = AnyRank(state.device), partial(_save, state, config, reporter, writer)
    with stop_signals() as stop, _joined(writer):
        # a validation that failed or was cut short after this checkpoint's step is made up for
        if validate is not None and _validation_due(run, state, validate, reporter):
            _validate(state, validate, reporter)
        while state.step < run.steps:
            # step
            with reporter.clock.waiting():
                batch = next(source)
            note_unreadable(Path(run.dir), batch)
            with _first(save, TooManySkipped):
                unreported.append((state.step + 1, step_fn(batch), num_clips(batch, run)))
                last, stopped = state.step == run.steps, stopped_anywhere(bool(stop))
                validates = validate is not None and (state.step % run.validate_every == 0 or last)
                saves = state.step % run.checkpoint_every == 0 or last or stopped
                if validates or saves:
                    state.settle()

            # log, on a GPU a step later
            while len(unreported) > (state.unsettled is not None):
                reporter.step(*unreported.pop(0), state.unlogged)

            # validate, on all processes
            if validate is not None and validates:
                with _first(save, Exception):  # e.g. out of memory: save the steps before it
                    _validate(state, validate, reporter)

            # save
            if saves:
                save()
            if stopped and not last:
                writer.join()
                distributed.wait_for_all()
                name = stop[0] if stop else "a signal to another process"
                raise KeyboardInterrupt(f"stopped by {name} after step {state.step}; the same command continues")


@contextmanager
def _first(save: Callable[[], None], error: type[Exception]) -> Iterator[None]:
    """Inside the `with`, an error of this kind is raised after a checkpoint."""
    try:
        yield
    except error:
        save()
        raise


def _validation_due(
    run: RunConfig, state: TrainState, validate: Callable[[int], Mapping[str, float]] | None, reporter: Reporter
) -> bool:
    """Whether the log lacks the validation of a resumed step, the same answer on all processes."""
    if validate is None or state.step == 0 or (state.step % run.validate_every and state.step != run.steps):
        return False
    return not distributed.from_main(reporter.has_validation(state.step))


def _validate(state: TrainState, validate: Callable[[int], Mapping[str, float]], reporter: Reporter) -> None:
    with _averaged_weights(state):
        measured = validate(state.step)
    if distributed.is_main():
        reporter.validated(state.step, measured)


def _save(state: TrainState, config: Mapping[str, Any], reporter: Reporter, writer: BackgroundWriter) -> None:
    if distributed.is_main():
        with reporter.saving():
            writer.save(state.snapshot(config))


def num_clips(batch: Any, run: RunConfig) -> int:
    """Clips of a step on all processes: run.batch_size, unless the batch counts them."""
    return getattr(batch, "num_in_step", 0) or run.batch_size


def portion(run: RunConfig) -> int:
    """Clips that one process computes at once, in a step and in a validation."""
    return max(1, run.batch_size // (distributed.num_ranks() * run.accumulate))


@contextmanager
def _joined(writer: BackgroundWriter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        try:
            writer.join()
        except OSError as error:  # the first error is raised
            print(f"warning: the last checkpoint could not be written: {error}", file=sys.stderr, flush=True)
        raise
    writer.join()


@contextmanager
def _averaged_weights(state: TrainState) -> Iterator[None]:
    """Averaged weights, fp32, eval mode, no gradients inside the `with`; training state again afterwards."""
    state.train_mode(False)
    try:
        with state.ema.applied(state.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
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
        save_model(folder / name, tensors, config, {**state.card, "weights": weights, "step": str(state.step)})
    atomic_write(sums, "".join(f"{file_sha256(folder / name)}  {name}\n" for name in files).encode())
