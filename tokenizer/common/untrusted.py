"""What a file contains is data: names that become paths, JSON and its fields are checked before they are used.

A field's check is a function that tells whether a value is acceptable, such as `whole(1)` or `optional(text)`. True and
False are never numbers.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizer.common.errors import UserError

Check = Callable[[Any], bool]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # never "..", hidden, absolute, or more than one component


def is_safe_name(name: Any) -> bool:
    """Whether `name` is one path component of the form that our programs write."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def child(folder: Path, name: Any, origin: object, depth: int = 1) -> Path:
    """folder/name for a name that the file `origin` holds. UserError unless it is at most `depth` safe components."""
    parts = name.split("/") if isinstance(name, str) else []
    if not 1 <= len(parts) <= depth or not all(map(is_safe_name, parts)):
        raise UserError(f"{origin}: is damaged: {str(name)[:80]!r} is not a name that belongs into {folder}")
    return folder.joinpath(*parts)


def remove_child(folder: Path, name: str) -> None:
    """Delete `name`, a direct child of `folder`, if it is there; a link is removed, never followed."""
    path = child(folder, name, folder)
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def parse_json(text: str | bytes, origin: object, way_out: str) -> Any:
    """JSON without NaN and infinities. UserError in one line, ending with `way_out`, if `text` is none."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # thousands of nested lists are too deep for the parser
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"{origin}: is damaged ({reason[:160]}); {way_out}") from error


def read_json(path: Path, way_out: str) -> Any:
    """The JSON in a file; see `parse_json`."""
    return parse_json(path.read_bytes(), path, way_out)


def check_fields(
    record: Any, required: Mapping[str, Check], origin: object, way_out: str, allowed: Mapping[str, Check] | None = None
) -> dict[str, Any]:
    """`record` if it is an object with all `required` fields, perhaps some `allowed` ones, no other, each acceptable.

    UserError naming the first field that is not.
    """
    allowed = allowed or {}
    if not isinstance(record, dict):
        raise UserError(f"{origin}: is damaged: {_shown(record)} is not an object; {way_out}")
    for key in (*required, *(key for key in record if key not in required)):
        check = required.get(key) or allowed.get(key)
        if key not in record or check is None or not check(record[key]):
            found = f"{key!r} is {_shown(record[key])}" if key in record else f"{key!r} is missing"
            raise UserError(f"{origin}: is damaged: {found}; {way_out}")
    return record


def whole(low: int = 0, high: int | None = None) -> Check:
    """An int within [low, high]."""
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v and (high is None or v <= high)


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite int or float within [low, high]."""
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) and low <= v <= high


def text(v: Any) -> bool:
    """A string."""
    return isinstance(v, str)


def optional(check: Check) -> Check:
    """None, or what `check` accepts."""
    return lambda v: v is None or check(v)


def list_of(check: Check, least: int = 0) -> Check:
    """A list of at least `least` values that `check` accepts."""
    return lambda v: isinstance(v, list) and len(v) >= least and all(map(check, v))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _shown(value: Any) -> str:
    return " ".join(repr(value)[:60].split())
