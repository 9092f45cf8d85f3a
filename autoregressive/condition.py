"""What a GPT is conditioned on: the given frames of frame prediction as codes, and classes by name or number.

The tokenizer is block-causal, so the codes of the first blocks need no later frame. The paper gives 5 frames, repeats
the last until there are 8, and encodes two blocks of (512, 128) tokens (arXiv 2603.12267, section 4).

Class numbers count from 0 in the order of the model's own classes; see `class_order`.

Letters: B clips, C T H W, L codes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tokenizer.common.errors import UserError
from tokenizer.data.datasets import ASCII_ORDER
from tokenizer.model import TokenizerConfig, VideoTokenizer
from tokenizer.streaming import encode_blocks


def check_condition(config: TokenizerConfig, num_frames: int, lengths: Sequence[int]) -> None:
    """Raises UserError if `num_frames` given frames cannot be encoded as blocks of `lengths`."""
    if strange := [length for length in lengths if length not in config.levels]:
        raise UserError(f"length {strange[0]} of the condition is none of the tokenizer's levels {config.levels}")
    if len(lengths) >= config.num_blocks:
        raise UserError(f"a condition of {len(lengths)} blocks leaves nothing to predict of {config.num_blocks}")
    room = len(lengths) * config.patch_frames
    if not room - config.patch_frames < num_frames <= room:
        raise UserError(
            f"{num_frames} given frames do not fill {len(lengths)} blocks of {config.patch_frames} frames, "
            f"one for each length of {list(lengths)}: give {room - config.patch_frames + 1} to {room}"
        )


@torch.no_grad()
def encode_condition(tokenizer: VideoTokenizer, video_BCTHW: Tensor, num_frames: int, lengths: Sequence[int]) -> Tensor:
    """The first `num_frames` frames of clips in [0, 1] -> their codes, int64 [B, sum(lengths)].

    Later frames are not read. Raises UserError if a clip has fewer frames or the lengths do not fit.
    """
    check_condition(tokenizer.config, num_frames, lengths)
    if video_BCTHW.shape[2] < num_frames:
        raise UserError(f"{video_BCTHW.shape[2]} frames, but the condition needs {num_frames}")
    missing = len(lengths) * tokenizer.config.patch_frames - num_frames
    given = video_BCTHW[:, :, :num_frames]
    padded = torch.cat([given, given[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)  # [B, C, whole blocks, H, W]
    return encode_blocks(tokenizer, padded.to(tokenizer.device), lengths).cpu()


def class_order(labels: Iterable[str]) -> list[str]:
    """Labels -> class names in the order of their numbers: by value if all are whole numbers, else in ASCII order."""
    labels = set(labels)
    if labels and all(label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def names_of(class_names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """The names inside the weights file; else UCF-101's in ASCII order for 101 classes, else `class_7` and so on."""
    if class_names:
        return tuple(class_names)
    return ASCII_ORDER if num_classes == len(ASCII_ORDER) else tuple(f"class_{i}" for i in range(num_classes))


def parse_classes(text: str | None, names: Sequence[str]) -> list[int]:
    """'1,JumpRope,"Pull, then lift"' -> class numbers, each once; None: all classes.

    A part in double quotes is always a name. Raises UserError for an unknown class, with the nearest names, and for a
    number that is also the name of another class.
    """
    if text is None:
        return list(range(len(names)))
    if text.count('"') % 2:
        raise UserError(f'--class-idx {text!r}: close the double quotes around a name, as in 1,"Pull, then lift"')
    return list(dict.fromkeys(_parse_class(part.strip(), names) for part in _COMMA.split(text)))


_COMMA = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')  # outside double quotes


def _parse_class(text: str, names: Sequence[str]) -> int:
    quoted = text.startswith('"')
    name = text.strip('"')
    number = int(text) if text.isdecimal() and len(text) < 10 else None
    same = [i for i, known in enumerate(names) if known == name] or [
        i for i, known in enumerate(names) if known.lower() == name.lower()
    ]
    if number is not None and number < len(names) and same not in ([], [number]):
        raise UserError(
            f"--class-idx {text}: class {number} is named {names[number]!r}, and {text!r} is the name of class "
            f"{same[0]}; put the name of the one you mean in double quotes, '\"{text}\"' or '\"{names[number]}\"'"
        )
    if len(same) > 1:
        raise UserError(
            f"--class-idx {text!r}: {len(same)} classes have this name; use a number, {same[0]} or {same[1]}"
        )
    if same:
        return same[0]
    if number is not None:
        if number < len(names):
            return number
        raise UserError(f"--class-idx {text}: this model has the classes 0 .. {len(names) - 1}")
    spelling = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), spelling, n=3, cutoff=0.4)
    offered = ", ".join(spelling[each] for each in near) or f"{names[0]} .. {names[-1]}"
    hint = (
        "" if quoted or not any("," in known for known in names) else "; double quotes keep a name with a comma whole"
    )
    raise UserError(f"--class-idx {text!r}: this model has no such class; the nearest are {offered}{hint}")
