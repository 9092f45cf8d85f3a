"""The beat of every training: step, log, validate, save. Each stage brings its batches and its loss.

A run can be killed at any moment and started again with the same command; on CPU it then ends with the same bits.
Three rules make that true: batches are a function of the step, every random draw is a function of (seed, step), and
the learning rate is a function of the step. What is left to remember is TrainState.
"""

from __future__ import annotations

import fcntl
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from tokenizer.common.checkpoint import CheckpointStore, atomic_write, file_sha256, load_strict, save_model
from tokenizer.common.config import differences
from tokenizer.common.ema import Ema
from tokenizer.common.errors import UserError
from tokenizer.common.metrics_log import Clock, MetricsLog, Progress
from tokenizer.common.optim import (
    OptimConfig,
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)
from tokenizer.common.runtime import autocast, derive_seed, pick_device, pick_dtype, set_deterministic

# what may change between two starts of one run: none of it changes what a step computes (steps: the user's choice)
_FREE_TO_CHANGE = {"run.dir", "run.steps", "run.device", "run.num_workers", "run.num_threads", "run.keep_last"}
_FREE_TO_CHANGE |= {"run.log_every", "run.validate_every", "run.checkpoint_every"}

LossFn = Callable[[Any, int], tuple[Tensor, Mapping[str, Tensor | float]]]


@dataclass
class RunConfig:
    """How long a run lasts, where it lives and how often it speaks."""

    dir: str = ""  # the results folder; the entry points fill in results/<stage>/<config name>
    steps: int = 1000
    seed: int = 0
    batch_size: int = 8
    log_every: int = 10
    validate_every: int = 500
    checkpoint_every: int = 200
    keep_last: int = 2  # checkpoints kept
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    precision: str = "none"  # none (fp32) | bf16 | fp16
    num_workers: int = 0  # processes that load data
    num_threads: int | None = None  # threads of torch; None leaves torch's own choice
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        for name in ("batch_size", "log_every", "validate_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"run.{name}={getattr(self, name)}: must be at least 1")
        if self.steps < 0 or self.num_workers < 0 or (self.num_threads or 1) < 1:
            raise UserError("run.steps and run.num_workers must be >= 0, run.num_threads >= 1 or null")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"run.ema_decay={self.ema_decay}: must lie in [0, 1)")
        pick_dtype(self.precision)


@dataclass
class TrainState:
    """All that a run must remember. `step` counts finished updates."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    step: int = 0
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    kind: str = "model"  # what the weights are (tokenizer, router, ..), for the cards of the files

    @classmethod
    def start(cls, model: nn.Module, run: RunConfig, optim: OptimConfig, kind: str = "model") -> TrainState:
        """The state before the first update, with `model` moved to the run's device."""
        device = pick_device(run.device)
        model = model.to(device)
        scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        return cls(model, build_optimizer(model, optim), Ema(model, run.ema_decay), 0, scaler, kind)

    @property
    def device(self) -> torch.device:
        """Where the model lives; loss functions put their batches there."""
        return next(self.model.parameters()).device

    def save(self, store: CheckpointStore, config: Mapping[str, Any]) -> None:
        """Write everything, atomically."""
        groups = {
            "model": self.model.state_dict(),
            "ema": self.ema.tensors(),
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        store.save(self.step, groups, {"scaler": self.scaler.state_dict(), "card": {"kind": self.kind}}, config)

    def load(self, store: CheckpointStore) -> bool:
        """Take up the newest good checkpoint; False when there is none."""
        saved = store.load_latest()
        if saved is None:
            return False
        load_strict(self.model, saved.groups["model"], f"{store.folder} (model)")
        self.ema.load(saved.groups["ema"], f"{store.folder} (ema)")
        load_optimizer_tensors(self.optimizer, self.model, saved.groups["optimizer"], f"{store.folder} (optimizer)")
        if saved.state["scaler"]:
            self.scaler.load_state_dict(saved.state["scaler"])
        self.step = saved.step
        return True


def start_run(run: RunConfig) -> torch.device:
    """Threads, seeds and deterministic kernels; an entry point calls it before it builds the model."""
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
    with _only_run_in(folder):
        _claim(folder, config)
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
    state.model.train()
    with closing(Progress(run.steps, state.step)) as progress, _stop_signals() as stop:
        while state.step < run.steps:
            # step
            with clock.waiting():
                batch = next(source)
            values = train_step(run, optim, state, batch, loss_fn)
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


def train_step(run: RunConfig, optim: OptimConfig, state: TrainState, batch: Any, loss_fn: LossFn) -> dict[str, float]:
    """One update of `state`. Returns the loss, its terms, the learning rate and the gradient's norm before clipping."""
    step, device = state.step, state.device
    torch.manual_seed(derive_seed(run.seed, "step", step))
    rate = learning_rate(step, run.steps, optim)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    with autocast(device, run.precision):
        loss, terms = loss_fn(batch, step)
    values = {"loss": float(loss.detach()), **{name: float(value) for name, value in terms.items()}}
    _stop_if_not_finite(step, values)

    state.scaler.scale(loss).backward()
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), optim.clip_norm)
    values |= {"lr": rate, "grad_norm": float(norm)}
    # with fp16 the scaler skips an overflowing step and lowers its scale; only a scale that ran out is a failure
    if not state.scaler.is_enabled() or state.scaler.get_scale() < 1:
        _stop_if_not_finite(step, values, state.model)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    state.ema.update(state.model, step)
    return values


