"""Vector quantiser: l2-normalised latents, nearest code by cosine, straight-through (paper.md section 2).

The search, the normalisation and all loss terms run in float32 whatever the autocast: a code that flips under bf16
would make curation, extraction and decoding disagree.

Letters: L packed tokens, E code width, V codebook size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.common.ranks import mean_of_rows, num_ranks

ENTROPY_TEMPERATURE = 0.01


@dataclass(frozen=True)
class Quantized:
    """What quantising gave.

    terms, scalars with gradients, empty where no gradients are recorded:
        codebook    mean squared distance, moves the codes
        commitment  the same number, moves the encoder
        entropy     mean entropy of a token minus entropy of the mean: low = sure and evenly used
    """

    latent_LE: Tensor  # unit vectors; gradients pass straight through to the encoder
    code_L: Tensor  # int64, 0 .. V-1
    terms: dict[str, Tensor] = field(default_factory=dict)


class VectorQuantizer(nn.Module):
    """`num_codes` codes of `width` numbers; only their directions count."""

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(num_codes, width)

    def unit_codes(self) -> Tensor:
        """float32 [V, E], each of length 1."""
        return F.normalize(self.codebook.weight.float(), dim=-1)

    def lookup(self, code: Tensor) -> Tensor:
        """Codes, int64 [...] -> unit latents, float32 [..., E]; all that decoding needs."""
        return F.normalize(self.codebook(code).float(), dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """Latents [..., E] -> codes, int64 [...]."""
        with torch.autocast(z.device.type, enabled=False):
            return (F.normalize(z.float(), dim=-1) @ self.unit_codes().T).argmax(dim=-1)

    def forward(self, z_LE: Tensor) -> Quantized:
        """Latents [L, E] -> their nearest codes, with the loss terms while gradients are recorded."""
        with torch.autocast(z_LE.device.type, enabled=False):
            z_LE = F.normalize(z_LE.float(), dim=-1)
            codes_VE = self.unit_codes()
            cosine_LV = z_LE @ codes_VE.T
            code_L = cosine_LV.argmax(dim=-1)
            nearest_LE = codes_VE[code_L]
            if not torch.is_grad_enabled():
                return Quantized(nearest_LE, code_L)
            return Quantized(
                latent_LE=z_LE + (nearest_LE - z_LE).detach(),
                code_L=code_L,
                terms={
                    "codebook": _token_mean(F.mse_loss(nearest_LE, z_LE.detach(), reduction="none")),
                    "commitment": _token_mean(F.mse_loss(z_LE, nearest_LE.detach(), reduction="none")),
                    "entropy": entropy_term(cosine_LV),
                },
            )

    @torch.no_grad()
    def start_from(self, z_LE: Tensor, generator: torch.Generator) -> None:
        """Put every code on a latent that really occurs (a random sample; repeats where there are too few)."""
        num_codes = self.codebook.num_embeddings
        rounds = -(-num_codes // len(z_LE))
        picks = torch.cat([torch.randperm(len(z_LE), generator=generator) for _ in range(rounds)])[:num_codes]
        self.codebook.weight.copy_(F.normalize(z_LE.float(), dim=-1)[picks.to(z_LE.device)])


def entropy_term(cosine_LV: Tensor) -> Tensor:
    """Mean entropy per token minus the entropy of the mean, over softmax(-d / 0.01), d the squared distance."""
    logit_LV = cosine_LV * (2 / ENTROPY_TEMPERATURE)  # d = 2 - 2 cos for unit vectors; the constant drops out
    prob_LV = logit_LV.softmax(dim=-1)
    per_token = mean_of_rows(-(prob_LV * logit_LV.log_softmax(dim=-1)).sum(dim=-1))
    mean_V = mean_of_rows(prob_LV)
    return per_token + (mean_V * (mean_V + 1e-12).log()).sum()


def _token_mean(error_LE: Tensor) -> Tensor:
    """Every token of every process counts alike, however unequally they are shared out."""
    return mean_of_rows(error_LE).mean() if num_ranks() > 1 else error_LE.mean()


def code_usage(code_L: Tensor, num_codes: int) -> dict[str, float]:
    """Share of the codebook that occurs in `code_L`, and the perplexity of its histogram (1 .. num_codes)."""
    count_V = torch.bincount(code_L.flatten(), minlength=num_codes).float()
    share_V = count_V / count_V.sum()
    perplexity = float(torch.exp(-(share_V * (share_V + 1e-12).log()).sum()))
    return {"code_usage": float((count_V > 0).float().mean()), "perplexity": perplexity}
