"""Named sizes, and how a GPT is built, loaded, or started from another. `python -m autoregressive.presets` lists sizes.

A GPT may start from one trained on the same tokens (`init_from`), for another task, other classes or other clips. The
two may differ in their conditions alone: a condition in front of a clip shifts the clip's positions, and classes are
matched by name.
"""

from __future__ import annotations

import argparse

from tokenizer.common.cli import Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("List the named GPT sizes with their parameters by part.")
    parser.add_argument("--json", action="store_true", help="print one JSON object: name -> {total, parts}")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from autoregressive.model import GPT, GPTConfig
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.hub import parameters_by_part
from tokenizer.model import TokenizerConfig, VideoTokenizer
from tokenizer.presets import print_sizes

_K600 = {"num_classes": 0, "condition_lengths": [512, 128]}

PRESETS: dict[str, GPTConfig] = {
    # the paper's sizes, as class-to-video on UCF-101: 99.2M, 327.3M, 633.3M
    "GPT-B": GPTConfig(),
    "GPT-L": GPTConfig(layers=24, width=1024, heads=16),
    "GPT-LP": GPTConfig(layers=30, width=1280, heads=20),
    # the same for the miniature tokenizer, small enough to be shipped
    "GPT-mini": GPTConfig(
        layers=4,
        width=192,
        heads=6,
        codebook_size=2048,
        levels=[8, 16, 32, 64, 128],
        num_classes=11,
        block_positions=True,
    ),
    # fractions of a second on a CPU, for tests
    "GPT-debug": GPTConfig(layers=2, width=32, heads=2, codebook_size=64, levels=[2, 4, 8], num_classes=11),
}
# what `--gpt-model` cannot name: the same sizes with the sequences of frame prediction on K600
FRAME_PREDICTION = {
    "GPT-L (frame prediction)": replace(PRESETS["GPT-L"], **_K600),  # type: ignore[arg-type]
    "GPT-LP (frame prediction)": replace(PRESETS["GPT-LP"], **_K600),  # type: ignore[arg-type]
}


@dataclass(frozen=True)
class TrainedGPT:
    """A GPT for sampling, with the facts of the tokens it was trained on. Made by `load_gpt`."""

    model: GPT
    class_names: tuple[str, ...]
    tokenizer_sha256: str
    sha256: str
    origin: str


def load_gpt(path: str | Path, device: str | torch.device = "cpu", size: str | None = None) -> TrainedGPT:
    """A trained GPT from a .safetensors file, a folder, or "owner/name" on the hub; the config is inside the file.

    `size`: the preset that it must be, as `--gpt-model` names it. Raises UserError naming both if it is not, and for
    damaged, pickled or foreign files.
    """
    model = GPT.from_pretrained(path, device=device)
    if size is not None:
        check_size(model.config, size, str(path))
    tokens = model.file_config.get("tokens", {})
    names = tuple(tokens.get("class_names", ()))
    return TrainedGPT(model, names, tokens.get("tokenizer_sha256", ""), model.sha256, str(path))


def size_name(config: GPTConfig) -> str:
    """The preset of these layers, width and heads; 2x96x3 for a size that has no name."""
    size = _size_of(config)
    return next((name for name, preset in PRESETS.items() if _size_of(preset) == size), "x".join(map(str, size)))


def check_size(config: GPTConfig, size: str, origin: str) -> None:
    """Raises UserError unless `config` has the layers, width and heads of the preset `size`."""
    if size not in PRESETS:
        raise UserError(f"no GPT size {size!r}; there are {', '.join(PRESETS)}")
    wanted, found = _size_of(PRESETS[size]), _size_of(config)
    if wanted != found:
        named = size_name(config)
        way_out = f"use --gpt-model {named}" if named in PRESETS else "leave --gpt-model out for a size of your own"
        raise UserError(
            f"{origin} holds {'x'.join(map(str, found))} (layers x width x heads), but {size} is "
            f"{'x'.join(map(str, wanted))}; {way_out}"
        )


