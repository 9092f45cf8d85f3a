"""What deserves a warning while a run goes on: a game that is lost, a curve that leaves its reference."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizer.common.errors import UserError

_WINDOW = 10  # steps of a discriminator that are judged together: one batch says little
_DRIFT = 0.25  # of the reference's value, in the mean over the last lines
_DRIFT_LINES = 5


def game_warning(accuracy: float, logit_gap: float) -> str | None:
    """What is wrong with a discriminator of this accuracy (0.5 = guessing) and logit gap (real minus fake), or None.

    Healthy is an accuracy of about 0.55 to 0.9 with a gap above 0.
    """
    if not math.isfinite(accuracy + logit_gap):
        return "the discriminator's figures are not finite: lower adversary.optim.lr"
    if accuracy > 0.97:
        return (
            f"the discriminator wins (accuracy {accuracy:.2f}, logit gap {logit_gap:.1f}): its gradient teaches little "
            "now. Lower adversary.optim.lr, raise adversary.every or adversary.lecam, or lower loss.gan"
        )
    if accuracy < 0.52 and abs(logit_gap) < 0.05:
        return (
            f"the discriminator is dead (accuracy {accuracy:.2f}, logit gap {logit_gap:.2f}): it cannot tell real from "
            "fake. Raise adversary.optim.lr or lower adversary.every"
        )
    if accuracy < 0.4:
        return (
            f"the discriminator is fooled (accuracy {accuracy:.2f}): reconstructions look more real to it than clips. "
            "Lower loss.gan or raise adversary.optim.lr"
        )
    return None


class GameWatch:
    """Judges the mean of the discriminator's last figures, and says a warning once, until it has been healthy again.

    No verdict before the window is full, so none from a single batch; a figure that is not finite is told at once.
    """

    def __init__(self) -> None:
        self._last: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._said: str | None = None

    def look(self, values: Mapping[str, Any]) -> str | None:
        """A new warning, or None."""
        if "adversary/accuracy" not in values or "adversary/logit_gap" not in values:
            return None
        self._last.append((float(values["adversary/accuracy"]), float(values["adversary/logit_gap"])))
        accuracy, gap = (sum(figures) / len(figures) for figures in zip(*self._last, strict=True))
        if len(self._last) < _WINDOW and math.isfinite(accuracy + gap):
            return None
        warning = game_warning(accuracy, gap)
        kind = warning.partition("(")[0] if warning else None
        new, self._said = kind != self._said, kind
        return warning if new else None


class ReferenceCurve:
    """The loss of an earlier run by step; a run that leaves it is told so once."""

    def __init__(self, path: str) -> None:
        """UserError for a file that is not there or holds no loss."""
        if not Path(path).is_file():
            raise UserError(f"run.reference={path}: no such file; give a metrics.jsonl, or leave it empty")
        self.path, self._loss = path, dict(read_curve(path, "loss"))
        if not self._loss:
            raise UserError(f"run.reference={path}: no line holds a loss; give the metrics.jsonl of a run")
        self._ratios: list[float] = []
        self._said = False

    def look(self, step: int, loss: float) -> str | None:
        """A warning where the mean of the last lines differs by more than a quarter from the reference's."""
        if step not in self._loss or self._said:
            return None
        self._ratios = [*self._ratios, loss / self._loss[step]][-_DRIFT_LINES:]
        ratio = sum(self._ratios) / len(self._ratios)
        if len(self._ratios) < _DRIFT_LINES or abs(ratio - 1) <= _DRIFT:
            return None
        self._said = True
        return f"the loss is {ratio:.2f} times that of the reference {self.path} over the last {_DRIFT_LINES} lines"


def read_curve(path: str | Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every line of a metrics.jsonl that holds a finite `name`."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut the last one short
    return [(row["step"], float(row[name])) for row in rows if isinstance(row.get(name), int | float)]
