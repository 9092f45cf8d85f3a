"""What a file contains is data: JSON, its fields, and names that become paths are checked before they are used.

A damaged or edited file is one clear line, never a guess.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import types
import typing
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tokenizer.common.errors import UserError

_MOST_BYTES, _MOST_DEPTH = 1 << 30, 50
_OWN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # not "..", hidden, absolute, nor two components
_COMPONENT = re.compile(r"[^/\\\x00-\x1f]+")


def read_json(path: Path, fields: Mapping[str, Any], way_out: str) -> dict[str, Any]:
    """The object in a JSON file, with `fields` checked. Raises UserError, which ends with `way_out`, for anything else.

    Bounds as of `read_json_value`.
    """
    return check_fields(read_json_value(path, way_out), fields, str(path), way_out)


def read_json_value(path: Path, way_out: str) -> Any:
    """The value in a JSON file. UserError for none, and for a file that is not regular or of more than 1 GiB."""
    return parse_json(_read(path, way_out), str(path), way_out)


def read_json_lines(path: Path, fields: Mapping[str, Any], way_out: str) -> list[dict[str, Any]]:
    """The objects in a .jsonl file, with `fields` checked; a last line that a kill cut short is left out."""
    *lines, _cut = _read(path, way_out).split(b"\n")
    texts = ((f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return [check_fields(parse_json(line, origin, way_out), fields, origin, way_out) for origin, line in texts]


def parse_json(text: str | bytes, origin: str, way_out: str) -> Any:
    """The value of a JSON text.

    UserError, which ends with `way_out`, for no JSON, for NaN and infinite numbers and for too deep nesting.
    """
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:60] if type(error) is ValueError else type(error).__name__
        raise UserError(f"{origin}: damaged: cannot be read as JSON ({reason}); {way_out}") from error
    if _is_deeper(value, _MOST_DEPTH):
        raise UserError(f"{origin}: damaged: nested more than {_MOST_DEPTH} deep; {way_out}")
    return value


def check_fields(data: Any, fields: Mapping[str, Any], origin: str, way_out: str, inside: str = "") -> dict[str, Any]:
    """`data` must be an object that has all `fields`: name -> its type, such as int, list[int] or str | None.

    In place of a type, a mapping is the fields of an object, and [mapping] those of each in a list. A bool is no
    number, an int passes for a float, and a float must be finite. Other fields are left alone. inside: for messages,
    such as "card.".
    """
    if not isinstance(data, dict):
        place = inside.rstrip(".") and f"{inside.rstrip('.')}: "
        raise UserError(f"{origin}: {place}expected an object, found {_short(data)}; {way_out}")
    for name, hint in fields.items():
        if name not in data:
            raise UserError(f"{origin}: lacks {inside + name!r}; {way_out}")
        value, place = data[name], f"{inside}{name}"
        if isinstance(hint, Mapping):
            check_fields(value, hint, origin, way_out, f"{place}.")
        elif isinstance(hint, list) and isinstance(value, list):
            for i, each in enumerate(value):
                check_fields(each, hint[0], origin, way_out, f"{place}[{i}].")
        elif isinstance(hint, list) or not fits(value, hint):
            plain = isinstance(hint, type) and not typing.get_args(hint)
            wanted = hint.__name__ if plain else "a list" if isinstance(hint, list) else str(hint)
            raise UserError(f"{origin}: {place} = {_short(value)} is not {wanted}; {way_out}")
    return data


def check_inside(name: str, origin: str, way_out: str) -> PurePosixPath:
    """A relative path that a file names, such as shards/000000.safetensors: it may not lead out of its folder."""
    parts = name.split("/")
    if not all(_COMPONENT.fullmatch(part) and part not in (".", "..") for part in parts):
        raise UserError(f"{origin}: {name!r} is not a path inside the folder; {way_out}")
    return PurePosixPath(name)


def child(folder: Path, name: str, origin: str, way_out: str) -> Path:
    """folder/name for a name of our own programs: one component of ASCII letters, digits, `_`, `.` and `-`."""
    if not _OWN_NAME.fullmatch(name):
        raise UserError(f"{origin}: damaged: {_short(name)} is not a name inside {folder}; {way_out}")
    return folder / name


def remove_child(folder: Path, name: str) -> None:
    """Delete `name`, a direct child of `folder`, if it is there; a link is removed, never followed."""
    path = child(folder, name, str(folder), "delete it by hand")
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _read(path: Path, way_out: str) -> bytes:
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path}: not a regular file of at most {_MOST_BYTES >> 30} GiB; {way_out}")
    return path.read_bytes()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_is_deeper(child, depth - 1) for child in children if isinstance(child, dict | list))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of this type, by the rules of `check_fields`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(fits(each, typing.get_args(hint)[0]) for each in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
