"""Classes by name or number: what `--class-idx` means. Numbers count from 0 in the order of the model's own classes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from tokenizer.common.errors import UserError
from tokenizer.data.ucf101 import ASCII_ORDER


def names_of(class_names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Those of the weights file, else UCF-101's in ASCII order where there are 101, else `class_7` and so on."""
    if class_names:
        return tuple(class_names)
    return ASCII_ORDER if num_classes == len(ASCII_ORDER) else tuple(f"class_{i}" for i in range(num_classes))


def parse_classes(text: str | None, names: Sequence[str]) -> list[int]:
    """ "1,JumpRope,71" -> class numbers, each once; None: all of them. UserError offers the nearest names."""
    if text is None:
        return list(range(len(names)))
    return list(dict.fromkeys(_parse_class(part.strip(), names) for part in text.split(",")))


def _parse_class(text: str, names: Sequence[str]) -> int:
    if text.isdecimal():
        if int(text) < len(names):
            return int(text)
        raise UserError(f"--class-idx {text}: this model has the classes 0 .. {len(names) - 1}")
    number_of = {name.lower(): number for number, name in enumerate(names)}
    if text.lower() in number_of:
        return number_of[text.lower()]
    near = difflib.get_close_matches(text.lower(), number_of, n=3, cutoff=0.4)
    offered = ", ".join(names[number_of[name]] for name in near) or f"{names[0]} .. {names[-1]}"
    raise UserError(f"--class-idx {text!r}: this model has no such class; the nearest are {offered}")
