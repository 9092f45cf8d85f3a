"""Logging of a run on rank 0: `metrics.jsonl` for machines, one progress line for people, trackers, warnings.

Warnings tell of a discriminator that wins, dies or is fooled, and of a loss that leaves its reference curve.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from tokenizer.common import distributed
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.config import flat
from tokenizer.common.device import peak_memory
from tokenizer.common.errors import UserError
from tokenizer.common.schema import fits, read_json_lines
from tokenizer.training.train_state import RunConfig


class MetricsLog:
    """One JSON object a line, each with its `step`. Floats read back to the same bits; inf and NaN are null."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line for the state after `step` updates."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | plain) + "\n")

    def sync(self) -> None:
        """Flush to disk; called before a checkpoint, so that no checkpoint is newer than its lines."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All lines so far, without a last one that a kill cut short."""
        return read_log(self.path) if self.path.exists() else []

    def rewind(self, step: int) -> None:
        """Remove lines after `step`, and a last line that a kill cut short."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
        atomic_write(self.path, b"".join(kept))


class Progress:
    """A bar on a terminal, else one plain line for each report, for log files."""

    def __init__(self, total: int, start: int, shown: bool = True) -> None:
        hidden = not shown or not sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", disable=hidden, dynamic_ncols=True)
        self._total, self._step = total, start

    def advance(self) -> None:
        self._step += 1
        self._bar.update()

    def report(self, loss: float, seconds_per_step: float, data_wait: float) -> None:
        """Show the loss, the time left and the fraction (0-1) of time spent waiting for data."""
        self._bar.set_postfix(loss=f"{loss:.4g}", data_wait=f"{data_wait:.0%}")
        if self._bar.disable:
            left = tqdm.format_interval(seconds_per_step * (self._total - self._step))
            self.say(
                f"step {self._step}/{self._total}  loss {loss:.4g}  {seconds_per_step:.3g} s/step  ETA {left}  "
                f"data wait {data_wait:.0%}"
            )

    def say(self, line: str) -> None:
        """A line above the bar."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        self._bar.close()


class Clock:
    """Wall time between two log lines, and the fraction spent waiting for data."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self.restart()

    def restart(self) -> None:
        """Start a new lap and drop the old one."""
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wraps the fetching of one batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        self._steps += 1

    def lap(self) -> tuple[float, float]:
        """(seconds, fraction spent waiting for data) since the last lap; starts a new one."""
        seconds = time.perf_counter() - self._start
        share = self._waited / max(seconds, 1e-9)
        self.seconds_per_step = seconds / max(1, self._steps)
        self.restart()
        return seconds, share


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that a kill cut short. UserError for any other file."""
    return read_json_lines(Path(path), {"step": float}, "give the metrics.jsonl of a run")


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill is dropped with the later ones


_WINDOW = 10  # discriminator updates that are averaged: one batch is noisy
_DRIFT = 0.25  # of the reference's value, in the mean over the last lines
_DRIFT_LINES = 5


def discriminator_warning(accuracy: float, logit_gap: float) -> str | None:
    """A warning for this accuracy (0.5 = guessing) and logit gap (real minus fake), or None.

    Healthy is an accuracy of about 0.55 to 0.9 with a gap above 0.
    """
    if not math.isfinite(accuracy + logit_gap):
        return "the discriminator's figures are not finite: lower discriminator.optim.lr"
    if accuracy > 0.97:
        return (
            f"the discriminator wins (accuracy {accuracy:.2f}, logit gap {logit_gap:.1f}): its gradient teaches little "
            "now. Lower discriminator.optim.lr, raise discriminator.every or discriminator.lecam, or lower loss.gan"
        )
    if accuracy < 0.52 and abs(logit_gap) < 0.05:
        return (
            f"the discriminator is dead (accuracy {accuracy:.2f}, logit gap {logit_gap:.2f}): it cannot tell real from "
            "fake. Raise discriminator.optim.lr or lower discriminator.every"
        )
    if accuracy < 0.4:
        return (
            f"the discriminator is fooled (accuracy {accuracy:.2f}): reconstructions look more real to it than clips. "
            "Lower loss.gan or raise discriminator.optim.lr"
        )
    return None


class DiscriminatorHealth:
    """Checks the mean of the discriminator's last figures; warns once, and again only after it was healthy.

    Waits until the window is full, because one batch is noisy; a figure that is not finite is reported at once.
    """

    def __init__(self) -> None:
        self._last: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._warned: str | None = None

    def look(self, values: Mapping[str, Any]) -> str | None:
        """A new warning, or None."""
        if "discriminator/accuracy" not in values or "discriminator/logit_gap" not in values:
            return None
        self._last.append((float(values["discriminator/accuracy"]), float(values["discriminator/logit_gap"])))
        accuracy, gap = (sum(figures) / len(figures) for figures in zip(*self._last, strict=True))
        if len(self._last) < _WINDOW and math.isfinite(accuracy + gap):
            return None
        warning = discriminator_warning(accuracy, gap)
        kind = warning.partition("(")[0] if warning else None
        new, self._warned = kind != self._warned, kind
        return warning if new else None


