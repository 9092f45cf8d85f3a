"""Weights that other code saved: read them without running anything in them, and find our name for each tensor.

Both sides are brought into one neutral spelling, in which nothing is fused (queries, keys and values apart), by rules
over names. What the names leave open is matched by shape, then by order. Nothing is guessed in silence: `Match` lists
each match with its rule, and the names left over on either side.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenizer.common.config import read_yaml
from tokenizer.common.errors import UserError

DROP = "drop"  # in a map: this tensor of theirs has no place in ours
_HOLDERS = ("ema", "model", "state_dict")  # the first that a checkpoint has holds its weights
_WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and of torch.compile
_NUMBERS = "?bhilqBHILQefd"


@dataclass(frozen=True)
class ForeignFile:
    """A checkpoint of other code. `holder`: the key of its weights, empty if they are the file itself."""

    path: Path
    tensors: dict[str, Tensor]
    holder: str
    other: dict[str, str]  # what else is in the file, in words

    def inventory(self) -> Iterator[str]:
        """A line for each tensor, then for everything else."""
        for name, tensor in self.tensors.items():
            yield f"{name}  {tuple(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}"
        yield from (f"({name}: {what})" for name, what in self.other.items())


def read_foreign(path: str | Path) -> ForeignFile:
    """Read `.safetensors`, or a pickled checkpoint that holds tensors, plain Python values and NumPy scalars only.

    Raises UserError for a missing or damaged file, and for a pickle that names anything else, with that name: loading
    it would run code of whoever wrote the file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict of weights")
    holder = next((key for key in _HOLDERS if isinstance(content.get(key), Mapping)), "")
    weights = content[holder] if holder else content
    plain = {name: ".".join(part for part in str(name).split(".") if part not in _WRAPPERS) for name in weights}
    tensors = {plain[name]: value for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: no tensors under {', '.join(_HOLDERS)} or at the top; it has {', '.join(content)}")
    other = {f"{holder}.{k}" if holder else str(k): _word(v) for k, v in weights.items() if not isinstance(v, Tensor)}
    other |= {str(key): _word(value) for key, value in content.items() if holder and key != holder}
    return ForeignFile(path, tensors, holder, other)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error


def _read_pickle(path: Path) -> Any:
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, *{type(np.dtype(kind)) for kind in _NUMBERS}]
    allowed += [(scalar, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")]
    with torch.serialization.safe_globals(allowed):
        try:
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # an old file without a zip around it: the loader below names the first one itself
            refused = []
        if refused:
            raise UserError(
                f"{path}: refused, because its pickle names {', '.join(sorted(refused))}; only tensors, plain values "
                "and NumPy scalars are read. Save the weights alone on a machine that may trust the file"
            )
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            text = " ".join(str(error).split())
            found = re.search(r"(?:GLOBAL|global:?) ([\w.]+)", text)
            cause = "cannot be read: it is no pickled checkpoint, or damaged"
            reason = f"refused, because its pickle names {found[1]}" if found else cause
            raise UserError(f"{path}: {reason}") from error


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{len(value)} entries"
    if isinstance(value, int | float | str | bool | np.generic):
        return repr(value)[:80]
    return type(value).__name__


# --- the neutral spelling -------------------------------------------------------------------------------------------

Rule = tuple[str, str]
"""A regular expression and what it becomes; all rules are applied, in order."""

_QKV: tuple[Rule, ...] = (
    (r"\.(in_proj_|wqkv\.|to_qkv\.|qkv\.|qkv_proj\.)(weight|bias)$", r".qkv.\2"),
    (r"\.(to_q|q_proj|wq|query)\.", ".q."),
    (r"\.(to_k|k_proj|wk|key)\.", ".k."),
    (r"\.(to_v|v_proj|wv|value)\.", ".v."),
    (r"\.(to_out\.0|to_out|out_proj|wo|proj)\.(weight|bias)$", r".o.\2"),
)


def neutral(tensors: Mapping[str, Tensor], rules: Sequence[Rule], splits: Mapping[str, Split]) -> dict[str, Piece]:
    """Every tensor under its neutral name, fused ones in pieces. Raises UserError if two get the same name."""
    pieces: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        spelt = name
        for pattern, by in (*rules, *_QKV):
            spelt = re.sub(pattern, by, spelt)
        for part, piece in _split(spelt, tensor, splits):
            if part in pieces:
                raise UserError(f"{name} and {pieces[part].name} both mean {part}; name one of them in --map")
            pieces[part] = Piece(name, piece)
    return pieces


@dataclass(frozen=True)
class Piece:
    """A tensor or, of a fused one, a part."""

    name: str  # as its file spells it
    tensor: Tensor


@dataclass(frozen=True)
class Split:
    """How a fused tensor comes apart along its first axis: into parts of equal size, or after so many rows."""

    names: tuple[str, ...]
    rows: int | None = None


def _split(spelt: str, tensor: Tensor, splits: Mapping[str, Split]) -> list[tuple[str, Tensor]]:
    if match := re.fullmatch(r"(.*)\.qkv\.(weight|bias)", spelt):
        return [(f"{match[1]}.{x}.{match[2]}", part) for x, part in zip("qkv", tensor.chunk(3), strict=True)]
    for pattern, split in splits.items():
        if match := re.fullmatch(pattern, spelt):
            if split.rows is None:
                parts: Sequence[Tensor] = tensor.chunk(len(split.names))
            else:
                parts = tensor.split([split.rows, len(tensor) - split.rows])
            return [(match.expand(name), part) for name, part in zip(split.names, parts, strict=True)]
    return [(spelt, tensor)]


# --- matching -------------------------------------------------------------------------------------------------------


@dataclass
class Match:
    """Which piece of theirs fills which of ours."""

    filled: dict[str, Tensor] = field(default_factory=dict)  # our name -> whole tensor
    by_rule: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # rule -> "theirs -> ours"
    missing: list[str] = field(default_factory=list)  # ours, with shapes
    left_over: list[str] = field(default_factory=list)  # theirs, with shapes
    dropped: list[str] = field(default_factory=list)  # theirs, named in the map

    def note(self, rule: str, theirs: str, ours: str) -> None:
        line = f"{theirs} -> {ours}"
        if line not in self.by_rule[rule]:
            self.by_rule[rule].append(line)

    def check(self, origin: str) -> None:
        """Raises UserError if any tensor of ours is not filled, or any of theirs has no place."""
        if not self.missing and not self.left_over:
            return
        lines = []
        if self.missing:
            lines.append(f"{len(self.missing)} of ours are not filled: {_some(self.missing)}")
        if self.left_over:
            lines.append(f"{len(self.left_over)} of theirs have no place: {_some(self.left_over)}")
        raise UserError(
            f"{origin}: nothing is written; {'; '.join(lines)}. Name them in --map, a YAML of lines "
            f"`theirs: ours` or `theirs: {DROP}` (theirs may end in *)"
        )


def match(
    theirs: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    rules: Sequence[Rule],
    splits: Mapping[str, Split] | None = None,
    given: Mapping[str, str] | None = None,
    part_of: Callable[[str], str] = lambda name: "",
    reshape: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Match:
    """Find for every tensor of ours the one of theirs that holds it; the result's dtype is ours.

    given: their name (or a pattern with *) -> our name, or DROP. part_of: only tensors of one part of a model are
    matched by shape. reshape: bring a tensor for our neutral name into our order of axes.
    """
    splits = splits or {}
    found = Match()
    pieces = neutral(_mapped(theirs, given or {}, found), rules, splits)
    wanted = neutral(ours, rules, splits)
    taken: dict[str, Piece] = {}  # neutral name of ours -> theirs

    for part, ours_piece in wanted.items():
        if part in pieces:
            tensor = fit(reshape(part, pieces[part].tensor), ours_piece.tensor.shape)
            if tensor is not None:
                found.note("name", pieces[part].name, ours_piece.name)
                taken[part] = Piece(pieces.pop(part).name, tensor)

    for group, parts in _by_shape((p for p in wanted if p not in taken), wanted, part_of).items():
        alike = _by_shape(pieces, pieces, part_of).get(group, [])
        if len(alike) == len(parts):
            for part, their_part in zip(parts, alike, strict=True):  # both in their order of registration
                tensor = fit(pieces[their_part].tensor, wanted[part].tensor.shape)
                if tensor is not None:
                    rule = "shape" if len(parts) == 1 else "shape and order"
                    found.note(rule, pieces[their_part].name, wanted[part].name)
                    taken[part] = Piece(pieces.pop(their_part).name, tensor)

    parts_of: dict[str, list[str]] = defaultdict(list)
    for part, piece in wanted.items():
        parts_of[piece.name].append(part)
    for name, parts in parts_of.items():
        if all(part in taken for part in parts):
            found.filled[name] = torch.cat([taken[part].tensor for part in parts]).to(ours[name].dtype)
        else:
            found.missing.append(f"{name} {tuple(ours[name].shape)}")
    found.left_over = [f"{piece.name} {tuple(piece.tensor.shape)}" for piece in pieces.values()]
    return found


def fit(tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """The tensor in `shape` if the two differ in axes of length 1 (a 1x1 convolution), or leading axes are merged."""
    if tuple(x for x in tensor.shape if x != 1) == tuple(x for x in shape if x != 1):
        return tensor.reshape(shape)
    merged = tensor.ndim > len(shape) >= 2 and tensor.shape[-1] == shape[-1] and tensor.numel() == shape.numel()
    return tensor.reshape(shape) if merged else None


def _mapped(theirs: Mapping[str, Tensor], given: Mapping[str, str], found: Match) -> dict[str, Tensor]:
    """Theirs under the names of the map, without the dropped ones. Our rules read our own names too."""
    for pattern in given:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in theirs):
            raise UserError(f"--map: no tensor of theirs is called {pattern!r}; run without --to to list their names")
    named = {}
    for name, tensor in theirs.items():
        target = next((to for pattern, to in given.items() if fnmatch.fnmatchcase(name, pattern)), name)
        if target == DROP:
            found.dropped.append(name)
        else:
            named[target] = tensor
    return named


def _by_shape(
    parts: Iterable[str], pieces: Mapping[str, Piece], part_of: Callable[[str], str]
) -> dict[tuple[Any, ...], list[str]]:
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for part in parts:
        shape = [x for x in pieces[part].tensor.shape if x != 1]
        kind = _kind(part)
        if kind == "table" and len(shape) > 2:  # [N, m, D] of a table [N*m, D]
            shape = [torch.Size(shape[:-1]).numel(), shape[-1]]
        groups[part_of(part), kind, *shape].append(part)
    return groups


def _kind(name: str) -> str:
    last = name.rpartition(".")[2]
    if "pos" in name or last not in ("weight", "bias"):
        return "table"
    return f"norm {last}" if "norm" in name else last


def _some(lines: Sequence[str], most: int = 8) -> str:
    return ", ".join(lines[:most]) + (f" and {len(lines) - most} more" if len(lines) > most else "")


# --- for command lines ----------------------------------------------------------------------------------------------


def report(file: ForeignFile, found: Match, everything: bool) -> None:
    """Print the tensors of the file and their matches; without `everything` only those that deserve a look."""
    print(f"{file.path}: {len(file.tensors)} tensors" + (f" under {file.holder!r}" if file.holder else ""))
    if everything:
        print("\n".join(f"  {line}" for line in file.inventory()))
    for rule, lines in found.by_rule.items():
        print(f"matched by {rule}: {len(lines)}")
        if everything or rule != "name":
            print("\n".join(f"  {line}" for line in lines))
    for title, names in (("dropped", found.dropped), ("not filled", found.missing), ("left over", found.left_over)):
        if names:
            print(f"{title}: {len(names)}")
            print("\n".join(f"  {name}" for name in names))


def convert(
    file: ForeignFile,
    args: argparse.Namespace,
    model: nn.Module,
    rules: Sequence[Rule],
    splits: Mapping[str, Split] | None = None,
    part_of: Callable[[str], str] = lambda name: "",
    reshape: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> bool:
    """Report how `file` fits `model` under --map; with --to, load it. Raises UserError if any tensor finds no place."""
    found = match(file.tensors, model.state_dict(), rules, splits, read_map(args.map), part_of, reshape)
    report(file, found, everything=args.to is None)
    if args.to is not None:
        found.check(str(file.path))
        model.load_state_dict(found.filled)
    return args.to is not None


def read_map(path: Path | None) -> dict[str, str]:
    """Their names -> ours or `drop`."""
    if path is None:
        return {}
    data = read_yaml(path)
    if wrong := [key for key, value in data.items() if not isinstance(value, str)]:
        raise UserError(f"{path}: {wrong[0]}: must be one of our names, or drop")
    return {str(key): value for key, value in data.items()}
