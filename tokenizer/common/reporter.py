"""What rank 0 says of a run: metrics.jsonl, the progress line, trackers, warnings. Other ranks are silent."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tokenizer.common import ranks
from tokenizer.common.errors import UserError
from tokenizer.common.metrics_log import Clock, MetricsLog, Progress
from tokenizer.common.performance import Speed
from tokenizer.common.run_config import RunConfig
from tokenizer.common.runtime import pick_dtype
from tokenizer.common.watch import GameWatch, ReferenceCurve


class Reporter:
    """The voice of one run from `start_step` on."""

    def __init__(
        self, run: RunConfig, config: Mapping[str, Any], start_step: int, device: torch.device, period: int = 1
    ) -> None:
        """period: of the kinds of step, see `Speed`."""
        self.run, self.speaks = run, ranks.is_main()
        self.clock = Clock()
        self.log = MetricsLog(Path(run.dir) / "metrics.jsonl")
        self.progress = Progress(run.steps, start_step, shown=self.speaks)
        self.game = GameWatch()
        self.reference = ReferenceCurve(run.reference) if run.reference else None
        self.trackers = start_trackers(run, config) if run.trackers else None
        self.speed = Speed(device, pick_dtype(run.precision), period)
        self._stalled = 0.0
        if self.speaks:
            self.log.rewind(start_step)

    def step(self, step: int, values: Mapping[str, Any], untold: dict[str, Any]) -> None:
        """After every step; `values` are written at the steps that the config names, and at the last.

        `untold`: the last figures of a player that rests at most steps; the next line holds them and empties it.
        """
        self.progress.advance()
        if not self.speaks:
            return
        self._warn(step, self.game.look(values))
        if step % self.run.log_every and step != self.run.steps:
            return
        seconds, data_wait = self.clock.lap()
        perf = self.speed.figures(self.clock.seconds_per_step)
        perf["perf/eta_seconds"] = self.clock.seconds_per_step * (self.run.steps - step)
        perf["perf/checkpoint_stall"], self._stalled = self._stalled / max(seconds, 1e-9), 0.0
        self._write(step, {**untold, **values, "seconds": seconds, "data_wait": data_wait, **perf})
        untold.clear()
        self.progress.report(values["loss"], self.clock.seconds_per_step, data_wait)
        self._warn(step, self.reference.look(step, values["loss"]) if self.reference else None)

    def validated(self, step: int, measured: Mapping[str, float]) -> None:
        """After a validation, whose time does not count as training."""
        values = {f"val/{name}": float(value) for name, value in measured.items()}
        self._write(step, values)
        self.progress.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.clock.restart()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Wraps the saving of a checkpoint: lines first, and its time is noted."""
        self.log.sync()
        start = time.perf_counter()
        yield
        self._stalled += time.perf_counter() - start

    def close(self) -> None:
        """The last word."""
        self.progress.close()
        if self.trackers is not None:
            self.trackers.end_training()

    def _warn(self, step: int, warning: str | None) -> None:
        if warning:
            self.progress.say(f"warning: step {step}: {warning}")

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        self.log.write(step, values)
        if self.trackers is not None:
            self.trackers.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)


def start_trackers(run: RunConfig, config: Mapping[str, Any]) -> Accelerator | None:
    """TensorBoard files in `run.dir/tracking`, or wandb, which stays offline unless a key or WANDB_MODE says otherwise.

    None on the ranks that are silent. UserError where a package is absent.
    """
    for name in run.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"run.trackers={run.trackers}: {name} is not installed; pip install -e '.[log]'")
    if not ranks.is_main():
        return None
    if "WANDB_API_KEY" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")
    folder = Path(run.dir).absolute()
    accelerator = Accelerator(mixed_precision="no", log_with=list(run.trackers), project_dir=folder / "tracking")
    same = hashlib.sha256(str(folder).encode()).hexdigest()[:16]  # the same run after a resume
    wandb = {"name": folder.name, "id": same, "resume": "allow", "dir": str(folder)}
    flat = {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in _flat(config)}
    accelerator.init_trackers("evatok", config=flat, init_kwargs={"wandb": wandb} if "wandb" in run.trackers else {})
    return accelerator


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
