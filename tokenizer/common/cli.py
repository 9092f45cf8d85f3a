"""Command lines of the entries that take flags: a wrong argument is one line. No torch here, so --help is quick."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from tokenizer.common.errors import UserError

BUDGET_FORMS = "router | tokens:N | average:N | price:P | fixed:a,b,c,d | uniform:K"  # see tokenizer/budget.py


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
