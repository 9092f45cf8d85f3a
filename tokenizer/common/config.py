"""Settings: typed dataclasses <- YAML <- `key.sub=value`. The only file that imports OmegaConf.

Every part of the code owns a dataclass beside it; an entry point nests them. A key that no dataclass has, a value of
the wrong type and an impossible combination each end in one line that names the key, the value and the way out.
YAML that came from elsewhere cannot reach the machine: interpolations (`${oc.env:..}`) are refused, never resolved,
and nothing is imported by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenizer.common.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A setting that cannot be: the message names the origin, the key, the value and the nearest right one."""


def load_config(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """The defaults of `schema`, then the YAML file at `path`, then `key.sub=value` overrides.

    Raises ConfigError, one line, for a missing file, a YAML slip, an unknown key, a wrong type, a bad combination.
    """
    data = {} if path is None else _read_yaml(Path(path))
    merged = OmegaConf.create(data)
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise ConfigError(f"override {item!r}: write it as key.sub=value")
        try:
            one = OmegaConf.to_container(OmegaConf.from_dotlist([item]), resolve=False)
            _check_keys(schema, one, f"override {item!r}")
            merged = OmegaConf.merge(merged, OmegaConf.create(one))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"override {item!r}: {_first_line(error)}") from error
    plain = OmegaConf.to_container(merged, resolve=False)
    return from_dict(schema, typing.cast("dict[str, Any]", plain), "the defaults" if path is None else str(path))


def from_dict(schema: type[T], data: Mapping[str, Any], origin: str) -> T:
    """A plain dict -> an instance of `schema`; `origin` names where the dict came from in messages."""
    _check_keys(schema, data, origin)
    _check_no_interpolation(data, origin)
    try:
        # `data` came from to_container or JSON: no interpolation is left in it, so to_object resolves nothing
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(data)))
        return typing.cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        if not isinstance(error.__cause__, UserError):
            raise ConfigError(f"{origin}: key {key!r}: {_first_line(error)}") from error
        raise ConfigError(f"{origin}: {error.__cause__}") from error
    except UserError as error:
        raise ConfigError(f"{origin}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass -> nested plain dicts and lists, ready for JSON or YAML."""
    return dataclasses.asdict(config)


def save_config(config: Any, path: str | Path) -> None:
    """Write `config` as YAML that `load_config` reads back to an equal object."""
    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def load_section(schema: type[T], path: str | Path, section: str) -> T:
    """One section (say `model`) of a YAML whose other sections belong to another schema."""
    data = _read_yaml(Path(path))
    if not isinstance(data.get(section), Mapping):
        raise ConfigError(f"{path}: no section {section!r}; it has {', '.join(map(repr, data)) or 'nothing'}")
    return from_dict(schema, data[section], f"{path} ({section})")


def differences(left: Any, right: Any) -> list[str]:
    """Where two configs differ: lines of `key: left value / right value`."""

    def flat(data: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(data, Mapping):
            return {prefix: data}
        return {k: v for key, value in data.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}

    a, b = flat(left), flat(right)
    return [f"{k}: {a.get(k)!r} / {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such config file{hint}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_first_line(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level")
    return data


def _check_keys(schema: type, data: Any, origin: str, prefix: str = "") -> None:
    """Every key of `data` must be a field of `schema`, all the way down."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{origin}: key {prefix.rstrip('.')!r} is a section, not the value {data!r}")
    hints = typing.get_type_hints(schema)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(schema)}
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known here: {', '.join(fields)}"
            raise ConfigError(f"{origin}: unknown key {prefix + str(key)!r}; {hint}")
        section = _dataclass_in(fields[key])
        if section is not None and value is not None:
            _check_keys(section, value, origin, f"{prefix}{key}.")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in a field's type, also inside `X | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)), None)
    return hint if dataclasses.is_dataclass(hint) else None


def _check_no_interpolation(data: Any, origin: str, prefix: str = "") -> None:
    if isinstance(data, str) and "${" in data:
        raise ConfigError(f"{origin}: key {prefix!r} holds {data!r}; write the value out, ${{..}} is not expanded")
    children: Any = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children:
        _check_no_interpolation(value, origin, f"{prefix}.{key}".lstrip("."))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
