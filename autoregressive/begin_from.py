"""Begin a GPT with what another one has learnt of the same tokens: for another task, other classes, other scenes.

The two may differ in their conditions alone: what stands in front of a clip moves the clip's positions, and classes
have other numbers. Everything else is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autoregressive.model import GPT
from autoregressive.presets import TrainedGPT
from tokenizer.common.errors import UserError

_EQUAL = ("layers", "width", "heads", "codebook_size", "levels", "num_blocks", "block_positions")
_REALIGNED = ("embedding.weight", "positions")


@torch.no_grad()
def begin_from(model: GPT, class_names: Sequence[str], tokenizer_sha256: str, other: TrainedGPT) -> str:
    """Overwrite the weights of `model`, all but those that `other` has none for. Returns a line that says which.

    positions     counted from the condition on (class, or separator); those that `other` lacks stay as they are
    classes       by name; a new one begins as the open condition
    the rest      equal

    Raises UserError where the two differ in more than their conditions, or `other` learnt the tokens of another
    tokenizer.
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
        f"begun from {other.origin} (sha256 {other.sha256[:12]}..): {end - first} of {layout.max_length} positions, "
        f"{shared} of {len(class_names)} classes, everything else"
    )


def _check(model: GPT, tokenizer_sha256: str, other: TrainedGPT) -> None:
    for key in _EQUAL:
        ours, theirs = getattr(model.config, key), getattr(other.model.config, key)
        if ours != theirs:
            raise UserError(f"init_from={other.origin} has {key} = {theirs}, but model.{key} = {ours}: set it to that")
    if other.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"init_from={other.origin} learnt the codes of tokenizer {other.tokenizer_sha256[:12]}.., this run has "
            f"those of {tokenizer_sha256[:12]}..; begin from a GPT of the same tokenizer"
        )
