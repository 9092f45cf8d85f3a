"""What the benches share: CPU clocks, fresh processes, and the JSON line at the end."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVarTuple

Args = TypeVarTuple("Args")


@dataclass(frozen=True)
class Part:
    """One measured ratio beside its goal; `facts` explain it. `condition`: what must hold besides."""

    ratio: float
    goal: float
    at_least: bool = True  # False: the ratio must not exceed the goal
    condition: bool = True
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.condition and (self.ratio >= self.goal if self.at_least else self.ratio <= self.goal)

    @property
    def margin(self) -> float:
        """Above 1: how far the goal is met."""
        return self.ratio / self.goal if self.at_least else self.goal / max(self.ratio, 1e-12)


def run_parts(
    name: str,
    about: str | argparse.ArgumentParser,
    parts: Mapping[str, Callable[[bool], Part]],
    into: argparse.Namespace | None = None,
) -> None:
    """The command line of a bench: run the parts (`quick` is passed on), print one JSON line each and one for all.

    The last line carries ratio and goal of the part with the least margin; exit 1 if any part misses its goal.
    about: a description, or a parser with flags of the bench's own, which are set in `into`.
    """
    parser = argparse.ArgumentParser(description=about) if isinstance(about, str) else about
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under a minute")
    parser.add_argument("--only", default=",".join(parts), help=f"some of {','.join(parts)} (default: all)")
    args = parser.parse_args(namespace=into)
    wanted = args.only.split(",")
    if unknown := sorted(set(wanted) - set(parts)):
        parser.error(f"--only {','.join(unknown)}: choose from {', '.join(parts)}")
    done: dict[str, Part] = {}
    for part in wanted:
        done[part] = parts[part](args.quick)
        print(json.dumps({"part": part} | _shown(done[part])), flush=True)
    worst = min(done, key=lambda part: (done[part].holds, done[part].margin))
    shown = {part: _shown(value) for part, value in done.items()}
    holds = all(value.holds for value in done.values())
    report(name, done[worst].ratio, done[worst].goal, holds, part=worst, parts=shown, quick=args.quick)


def _shown(part: Part) -> dict[str, Any]:
    return {"ratio": round(part.ratio, 4), "goal": part.goal, "holds": part.holds, **part.facts}


def report(name: str, ratio: float, goal: float, holds: bool, **more: object) -> None:
    """Print the result as the last line and exit with 0 or 1. `more`: whatever explains the ratio."""
    load = [round(x, 2) for x in os.getloadavg()]
    print(json.dumps({"name": name, "ratio": round(ratio, 4), "goal": goal, "holds": holds, **more, "load": load}))
    sys.exit(0 if holds else 1)


def thread_seconds(run: Callable[[*Args], object], *args: *Args) -> float:
    """CPU time of this thread in `run(*args)`: other work on the machine does not count."""
    start = time.thread_time()
    run(*args)
    return time.thread_time() - start


def fastest(run: Callable[[*Args], object], *args: *Args, repeats: int = 3) -> float:
    """The least CPU time of this thread over some repeats."""
    return min(thread_seconds(run, *args) for _ in range(repeats))


def in_fresh_process(function: Callable[[*Args], Any], *args: *Args) -> Any:
    """`function(*args)` in a new interpreter, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; ru_maxrss of a child starts at its parent's
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return max_rss_bytes(resource.getrusage(resource.RUSAGE_SELF))


def max_rss_bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
