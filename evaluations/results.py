"""Read what an evaluation wrote: metrics.json with its card, and the table of clips."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.common.errors import UserError


@dataclass(frozen=True)
class Result:
    """One finished evaluation. `clips`: name -> column -> cell, scored clips only, in the order of the list."""

    folder: Path
    summary: dict[str, Any]
    clips: dict[str, dict[str, str]]

    @property
    def card(self) -> dict[str, Any]:
        """Its protocol card."""
        return self.summary["card"]


def read_result(folder: str | Path) -> Result:
    """UserError where `folder` holds no finished evaluation."""
    folder = Path(folder)
    try:
        summary = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with open(folder / "per_clip.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: has no {Path(error.filename).name}; finish the evaluation first") from error
    except ValueError as error:
        raise UserError(f"{folder}: metrics.json is damaged ({error}); run the evaluation again") from error
    return Result(folder, summary, {row["name"]: row for row in rows if not row.get("skipped")})
