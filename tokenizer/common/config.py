"""Settings: typed dataclasses <- YAML <- `key.sub=value`. The only file that imports OmegaConf.

Every part of the code owns its dataclass, and an entry point nests them. An unknown key, a value of the wrong
type and an impossible combination each end in one line that names the key, the value and the way out. A single value is
taken for a list of one.

YAML from elsewhere is data: interpolations (`${oc.env:..}`), anchors, tags and files of absurd size or depth are
refused, and nothing is imported by name.
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

_MOST_BYTES, _MOST_NODES, _MOST_DEPTH = 1 << 20, 20_000, 20  # of a YAML file; the largest of ours has 4 kB


class ConfigError(UserError):
    """A setting that cannot be: the message names the origin, the key, the value and the nearest right one."""


def load_config(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """The defaults of `schema`, then the YAML file at `path`, then `key.sub=value` overrides.

    Raises ConfigError, one line, for a missing file, a YAML slip, an unknown key, a wrong type, a bad combination.
    """
    data = {} if path is None else read_yaml(Path(path))
    _check(schema, data, str(path))
    merged: Any = OmegaConf.create(data)
    for item in overrides:
        merged = OmegaConf.merge(merged, _read_override(schema, item))
    plain = typing.cast("dict[str, Any]", OmegaConf.to_container(merged, resolve=False))
    origin = "the defaults" if path is None else str(path)
    return from_dict(schema, plain, f"{origin} with overrides" if overrides else origin)


def from_dict(schema: type[T], data: Mapping[str, Any], origin: str) -> T:
    """A plain dict -> an instance of `schema`; `origin` names its source in messages."""
    _check(schema, data, origin)
    given = OmegaConf.create(_listed(schema, data))
    try:
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given)))
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise ConfigError(f"{origin}: {key} = {OmegaConf.select(given, key)!r}: {_first_line(error)}") from error
    except UserError as error:  # a combination that a dataclass refuses
        raise ConfigError(f"{origin}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass, or a mapping that holds some -> nested plain dicts and lists, ready for JSON or YAML."""
    if not isinstance(config, Mapping):
        return dataclasses.asdict(config)
    nested = {key: isinstance(value, Mapping) or dataclasses.is_dataclass(value) for key, value in config.items()}
    return {key: to_dict(value) if nested[key] else value for key, value in config.items()}


