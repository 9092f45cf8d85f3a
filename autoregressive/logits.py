"""From logits to the next id: guidance, temperature, grammar, top-k, top-p, and the draw.

The noise of a draw is a function of (seed, request, place, id): a counter-based generator without a state, so a clip is
the same in whichever slot, batch or process it is sampled. It mixes integers and takes the logarithm of
the result in float32, which may differ in the last bit between devices. The mixer is the two-round 32-bit hash found by
Chris Wellons' hash-prospector; words are kept in int64, where its products cannot overflow.

Letters: S slots, G streams of a slot (2 with guidance: with and without the class), V ids of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.common.device import derive_seed

_WORD = 0xFFFFFFFF


def key_words(seed: int, *key: int | str) -> tuple[int, int]:
    """Two 32-bit words for a sample: `seed` is the user's, `key` names the sample."""
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


def guide(logits_SGV: Tensor, scale_S: Tensor) -> Tensor:
    """Classifier-free guidance u + s (c - u), float32 [S, V]; s = 1 is c to the bit, and so is a single stream."""
    logits_SGV = logits_SGV.float()
    if logits_SGV.shape[1] == 1:
        return logits_SGV[:, 0]
    with_class, without = logits_SGV.unbind(dim=1)
    scale_S1 = scale_S[:, None]
    return torch.where(scale_S1 == 1, with_class, without + scale_S1 * (with_class - without))


def keep_top_k(logits_SV: Tensor, k: int) -> Tensor:
    """All but the k likeliest ids become -inf (ties with the last of them stay); 0 keeps all."""
    if k == 0 or k >= logits_SV.shape[1]:
        return logits_SV
    least_S1 = logits_SV.topk(k, dim=1).values[:, -1:]
    return logits_SV.masked_fill(logits_SV < least_S1, -torch.inf)


def keep_top_p(logits_SV: Tensor, p: float) -> Tensor:
    """Keeps the likeliest ids that together reach probability p, at least one; 1.0 keeps all."""
    if p >= 1:
        return logits_SV
    sorted_SV, id_SV = logits_SV.sort(dim=1, descending=True, stable=True)
    share_SV = sorted_SV.softmax(dim=1)
    before_SV = share_SV.cumsum(dim=1) - share_SV  # [S, V], probability of the likelier ids
    drop_SV = torch.zeros_like(logits_SV, dtype=torch.bool).scatter_(1, id_SV, before_SV >= p)
    return logits_SV.masked_fill(drop_SV, -torch.inf)


def draw_ids(
    logits_SV: Tensor, bias_SV: Tensor, noise_SV: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Draw an id for every slot, int64 [S]. `bias_SV`: 0 for ids that the grammar allows, else -inf.

    `noise_SV`: standard Gumbel noise; the largest of (logit + noise) is a draw from softmax(logits).
    """
    logits_SV = logits_SV / temperature + bias_SV
    return (keep_top_p(keep_top_k(logits_SV, top_k), top_p) + noise_SV).argmax(dim=1)
