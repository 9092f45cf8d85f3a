"""The paper's claims in miniature, from nothing to a report, by one command.

    bash scripts/mini/reproduce.sh                    # all stages that are not finished, then the report
    bash scripts/mini/reproduce.sh --dry-run          # the stages with CPU minutes, and which are finished
    bash scripts/mini/reproduce.sh --only 'router_*'  # these stages alone; what they read must be finished
    bash scripts/mini/reproduce.sh --from proxy_s1    # leave out the stages that are listed before it

A stage's folder is named by a hash of its command, its config and the content of all that it reads. A finished stage
leaves a note with the sha256 of its products; it is not run again while both still fit. Rerun the same command to
resume: stages of training resume where they stopped. No stage that reads test clips starts before all others are done.

Writes OUT/stages/, OUT/logs/, and at the end OUT/figures.json and OUT/report.html (reproduce_claims.py).
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from reproduce_stages import PLAN, SCALES, Stage, Study

from tokenizer.common.cli import Parser, answer_help, at_least

ROOT = Path(__file__).parents[2]
_PRELOADED = ["tokenizer.train", "tokenizer.router.train", "tokenizer.router.curate", "tokenizer.data.pack",
              "autoregressive.train", "autoregressive.extract_codes", "evaluations.quality_cost.__main__",
              "reproduce_samples", "reproduce_claims"]  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = Parser("Reproduce the paper's claims in miniature.")
    parser.add_argument("--scale", choices=list(SCALES), default="mini", help="debug: in seconds, for tests")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results/reproduce, or .._debug")
    parser.add_argument("--dry-run", action="store_true", help="list the stages and what is left to do")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="names; * and ? match as in a shell")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="begin at this stage of the list")
    parser.add_argument("--jobs", type=at_least(1), metavar="N", help="stages at once (default: 2, on a GPU 1)")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_args)  # before torch is imported

from tokenizer.common.checkpoint import atomic_write, file_sha256
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.work_units import only_job_in


@dataclass(frozen=True)
class Note:
    """What a finished stage leaves beside its folder. minutes: CPU, of the run that finished it."""

    digest: str
    minutes: float


class Workplace:
    """The folder of a study: where each stage works, and which are finished."""

    def __init__(self, folder: Path, stages: Mapping[str, Stage]) -> None:
        self.folder, self.stages = folder.absolute(), stages
        self._notes: dict[str, Note] = {}

    def key(self, name: str) -> str | None:
        """Hash of command, config and inputs; None while an input is not finished."""
        stage = self.stages[name]
        inputs = {other: self.note(other) for other in stage.inputs}
        if not all(inputs.values()):
            return None
        files = [word.partition("::")[0] for word in stage.args if word.startswith(("configs/", "tests/"))]
        configs = {file: (ROOT / file).read_text() for file in files}
        digests = {other: note.digest for other, note in inputs.items() if note}
        facts = [stage.module, stage.args, stage.products, configs, digests]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    def path(self, name: str) -> Path:
        """The folder of a stage whose inputs are finished."""
        return self.folder / "stages" / f"{name}-{self.key(name)}"

    def note(self, name: str) -> Note | None:
        """Of a finished stage whose products are as it left them; None otherwise."""
        if name not in self._notes and self.key(name) is not None:
            file = self.path(name).with_suffix(".json")
            found = Note(**json.loads(file.read_text())) if file.is_file() else None
            if found and found.digest == digest_of(self.path(name), self.stages[name].products):
                self._notes[name] = found
        return self._notes.get(name)

    def command(self, name: str) -> list[str]:
        """The module and its arguments, with the folders filled in."""
        stage, folder = self.stages[name], self.path(name)
        names = {"self": folder, **{other: self.path(other) for other in stage.inputs}}
        return [stage.module, *(_filled(word, names) for word in stage.args)]


def _filled(word: str, folders: Mapping[str, Path]) -> str:
    for name, folder in folders.items():
        word = word.replace(f"<{name}>", str(folder))
    return word


def digest_of(folder: Path, products: tuple[str, ...]) -> str:
    """sha256 over names and contents of the files that the patterns match; "" if a pattern matches none."""
    digest = hashlib.sha256()
    for pattern in products:
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if not files:
            return ""
        for file in files:
            digest.update(f"{file.relative_to(folder)} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def work(command: list[str], folder: Path, products: tuple[str, ...], log: Path) -> None:
    """Run a stage in this process, its output into `log`, and leave its note. Exits as the command does."""
    os.chdir(ROOT)
    with open(log, "w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    print(" ".join(command), flush=True)
    folder.mkdir(parents=True, exist_ok=True)

    def main() -> int:
        sys.argv = command
        code = int(importlib.import_module(command[0]).main() or 0)
        if code == 0:
            usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
            minutes = sum(each.ru_utime + each.ru_stime for each in usage) / 60
            note = {"digest": digest_of(folder, products), "minutes": round(minutes, 4)}
            atomic_write(folder.with_suffix(".json"), json.dumps(note).encode())
        return code

    run_cli(main)


class Runner:
    """Runs stages as their inputs are finished, `jobs` at once, each in a process forked from one that has torch."""

    def __init__(self, place: Workplace, jobs: int) -> None:
        self.place, self.jobs = place, jobs
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_PRELOADED)
        self.running: dict[str, BaseProcess] = {}

    def run(self, names: list[str]) -> None:
        """Run these stages unless they are finished. UserError if one fails, or reads one that is not finished."""
        waiting = [name for name in names if self.place.note(name) is None]
        try:
            while waiting or self.running:
                for name in [name for name in waiting if self._is_ready(name)][: self.jobs - len(self.running)]:
                    waiting.remove(name)
                    self._start(name)
                if not self.running:
                    raise UserError(self._reason(waiting[0]))
                self._collect()
        finally:
            for process in self.running.values():  # a stage that is stopped saves what it can
                process.terminate()
            for process in self.running.values():
                process.join()

    def _is_ready(self, name: str) -> bool:
        stages = self.place.stages
        before = [n for n, s in stages.items() if s.level != "test"] if stages[name].level == "test" else []
        return all(self.place.note(other) for other in (*stages[name].inputs, *before))

    def _reason(self, name: str) -> str:
        missing = [n for n, s in self.place.stages.items() if self.place.note(n) is None and n != name]
        needed = [other for other in self.place.stages[name].inputs if other in missing]
        if needed:
            return f"{name} reads {needed[0]}, which is not finished: run it first"
        others = [other for other in missing if self.place.stages[other].level != "test"]
        return f"{name} reads test clips, and {others[0]} is not finished: test clips are read last"

    def _start(self, name: str) -> None:
        stage, log = self.place.stages[name], self.place.folder / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        args = (self.place.command(name), self.place.path(name), stage.products, log)
        self.running[name] = process = self.context.Process(target=work, args=args)
        process.start()
        print(f"reproduce: {name}", flush=True)

    def _collect(self) -> None:
        ended = wait([process.sentinel for process in self.running.values()])
        for name, process in list(self.running.items()):
            if process.sentinel in ended:
                process.join()
                del self.running[name]
                log = self.place.folder / "logs" / f"{name}.txt"
                if process.exitcode != 0:
                    last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
                    raise UserError(f"stage {name} failed ({last[:200]}); its output is in {log}")
                if self.place.note(name) is None:
                    raise UserError(f"stage {name} left no {', '.join(self.place.stages[name].products)}; see {log}")


def chosen(stages: Mapping[str, Stage], only: list[str], first: str | None) -> list[str]:
    """The stages that the flags leave, in order. UserError for a name that fits none."""
    for pattern in [*only, *([first] if first else [])]:
        if not fnmatch.filter(stages, pattern):
            raise UserError(f"no stage {pattern!r}; --dry-run lists them")
    names = list(stages)
    if first:
        names = names[names.index(fnmatch.filter(stages, first)[0]) :]
    return [name for name in names if not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)]


def listing(place: Workplace, names: list[str], costs: Mapping[str, float]) -> Iterator[str]:
    """The lines of --dry-run."""
    total = left = 0.0
    for name in names:
        stage, note = place.stages[name], place.note(name)
        minutes = note.minutes if note else costs[stage.family]
        total, left = total + minutes, left + (0 if note else minutes)
        yield f"{name:34} {minutes:8.2f} min  {stage.level:10} {'finished' if note else 'to do'}"
    yield f"{len(names)} stages, {total / 60:.2f} hours of one CPU core, {left / 60:.2f} left"


def main() -> None:
    args = parse_args()
    folder = args.out or Path("results") / ("reproduce" if args.scale == "mini" else f"reproduce_{args.scale}")
    study = Study(args.scale)
    place, names = Workplace(folder, study.stages), chosen(study.stages, args.only, args.first)
    if args.dry_run:
        print("\n".join(listing(place, names, PLAN["minutes"][args.scale])))
        return
    folder.mkdir(parents=True, exist_ok=True)
    with only_job_in(folder, "choose another --out"):
        Runner(place, args.jobs or default_jobs()).run(names)
        missing = [name for name in study.stages if place.note(name) is None]
        if missing:
            print(f"{len(missing)} stages are not finished, {missing[0]} is the first: no report yet")
            return
        report(study, place, args.scale)


def report(study: Study, place: Workplace, scale: str) -> None:
    """Compute all claims from the finished stages and write figures.json and report.html."""
    from reproduce_claims import all_figures, headline_figure, report_page

    minutes = sum(note.minutes for name in study.stages if (note := place.note(name)))
    command = "bash scripts/mini/reproduce.sh" + ("" if scale == "mini" else f" --scale {scale}")
    figures = all_figures(study, place.path, {"scale": scale, "command": command, "minutes": minutes})
    atomic_write(place.folder / "figures.json", (json.dumps(figures, indent=1, allow_nan=False) + "\n").encode())
    atomic_write(place.folder / "report.html", report_page(figures).encode())
    atomic_write(place.folder / "claims_1_and_4.png", headline_figure(figures))
    for name, claim in figures["claims"].items():
        print(f"{name:44} {claim['verdict']}")
    print(place.folder / "report.html")


def default_jobs() -> int:
    """Two on a CPU, since every stage uses one core; one on a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


if __name__ == "__main__":
    run_cli(main)