def defaults_of(schema: type) -> dict[str, Any]:
    """The fields of a config dataclass that have a default, as plain data."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        if field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            found[field.name] = dataclasses.asdict(made) if dataclasses.is_dataclass(made) else made  # type: ignore[arg-type]
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


def with_defaults(stored: Any, today: Any, origin: str) -> Any:
    """`stored`, written by an older version, as today's code reads it: a key that it lacks counts as its default.

    today: a config dataclass, or a mapping that holds some. ConfigError for a key that has another name today.
    """
    if not isinstance(stored, Mapping):
        return stored
    now = today if isinstance(today, Mapping) else vars(today) if dataclasses.is_dataclass(today) else {}
    read = {key: with_defaults(value, now.get(key), origin) for key, value in stored.items()}
    if now is today or not now:
        return read
    for field in dataclasses.fields(today):
        old = field.metadata.get("renamed_from")
        if old in stored:
            raise ConfigError(f"{origin}: key {old!r} is called {field.name!r} today: rename it in that file")
    return defaults_of(type(today)) | read


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML text that `read_yaml` takes: no anchor even if a list occurs twice."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False)


def load_section(schema: type[T], path: str | Path, section: str) -> T:
    """One section (say `model`) of a YAML whose other sections belong to another schema."""
    data = read_yaml(Path(path))
    if not isinstance(data.get(section), Mapping):
        raise ConfigError(f"{path}: no section {section!r}; it has {', '.join(map(repr, data)) or 'nothing'}")
    return from_dict(schema, data[section], f"{path} ({section})")


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested data as key.sub -> value."""
    if not isinstance(data, Mapping):
        return {prefix: data}
    return {k: v for key, value in data.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def differences(left: Any, right: Any) -> list[str]:
    """Where two configs differ: lines of `key: left value / right value`."""
    a, b = flat(left), flat(right)
    return [f"{k}: {a.get(k)!r} / {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file: plain data, no tags, no anchors, bounded. Raises ConfigError, one line."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such config file{hint}")
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(
            f"{path}: {path.stat().st_size} bytes are no config (at most {_MOST_BYTES}); is it the right file?"
        )
    try:
        text = path.read_text(encoding="utf-8")
        _check_nodes(text, str(path))
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_first_line(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level")
    return data


def _check_nodes(text: str, origin: str) -> None:
    """Refuse what makes a small YAML file large or endless, before anything is built from it.

    An alias can repeat a node a billion times or contain itself; deep nesting exhausts the interpreter's stack.
    """
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(
                f"{origin}: line {line}: anchors (&) and aliases (*) are not allowed; write the value out"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH or number > _MOST_NODES:
            limit = f"nested more than {_MOST_DEPTH} deep" if depth > _MOST_DEPTH else f"more than {_MOST_NODES} values"
            raise ConfigError(f"{origin}: line {line}: {limit}; is it the right file?")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    """Plain data only (no tags that build objects), and no key twice: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _read_override(schema: type, item: str) -> Any:
    """`key.sub=value` -> nested data, checked on its own so that a message names the override."""
    if "=" not in item or item.startswith("="):
        raise ConfigError(f"override {item!r}: write it as key.sub=value")
    if item.endswith("="):
        raise ConfigError(f"override {item!r} has no value; for none write {item}null, for an empty text \"{item}''\"")
    try:
        _check_nodes(item.partition("=")[2], f"override {item!r}")
        data = OmegaConf.to_container(OmegaConf.from_dotlist([item]), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"override {item!r}: {_first_line(error)}") from error
    _check(schema, data, f"override {item!r}")
    return data


def _check(schema: type, data: Any, origin: str) -> None:
    """Before OmegaConf sees the data: it would merge unknown keys and resolve interpolations."""
    _check_plain(data, origin)
    _check_keys(schema, data, origin)


def _check_keys(schema: type, data: Any, origin: str, prefix: str = "") -> None:
    """Every key of `data` must be a field of `schema`, all the way down."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{origin}: key {prefix.rstrip('.')!r} is a section, not the value {data!r}")
    hints = typing.get_type_hints(schema)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(schema)}
    for key, value in data.items():
        if key not in fields:
            near = [f.name for f in dataclasses.fields(schema) if f.metadata.get("renamed_from") == key]
            near = near or difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known here: {', '.join(fields)}"
            raise ConfigError(f"{origin}: unknown key {prefix + str(key)!r}; {hint}")
        section = _dataclass_in(fields[key])
        if section is not None and value is not None:
            _check_keys(section, value, origin, f"{prefix}{key}.")
        elif section is None and isinstance(value, Mapping):
            raise ConfigError(f"{origin}: key {prefix + str(key)!r} is a value, not a section with {list(value)}")


def _listed(schema: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `data` in which a single value for a list is a list of one: data.sources=DIR means [DIR]."""
    hints = typing.get_type_hints(schema)

    def fit(value: Any, hint: Any) -> Any:
        section = _dataclass_in(hint)
        if section is not None and isinstance(value, Mapping):
            return _listed(section, value)
        single = isinstance(value, str | int | float) and not isinstance(value, bool)
        return [value] if single and typing.get_origin(hint) is list else value

    return {key: fit(value, hints[key]) for key, value in data.items()}


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass in a field's type, also inside `X | None`."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((c for c in choices if isinstance(c, type) and dataclasses.is_dataclass(c)), None)


def _check_plain(data: Any, origin: str, prefix: str = "", depth: int = 0) -> None:
    """No value may mean more to OmegaConf than its text."""
    if depth > _MOST_DEPTH:
        raise ConfigError(f"{origin}: nested more than {_MOST_DEPTH} deep; is it the right file?")
    if isinstance(data, str) and "${" in data:
        raise ConfigError(f"{origin}: key {prefix!r} holds {data!r}; write the value out, ${{..}} is not expanded")
    if data == "???":  # OmegaConf's "missing", which would quietly become the default
        raise ConfigError(f"{origin}: key {prefix!r} has no value yet; give one, e.g. {prefix}=VALUE")
    children: Any = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children:
        _check_plain(value, origin, f"{prefix}.{key}".lstrip("."), depth + 1)


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
