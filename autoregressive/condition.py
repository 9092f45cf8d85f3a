"""The given frames of frame prediction as tokens: padded to whole blocks, encoded by themselves (paper.md section 5).

The tokenizer is block-causal, so the codes of the first blocks need no later frame; the paper gives 5 frames, repeats
the last until there are 8, and encodes two blocks of (512, 128).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.common.errors import UserError
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