class ReferenceCurve:
    """The loss of an earlier run by step; warns once if this run drifts away."""

    def __init__(self, path: str) -> None:
        """UserError for a missing file or one without a loss."""
        if not Path(path).is_file():
            raise UserError(f"run.reference={path}: no such file; give a metrics.jsonl, or leave it empty")
        self.path, self._loss = path, dict(read_curve(path, "loss"))
        if not self._loss:
            raise UserError(f"run.reference={path}: no line holds a loss; give the metrics.jsonl of a run")
        self._ratios: list[float] = []
        self._warned = False

    def look(self, step: int, loss: float) -> str | None:
        """A warning if the mean of the last lines differs from the reference by more than a quarter."""
        if step not in self._loss or self._warned:
            return None
        self._ratios = [*self._ratios, loss / self._loss[step]][-_DRIFT_LINES:]
        ratio = sum(self._ratios) / len(self._ratios)
        if len(self._ratios) < _DRIFT_LINES or abs(ratio - 1) <= _DRIFT:
            return None
        self._warned = True
        return f"the loss is {ratio:.2f} times that of the reference {self.path} over the last {_DRIFT_LINES} lines"


def read_curve(path: str | Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every line of a metrics.jsonl that holds a finite `name`."""
    return [(row["step"], float(row[name])) for row in read_log(path) if fits(row.get(name), float)]


class Reporter:
    """Log lines, progress, trackers and warnings of one run from `start_step` on."""

    def __init__(self, run: RunConfig, config: Mapping[str, Any], start_step: int, device: torch.device) -> None:
        self.run, self.is_main = run, distributed.is_main()
        self.clock = Clock()
        self.log = MetricsLog(Path(run.dir) / "metrics.jsonl")
        self.progress = Progress(run.steps, start_step, shown=self.is_main)
        self.discriminator = DiscriminatorHealth()
        self.reference = ReferenceCurve(run.reference) if run.reference else None
        self.trackers = start_trackers(run, config) if run.trackers else None
        # trackers keep what they got before a crash: those steps are not sent again
        self._tracked_file = Path(run.dir) / "tracking" / "last_step"
        self._tracked = _step_in(self._tracked_file)
        self.device = device
        self._stalled = 0.0
        self._clips = 0  # since the last line
        if self.is_main:
            self.log.rewind(start_step)

    def step(self, step: int, values: Mapping[str, Any], num_clips: int, unlogged: dict[str, Any]) -> None:
        """After every step; `values` are written at the steps that the config names, and at the last.

        num_clips: of this step, on all processes.

        `unlogged`: the discriminator's figures since the last line; it learns at few steps. This line takes them.
        """
        self.progress.advance()
        self._clips += num_clips
        if not self.is_main:
            return
        self._warn(step, self.discriminator.look(values))
        if step % self.run.log_every and step != self.run.steps:
            return
        seconds, data_wait = self.clock.lap()
        timing = {"seconds": seconds, "data_wait": data_wait, **self._performance(step, seconds)}
        self._stalled, self._clips = 0.0, 0
        self._write(step, {**unlogged, **values, **timing})
        unlogged.clear()
        self.progress.report(values["loss"], self.clock.seconds_per_step, data_wait)
        self._warn(step, self.reference.look(step, values["loss"]) if self.reference else None)

    def has_validation(self, step: int) -> bool:
        """Whether the log holds figures of a validation after `step` updates. Ask on rank 0."""
        return any(row["step"] == step and any(key.startswith("val/") for key in row) for row in self.log.read())

    def validated(self, step: int, measured: Mapping[str, float]) -> None:
        """Log a validation; its time does not count as training."""
        values = {f"val/{name}": float(value) for name, value in measured.items()}
        self._write(step, values)
        self.progress.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.clock.restart()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the saving of a checkpoint: flushes the log first and adds up the time."""
        self.log.sync()
        start = time.perf_counter()
        yield
        self._stalled += time.perf_counter() - start

    def close(self) -> None:
        self.progress.close()
        if self.trackers is not None:
            self.trackers.end_training()

    def _performance(self, step: int, seconds: float) -> dict[str, float]:
        return {
            "perf/clips_per_second": self._clips / max(seconds, 1e-9),
            "perf/memory_gib": peak_memory(self.device) / 2**30,
            "perf/eta_seconds": self.clock.seconds_per_step * (self.run.steps - step),
            "perf/checkpoint_stall": self._stalled / max(seconds, 1e-9),
        }

    def _warn(self, step: int, warning: str | None) -> None:
        if warning:
            self.progress.say(f"warning: step {step}: {warning}")

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        self.log.write(step, values)
        if self.trackers is not None and step > self._tracked:
            self.trackers.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)
            atomic_write(self._tracked_file, str(step).encode())


def _step_in(file: Path) -> int:
    """The last step that trackers got; -1 if they got none."""
    if not file.exists():
        return -1
    text = file.read_bytes()
    if not text.isdigit():
        raise UserError(f"{file}: damaged: holds no step; remove it (trackers get some steps twice)")
    return int(text)


def start_trackers(run: RunConfig, config: Mapping[str, Any]) -> Accelerator | None:
    """TensorBoard files in `run.dir/tracking`, or wandb, offline unless there is a key or WANDB_MODE.

    None on ranks other than 0. UserError if a package is not installed.
    """
    for name in run.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"run.trackers={run.trackers}: {name} is not installed; pip install -e '.[log]'")
    if not distributed.is_main():
        return None
    if "WANDB_API_KEY" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")
    folder = Path(run.dir).absolute()
    accelerator = Accelerator(mixed_precision="no", log_with=list(run.trackers), project_dir=folder / "tracking")
    (folder / "tracking").mkdir(exist_ok=True)
    stored = folder / "tracking" / "wandb_id"  # random, but the same after a resume
    if not stored.exists():
        atomic_write(stored, uuid.uuid4().hex[:16].encode())
    wandb = {"name": folder.name, "id": stored.read_text(encoding="utf-8"), "resume": "allow", "dir": str(folder)}
    plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in flat(config).items()}
    accelerator.init_trackers("evatok", config=plain, init_kwargs={"wandb": wandb} if "wandb" in run.trackers else {})
    return accelerator