def _size_of(config: GPTConfig) -> tuple[int, int, int]:
    return config.layers, config.width, config.heads


def check_tokenizer_fits(gpt: TrainedGPT, tokenizer: VideoTokenizer) -> None:
    """Raises UserError, naming both, if the GPT was trained on codes of another tokenizer."""
    check_vocabulary(gpt.model.config, tokenizer.config, gpt.origin)
    made_by, mine = gpt.tokenizer_sha256, tokenizer.sha256
    if made_by and mine and made_by != mine:
        raise UserError(
            f"{gpt.origin} was trained on the tokens of tokenizer {made_by[:12]}.., this one is {mine[:12]}..: "
            "give the --vq_ckpt / --vq-ckpt that it was trained with"
        )


def check_vocabulary(config: GPTConfig, tokenizer: TokenizerConfig, origin: str) -> None:
    """Raises UserError, naming both sides, if codes, levels or blocks differ."""
    if not tokenizer.is_discrete:
        raise UserError(
            f"{origin} reads codes, but a tokenizer with model.bottleneck = {tokenizer.bottleneck!r} has none: "
            "give one with 'vq' or 'fsq'"
        )
    for name in ("codebook_size", "levels", "num_blocks"):
        ours, theirs = getattr(config, name), getattr(tokenizer, name)
        if ours != theirs:
            raise UserError(
                f"{origin} has {name} = {ours}, but the tokenizer's is {theirs}: use the tokenizer that made its tokens"
            )


def main() -> None:
    as_json = parse_arguments().json
    with torch.device("meta"):
        listing = {name: parameters_by_part(GPT(config)) for name, config in (PRESETS | FRAME_PREDICTION).items()}
    print_sizes(listing, as_json)


if __name__ == "__main__":
    run_cli(main)


_EQUAL = ("layers", "width", "heads", "codebook_size", "levels", "num_blocks", "block_positions")
_REALIGNED = ("embedding.weight", "positions")


@torch.no_grad()
def init_weights_from(model: GPT, class_names: Sequence[str], tokenizer_sha256: str, other: TrainedGPT) -> str:
    """Copy the weights of `other` into `model`. Returns a line that counts the copied weights.

    positions     counted from the condition on (class, or separator); those that `other` lacks keep their values
    classes       by name; a new one starts as the open condition
    the rest      equal

    Raises UserError if the two differ in more than their conditions, or `other` was trained on another tokenizer.
    """
    _check(model, tokenizer_sha256, other)
    theirs, ours = other.model.state_dict(), model.state_dict()
    for name in ours.keys() - set(_REALIGNED):
        ours[name].copy_(theirs[name])

    layout, source = model.layout, other.model.layout
    shift = layout.condition_tokens - source.condition_tokens
    first, end = max(0, shift), min(layout.max_length, source.max_length + shift)
    model.positions[first:end] = other.model.positions[first - shift : end - shift]

    old, new = other.model.embedding.weight, model.embedding.weight
    known = {name: source.condition_id(number) for number, name in enumerate(other.class_names)}
    new[: layout.num_ids] = old[: source.num_ids]
    new[layout.num_ids :] = old[[*(known.get(name, source.open_id) for name in class_names), source.open_id]]
    shared = sum(name in known for name in class_names)
    return (
        f"started from {other.origin} (sha256 {other.sha256[:12]}..): {end - first} of {layout.max_length} positions, "
        f"{shared} of {len(class_names)} classes, everything else"
    )


def _check(model: GPT, tokenizer_sha256: str, other: TrainedGPT) -> None:
    for key in _EQUAL:
        ours, theirs = getattr(model.config, key), getattr(other.model.config, key)
        if ours != theirs:
            raise UserError(f"init_from={other.origin} has {key} = {theirs}, but model.{key} = {ours}: set it to that")
    if other.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"init_from={other.origin} was trained on codes of tokenizer {other.tokenizer_sha256[:12]}.., this run has "
            f"those of {tokenizer_sha256[:12]}..; start from a GPT of the same tokenizer"
        )
