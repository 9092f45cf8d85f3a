"""What a run says while it runs: `metrics.jsonl` for machines, one progress line for people."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokenizer.common.checkpoint import atomic_write


class MetricsLog:
    """One JSON object a line, each with its `step`. Floats read back to the same bits; inf and NaN are null."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line for the state after `step` updates."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | {name: _finite(value) for name, value in values.items()}) + "\n")

    def sync(self) -> None:
        """Put the lines on the disk; called before a checkpoint, so that a checkpoint never outlives its lines."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Forget what was written after `step`, and a last line that a kill cut short."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
        atomic_write(self.path, b"".join(kept))


class Progress:
    """A bar on a terminal; elsewhere a plain line at every report, so that a log file stays readable."""

    def __init__(self, total: int, start: int, shown: bool = True) -> None:
        hidden = not shown or not sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", disable=hidden, dynamic_ncols=True)
        self._total, self._step = total, start

    def advance(self) -> None:
        """One step is done."""
        self._step += 1
        self._bar.update()

    def report(self, loss: float, seconds_per_step: float, data_wait: float) -> None:
        """Show the loss, the time left and the share (0-1) of the time that was spent waiting for data."""
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
        """Leave the bar as it stands."""
        self._bar.close()


class Clock:
    """Wall time of the laps between two log lines, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin a new lap, without a word about the old one."""
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wraps the fetching of one batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        self._steps += 1

    def lap(self) -> tuple[float, float]:
        """(seconds, share of them spent waiting for data) since the last lap; begins a new one."""
        seconds = time.perf_counter() - self._start
        share = self._waited / max(seconds, 1e-9)
        self.seconds_per_step = seconds / max(1, self._steps)
        self.restart()
        return seconds, share


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill is dropped with the later ones


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
