"""The shape of clips: frames, and the size of pictures, one number of pixels for a square, or [height, width].

Configs and files keep the plain form, an int or a list of two, so that those of square pictures have one spelling.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizer.common.errors import UserError

Size = int | Sequence[int]


class HasClipShape(Protocol):
    """A config of models or data."""

    @property
    def num_frames(self) -> int: ...
    @property
    def size(self) -> Any: ...


def sides(size: Size) -> tuple[int, int]:
    """-> (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def plain_size(value: Any, name: str) -> int | list[int]:
    """`value` as files keep it. UserError, which begins with `name`, for anything but one or two whole numbers >= 1."""
    numbers = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(numbers) != 2 or not all(type(number) is int and number >= 1 for number in numbers):
        raise UserError(f"{name} = {value!r}: give one whole number of pixels (at least 1), or [height, width]")
    return numbers[0] if numbers[0] == numbers[1] else numbers


def size_text(size: Size) -> str:
    """ "64" for a square, "96x160" (height first) for others."""
    height, width = sides(size)
    return str(height) if height == width else f"{height}x{width}"


def fitted(size: Size) -> str:
    """How pictures get a size, in words; `video_io.resize_center_crop` does it."""
    if isinstance(size, int):
        return f"short side {size}, centre crop"
    return f"scaled to cover {size_text(size)} (height x width), centre crop"


def size_argument(text: str) -> int | list[int]:
    """The type of a command's --size: 64, or 96x160 with the height first."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give 64, or 96x160 with the height first")
    return plain_size([int(side) for side in text.split("x")] if "x" in text else int(text), "--size")


def check_whole_patches(size: Size, patch_size: int, section: str = "") -> None:
    """UserError unless both sides are multiples of a patch's. section: "model." of a config, in front of the keys."""
    nearest = [patch_size * max(1, round(side / patch_size)) for side in sides(size)]
    if list(sides(size)) != nearest:
        raise UserError(
            f"{section}size = {size} is not a multiple of {section}patch_size = {patch_size}; the nearest that is: "
            f"{plain_size(nearest, 'size')}"
        )


def check_same_shape(given: HasClipShape, name: str, wanted: HasClipShape, reader: str, way_out: str = "") -> None:
    """UserError, which names both and the way out, if the clips of `given` are not those that `wanted` reads.

    way_out: "" if `name` is a section of a config that can be set.
    """
    if (given.num_frames, sides(given.size)) != (wanted.num_frames, sides(wanted.size)):
        setting = str(wanted.size).replace(" ", "")
        way_out = way_out or f"set {name}.num_frames={wanted.num_frames} {name}.size={setting}"
        raise UserError(
            f"{name} gives clips of {given.num_frames} frames of {size_text(given.size)} pixels, but {reader} reads "
            f"{wanted.num_frames} frames of {size_text(wanted.size)} pixels: {way_out}"
        )
