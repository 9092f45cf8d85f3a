"""The given frames of frame prediction as tokens: padded to whole blocks, encoded by themselves (paper.md section 5).

The tokenizer is block-causal, so the codes of the first blocks need no later frame; the paper gives 5 frames, repeats
the last until there are 8, and encodes two blocks of (512, 128).

Classes by name or number: what `--class-idx` means. Numbers count from 0 in the order of the model's own classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.common.errors import UserError
from tokenizer.data.datasets import ASCII_ORDER
from tokenizer.model import TokenizerConfig, VideoTokenizer
from tokenizer.streaming import encode_blocks


def check_condition(config: TokenizerConfig, num_frames: int, lengths: Sequence[int]) -> None:
    """Raises UserError where `num_frames` given frames cannot be encoded as blocks of `lengths`."""
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
    """The first `num_frames` frames of clips in [0, 1], nothing else of them -> codes, int64 [B, sum(lengths)].

    Raises UserError where a clip has fewer frames or the lengths do not fit.
    """
    check_condition(tokenizer.config, num_frames, lengths)
    if video_BCTHW.shape[2] < num_frames:
        raise UserError(f"{video_BCTHW.shape[2]} frames, but the condition needs {num_frames}")
    missing = len(lengths) * tokenizer.config.patch_frames - num_frames
    given = video_BCTHW[:, :, :num_frames]
    padded = torch.cat([given, given[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
    return encode_blocks(tokenizer, padded.to(tokenizer.device), lengths).cpu()


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
