"""Random numbers for sampling that depend on (seed, sample, step, id) and on nothing else.

A counter-based generator: no state that advances, so a sample is the same in whichever slot, batch or process it is
made, and on every device (only integer operations decide). The mixer is the two-round 32-bit hash that Chris Wellons'
hash-prospector found; words are kept in int64, where no product of it overflows.

Letters: S slots, V ids that the head can say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.common.runtime import derive_seed

_WORD = 0xFFFFFFFF


def key_words(seed: int, *key: int | str) -> tuple[int, int]:
    """The two 32-bit words that stand for a sample: `seed` is the user's, `key` names the sample."""
    both = derive_seed(seed, *key)
    return both >> 32, both & _WORD


def id_words(num_ids: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [V], a word for each id: computed once, handed to `gumbel`."""
    return mix(torch.arange(1, num_ids + 1, device=device))


def gumbel(key_S2: Tensor, step_S: Tensor, word_V: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [S, V]; argmax of (log-probabilities + noise) is a draw from them.

    Of 23 random bits each, so that no uniform rounds to 0 or 1: ids less probable than 1e-7 are out of reach.
    """
    state_S = mix(mix(step_S ^ key_S2[:, 0]) ^ key_S2[:, 1])
    word_SV = mix(state_S[:, None] ^ word_V)
    uniform_SV = (word_SV >> 9).float().add_(0.5).mul_(2**-23)
    return uniform_SV.log_().neg_().log_().neg_()


def mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words, int64 in and out, in which every bit of the input moves half of the output."""
    word = (word >> 16).bitwise_xor_(word).mul_(0x21F0AAAD).bitwise_and_(_WORD)
    word = (word >> 15).bitwise_xor_(word).mul_(0x735A2D97).bitwise_and_(_WORD)
    return (word >> 15).bitwise_xor_(word)
