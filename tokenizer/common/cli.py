"""Command lines of all entries: a mistake is one line, numbers are checked as they are read, `--help` is instant.

This file imports no torch, which takes seconds. An entry defines its parser above its other imports and calls
`answer_help` there.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tokenizer.common.errors import UserError, say_error

# Values of flags whose own modules import torch.
BUDGET_FORMS = (
    "router | tokens:N | average:N | price:P | quality:Q | fixed:a,b,c,d | uniform:K"  # see tokenizer/budget.py
)
TRADE_OFF_HELP = "w_q of a router trained with labels=quality, within [0, 2] (default: that of its training)"
MOST_FPS = 1000
EXTRACTORS = ("i3d", "videomae", "effnet")  # of video features, for Frechet distances
PRECISION_NAMES = ("none", "bf16", "fp16")  # none is float32


def answer_help(parse: Callable[[], object]) -> None:
    """Parse the command line once before torch is imported, so that --help and a wrong argument end at once."""
    try:
        parse()
    except UserError as error:
        sys.exit(say_error(f"error: {error}"))


class Parser(argparse.ArgumentParser):
    """A wrong argument is one line like every other mistake; no flag may be shortened."""

    def __init__(self, description: str, **more: object) -> None:
        super().__init__(description=description, allow_abbrev=False, **more)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not below `smallest`."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {smallest}")
        return int(text)

    return number


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def frame_rate(text: str) -> float:
    """An argparse type: frames a second, above 0; a mistyped one would repeat every picture without end."""
    rate = positive(text)
    if rate > MOST_FPS:
        raise argparse.ArgumentTypeError(f"{text!r} is no frame rate: at most {MOST_FPS} a second")
    return rate


def add_tokenizing_flags(parser: argparse.ArgumentParser) -> None:
    """Weights, reading and device, for the commands that take videos to tokens."""
    add = parser.add_argument
    add("--vq_ckpt", required=True, help="weights of the tokenizer: .safetensors or a run folder")
    add("--router_ckpt", help="weights of the router; not needed for the budgets fixed and uniform")
    add("--tok_config", help="YAML of the tokenizer, checked against its weights")
    add("--router_config", help="YAML of the router, checked against its weights")
    add("--fps", type=frame_rate, help="frame rate to read at (default: each file's own)")
    add("--batch-size", type=at_least(1), default=4, metavar="N", help="clips that go through the models together")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N (default: auto)")
    add("--backend", choices=("pyav", "decord"), default="pyav", help="video reader (default: pyav)")


def training_parser(description: str) -> argparse.ArgumentParser:
    """The command line of a training stage: CONFIG.yaml [key.sub=value ...] [flags]."""
    parser = _stage_parser(description, "build all, run a few steps, print what the run would cost and what is missing")
    parser.add_argument(
        "--global-batch-size", type=int, metavar="N", help="clips of one update on all processes: run.batch_size=N"
    )
    parser.add_argument(
        "--overfit-one-batch",
        action="store_true",
        help="train on the first batch alone, into a folder of its own (..-overfit): does the model learn at all?",
    )
    return parser


def work_parser(description: str) -> argparse.ArgumentParser:
    """The command line of a stage whose work any number of processes share (2 and 5a)."""
    return _stage_parser(description, "load everything, print how much work is left, write nothing")


def _stage_parser(description: str, dry_run: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=Path, help="YAML of this stage, see configs/README.md")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that override the YAML")
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    return parser