def _stop_if_not_finite(step: int, values: Mapping[str, float], model: nn.Module | None = None) -> None:
    if all(math.isfinite(value) for value in values.values()):
        return
    # the sum is the last to be blamed: a term that broke it says more
    name = next((k for k, v in values.items() if k != "loss" and not math.isfinite(v)), "loss")
    value = values[name]
    if model is not None and name == "grad_norm":
        broken = (k for k, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
        name = f"the gradient of {next(broken, 'all parameters together')}"
    raise UserError(
        f"step {step}: {name} is {value}; the run stopped before this update. Lower optim.lr or check the data, "
        "then start again: it resumes from the last checkpoint"
    )


@contextmanager
def _averaged_weights(run: RunConfig, state: TrainState) -> Iterator[None]:
    """The model as it will be used: averaged weights, eval mode, no gradients; afterwards training goes on."""
    state.model.eval()
    try:
        with state.ema.applied(state.model), torch.no_grad(), autocast(state.device, run.precision):
            yield
    finally:
        state.model.train()


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Yields a list that receives the name of a SIGINT or SIGTERM; the loop looks at it between two steps."""
    received: list[str] = []

    def remember(number: int, _frame: Any) -> None:
        if received:  # asked twice: stop at once, the last checkpoint stands
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _only_run_in(folder: Path) -> Iterator[None]:
    """Two runs in one folder would tear each other's checkpoints: the second one stops here."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: data workers would inherit it
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"{folder}: another run is writing here; wait for it or choose run.dir=OTHER") from error
        yield


def _claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.yaml`; a folder that was made with another config is refused."""
    text = yaml.safe_dump(dict(config), sort_keys=False)
    path = folder / "config.yaml"
    if path.exists():
        found = differences(yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(text))
        changed = [line for line in found if line.partition(":")[0] not in _FREE_TO_CHANGE]
        if changed:
            raise UserError(
                f"{folder}: was made with another config (there / here): {'; '.join(changed)}; choose run.dir=OTHER"
            )
    atomic_write(path, text.encode())


def _write_final(folder: Path, state: TrainState, config: Mapping[str, Any]) -> None:
    """`model.safetensors` (averaged), `model.raw.safetensors`, and their SHA256SUMS."""
    sums = folder / "SHA256SUMS"
    sums.unlink(missing_ok=True)  # a kill in between must not leave sums of other weights
    files = {"model.safetensors": ("ema", state.ema.tensors())}
    files["model.raw.safetensors"] = ("raw", dict(state.model.state_dict()))
    for name, (weights, tensors) in files.items():
        save_model(folder / name, tensors, config, {"kind": state.kind, "weights": weights, "step": str(state.step)})
    atomic_write(sums, "".join(f"{file_sha256(folder / name)}  {name}\n" for name in files).encode())
