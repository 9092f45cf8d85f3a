"""How every bench ends: one JSON line, exit 1 where the goal is missed."""

from __future__ import annotations

import json
import os
import sys


def report(name: str, ratio: float, goal: float, holds: bool, **more: object) -> None:
    """Print the result as the last line and leave with 0 or 1. `more`: whatever explains the ratio."""
    load = [round(x, 2) for x in os.getloadavg()]
    print(json.dumps({"name": name, "ratio": round(ratio, 4), "goal": goal, "holds": holds, **more, "load": load}))
    sys.exit(0 if holds else 1)
