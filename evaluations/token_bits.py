"""How many bits the tokens of a clip take: each code written plainly, or entropy-coded by the GPT's probabilities.

Letters: B clips, L packed tokens, Q ids of a sequence, V ids that a GPT can say.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoregressive.model import GPT
from autoregressive.sequence import ClipCodes
from tokenizer.common.errors import UserError
from tokenizer.tokens import VideoTokens


def plain_bits(length_BN: Tensor, codebook_size: int, num_levels: int = 1) -> Tensor:
    """float64 [B]: tokens x log2(codebook), and for each block log2(num_levels) to say how many follow.

    The default of one level leaves the length tokens out. Fractions count: a clip can be written as one number.
    """
    return length_BN.sum(dim=1).double() * math.log2(codebook_size) + length_BN.shape[1] * math.log2(num_levels)


@torch.inference_mode()
def gpt_bits(model: GPT, tokens: VideoTokens, label: int | None = None) -> Tensor:
    """float64 [B]: what an arithmetic coder needs that knows the GPT and the grammar, length tokens included.

    -log2 p, summed over codes and length tokens; p is shared out among the ids that the grammar allows in each place.
    The class is not written: `label` is known on both sides, None is the open condition. Clip by clip, so that
    the result does not depend on the batch.
    """
    layout = model.layout
    if layout.condition_tokens:
        raise UserError("this GPT continues given frames; the size of whole clips needs a class-to-video GPT")
    if tokens.codebook_size != layout.codebook_size or model.training:
        raise UserError(
            f"tokens of a codebook of {tokens.codebook_size} and a GPT of {layout.codebook_size} codes, "
            f"{'training' if model.training else 'evaluating'}: both must agree, and the GPT be set to eval()"
        )
    bits = []
    for b in range(len(tokens)):
        clip = tokens.clip(b)
        lengths = tuple(clip.length_BN[0].tolist())
        id_Q = layout.encode(ClipCodes(clip.code_L.cpu(), lengths, label)).to(model.device)
        said_L = id_Q[1:]
        logits_LV = model(id_Q[:-1], (len(said_L),)).double()
        is_code_V = torch.arange(layout.num_ids, device=model.device) < layout.codebook_size
        allowed_LV = is_code_V == (said_L < layout.codebook_size)[:, None]
        log_p_LV = logits_LV.masked_fill(~allowed_LV, -math.inf).log_softmax(dim=1)
        bits.append(-log_p_LV.gather(1, said_L[:, None]).sum() / math.log(2))
    return torch.stack(bits).cpu()
