"""Bottlenecks between encoder and decoder: the paper's vector quantizer, finite scalars, a Gaussian, and none.

    vq      l2-normalised latents, nearest code by cosine, straight-through (arXiv 2603.12267); the default
    fsq     every number of a latent is rounded to one of a few values; a code is the row of values
            (finite scalar quantization, arXiv 2309.15505). Nothing to learn, no loss terms.
    kl      the latent is the mean of a Gaussian whose variance is predicted; the term `kl` draws it to the standard
            normal, as in a VAE. Continuous.
    none    the latent itself. Continuous; an upper bound for the other three.

The search, the normalisation and all loss terms run in float32 whatever the autocast: a code that flips under bf16
would make curation, extraction and decoding disagree.

Letters: L packed tokens, E code width, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.common.device import send
from tokenizer.common.distributed import mean_of_rows, mean_of_sums, num_ranks

ENTROPY_TEMPERATURE = 0.01
_SHARPNESS = 2 / ENTROPY_TEMPERATURE  # of a cosine: d = 2 - 2 cos for unit vectors, and a constant drops out


@dataclass(frozen=True)
class Quantized:
    """What quantising gave.

    terms, scalars with gradients, empty where no gradients are recorded:
        codebook    mean squared distance, moves the codes
        commitment  the same number, moves the encoder
        entropy     mean entropy of a token minus entropy of the mean: low = sure and evenly used; only if the quantiser
                    `has_entropy`, since it takes a tenth of a small model's step
    """

    latent_LE: Tensor  # of a vector quantiser unit vectors; gradients pass straight through to the encoder
    code_L: Tensor  # int64, 0 .. V-1; empty for a continuous bottleneck
    terms: dict[str, Tensor] = field(default_factory=dict)


class Bottleneck(nn.Module):
    """What a token can carry from the encoder to the decoder: the paper's codes, or one of bottlenecks.py.

    `encode` and `decode` are what tokens on disk need; `forward` is for training, with its own loss terms.
    """

    is_discrete = True  # whether tokens are codes; a continuous bottleneck's are the latents themselves
    has_entropy = True  # whether the terms hold an entropy; a training whose loss does not weigh it sets False

    @property
    def bits(self) -> float:
        """Bits of a token; infinite if it is continuous."""
        return math.inf

    def encode(self, z: Tensor) -> Tensor:
        """Latents [..., E] -> tokens: codes, int64 [...], or latents, float32 [..., E]."""
        raise NotImplementedError

    def decode(self, token: Tensor) -> Tensor:
        """Tokens -> latents, float32 [..., E], as the decoder reads them."""
        raise NotImplementedError

    def forward(self, z_LE: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents [L, E] -> what the decoder reads, with the loss terms while gradients are recorded.

        generator: of the noise of a bottleneck that draws any; without one it draws none.
        """
        raise NotImplementedError

    def start(self, z_LE: Tensor, generator: torch.Generator) -> None:
        """Begin at latents that really occur; does nothing if there is nothing to learn."""


class VectorQuantizer(Bottleneck):
    """`num_codes` codes of `width` numbers; only their directions count."""

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(num_codes, width)

    def unit_codes(self) -> Tensor:
        """float32 [V, E], each of length 1."""
        return F.normalize(self.codebook.weight.float(), dim=-1)

    @property
    def bits(self) -> float:
        return math.log2(self.codebook.num_embeddings)

    def decode(self, code: Tensor) -> Tensor:
        """Codes, int64 [...] -> unit latents, float32 [..., E]; all that decoding needs."""
        return F.normalize(self.codebook(code).float(), dim=-1)

    def encode(self, z: Tensor) -> Tensor:
        """Latents [..., E] -> codes, int64 [...]."""
        with torch.autocast(z.device.type, enabled=False):
            z_LE = F.normalize(z.float(), dim=-1).flatten(0, -2)
            return _nearest(z_LE, self.unit_codes()).view(z.shape[:-1])

    def forward(self, z_LE: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents [L, E] -> their nearest codes, with the loss terms while gradients are recorded."""
        with torch.autocast(z_LE.device.type, enabled=False):
            z_LE = F.normalize(z_LE.float(), dim=-1)
            codes_VE = self.unit_codes()
            if torch.is_grad_enabled() and self.has_entropy:
                entropy, code_L = entropy_and_nearest(z_LE, codes_VE)
            else:
                code_L = _nearest(z_LE, codes_VE)
            nearest_LE = codes_VE[code_L]
            if not torch.is_grad_enabled():
                return Quantized(nearest_LE, code_L)
            terms = {
                "codebook": _token_mean(F.mse_loss(nearest_LE, z_LE.detach(), reduction="none")),
                "commitment": _token_mean(F.mse_loss(z_LE, nearest_LE.detach(), reduction="none")),
            }
            if self.has_entropy:
                terms["entropy"] = entropy
            return Quantized(z_LE + (nearest_LE - z_LE).detach(), code_L, terms)

    @torch.no_grad()
    def start(self, z_LE: Tensor, generator: torch.Generator) -> None:
        """Put every code on a latent that really occurs (a random sample; repeats where there are too few)."""
        num_codes = self.codebook.num_embeddings
        rounds = -(-num_codes // len(z_LE))
        picks = torch.cat([torch.randperm(len(z_LE), generator=generator) for _ in range(rounds)])[:num_codes]
        self.codebook.weight.copy_(F.normalize(z_LE.float(), dim=-1)[picks.to(z_LE.device)])


@torch.no_grad()
def _nearest(z_LE: Tensor, codes_VE: Tensor) -> Tensor:
    """Unit latents and codes -> int64 [L], the code with the largest cosine."""
    # max, not argmax: on a CPU it takes half the time; both return the first of equal codes
    return torch.cat([(part_KE @ codes_VE.T).max(dim=-1).indices for part_KE in _parts(z_LE, codes_VE)])


def entropy_and_nearest(z_LE: Tensor, codes_VE: Tensor) -> tuple[Tensor, Tensor]:
    """Mean entropy per token minus the entropy of the mean, over softmax(-d / 0.01), d the squared distance.

    Latents and codes of length 1, float32. Also what `_nearest` gives, from the same products.
    """
    entropy, prob_V, code_L = _SoftAssignment.apply(z_LE, codes_VE)
    mean_V = mean_of_sums(prob_V, len(z_LE))
    return mean_of_sums(entropy, len(z_LE)) + (mean_V * (mean_V + 1e-12).log()).sum(), code_L


class _SoftAssignment(torch.autograd.Function):
    """Sums over all tokens of the entropy of their softmax over the codes, and of the softmax itself, [V]; codes, [L].

    Tokens times codes is the largest tensor of a training, five times over if autograd is to remember the steps. Here
    it exists a few rows at a time, and the backward computes it again.
    """

    @staticmethod
    def forward(ctx: Any, z_LE: Tensor, codes_VE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(z_LE, codes_VE)
        entropy, prob_V, codes = z_LE.new_zeros(()), codes_VE.new_zeros(len(codes_VE)), []
        for part_KE in _parts(z_LE, codes_VE):
            logit_KV, prob_KV, code_K1 = _soft(part_KE, codes_VE)
            # log p = logit + log p of the nearest code, whose logit is 0
            entropy -= prob_KV.gather(1, code_K1).log().sum() + (prob_KV * logit_KV).sum()
            prob_V += prob_KV.sum(dim=0)
            codes.append(code_K1[:, 0])
        code_L = torch.cat(codes)
        ctx.mark_non_differentiable(code_L)
        return entropy, prob_V, code_L

    @staticmethod
    def backward(ctx: Any, grad_entropy: Tensor, grad_V: Tensor, *_code: Tensor) -> tuple[Tensor, Tensor]:
        z_LE, codes_VE = ctx.saved_tensors
        grads_KE, grad_VE = [], torch.zeros_like(codes_VE)
        for part_KE in _parts(z_LE, codes_VE):
            logit_KV, prob_KV, _ = _soft(part_KE, codes_VE)
            # of a logit: p (g - sum of p g), where g, but for a constant, is the gradient of its probability
            slope_KV = logit_KV.mul_(-grad_entropy).add_(grad_V)
            slope_KV.sub_((prob_KV * slope_KV).sum(dim=-1, keepdim=True)).mul_(prob_KV)
            grads_KE.append(slope_KV @ codes_VE)
            grad_VE.addmm_(slope_KV.T, part_KE)
        return torch.cat(grads_KE).mul_(_SHARPNESS), grad_VE.mul_(_SHARPNESS)


def _soft(z_KE: Tensor, codes_VE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the codes less the largest, their probabilities, and the nearest code, [K, 1]."""
    cosine_KV = z_KE @ codes_VE.T
    best_K1, code_K1 = cosine_KV.max(dim=-1, keepdim=True)  # see _nearest
    logit_KV = cosine_KV.sub_(best_K1).mul_(_SHARPNESS)
    return logit_KV, logit_KV.softmax(dim=-1), code_K1


def _parts(z_LE: Tensor, codes_VE: Tensor) -> Sequence[Tensor]:
    """As many rows at a time as give a part of tokens times codes that fits the cache of a CPU, or fills a GPU."""
    entries = 2**26 if z_LE.is_cuda else 2**18
    return z_LE.split(max(1, entries // len(codes_VE)))


def _token_mean(error_LE: Tensor) -> Tensor:
    """Every token of every process counts alike, however unequally they are shared out."""
    return mean_of_rows(error_LE).mean() if num_ranks() > 1 else error_LE.mean()


def code_usage(count_V: Tensor) -> dict[str, float]:
    """From how often each code occurs: the share of codes in use, the perplexity (1 .. V), how many codes are dead."""
    share_V = count_V.double() / count_V.sum()
    perplexity = float(torch.exp(-(share_V * (share_V + 1e-12).log()).sum()))
    used = int((count_V > 0).sum())
    return {"code_usage": used / len(count_V), "perplexity": perplexity, "dead_codes": len(count_V) - used}


_INSIDE = 1 - 1e-3  # of the half-width: tanh never reaches its ends, so rounding must not need them
_FIRST_LOG_VARIANCE = -6.0  # a KL bottleneck begins nearly noiseless
_LOG_VARIANCE_RANGE = (-30.0, 20.0)


class FiniteScalarQuantizer(Bottleneck):
    """`levels[e]` values, evenly spaced in [-1, 1], for number e of a latent."""

    level_E: Tensor
    radix_E: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        radix = [math.prod(levels[:e]) for e in range(len(levels))]
        # not saved: the config holds them
        self.register_buffer("level_E", torch.tensor(levels), persistent=False)
        self.register_buffer("radix_E", torch.tensor(radix), persistent=False)

    @property
    def bits(self) -> float:
        return math.log2(int(self.level_E.prod()))

    def encode(self, z: Tensor) -> Tensor:
        """Latents [..., E] -> codes, int64 [...]."""
        with torch.autocast(z.device.type, enabled=False):
            digit = self._bounded(z).round().long() + self.level_E // 2  # 0 .. levels-1
            return (digit * self.radix_E).sum(dim=-1)

    def decode(self, code: Tensor) -> Tensor:
        """Codes, int64 [...] -> latents in [-1, 1], float32 [..., E]."""
        digit = code[..., None] // self.radix_E % self.level_E
        return (digit - self.level_E // 2) / (self.level_E // 2)

    def forward(self, z_LE: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents [L, E] -> the nearest values; gradients pass the rounding as if it were not there."""
        with torch.autocast(z_LE.device.type, enabled=False):
            code_L, smooth_LE = self.encode(z_LE), self._bounded(z_LE) / (self.level_E // 2)
            return Quantized(smooth_LE + (self.decode(code_L) - smooth_LE).detach(), code_L)

    def _bounded(self, z: Tensor) -> Tensor:
        """[..., E] in (-levels/2, levels/2): an even number of levels lies half a step to the left."""
        half_E = (self.level_E - 1) * _INSIDE / 2
        offset_E = torch.where(self.level_E % 2 == 0, 0.5, 0.0)
        shift_E = (offset_E / half_E).atanh()  # so that 0 stays 0
        return (z.float() + shift_E).tanh() * half_E - offset_E


class KLBottleneck(Bottleneck):
    """A Gaussian around a mean; while it trains, the decoder reads a draw of it."""

    is_discrete = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_moments = nn.Linear(width, 2 * width)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The mean begins as the latent itself, the variance small and equal for all."""
        width = self.to_moments.in_features
        self.to_moments.weight.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)]))
        self.to_moments.bias.copy_(torch.cat([torch.zeros(width), torch.full((width,), _FIRST_LOG_VARIANCE)]))

    def encode(self, z: Tensor) -> Tensor:
        """Latents [..., E] -> means, float32 [..., E]."""
        return self._moments(z)[0]

    def decode(self, token: Tensor) -> Tensor:
        return token

    def forward(self, z_LE: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents [L, E] -> a draw around their means, or the means without a generator.

        terms: kl, nats a token of the Gaussian against the standard normal.
        """
        mean_LE, log_variance_LE = self._moments(z_LE)
        no_code = torch.empty(0, dtype=torch.long, device=z_LE.device)
        latent_LE = mean_LE
        if generator is not None:
            noise_LE = send(torch.randn(mean_LE.shape, generator=generator), mean_LE.device)
            latent_LE = mean_LE + (0.5 * log_variance_LE).exp() * noise_LE
        if not torch.is_grad_enabled():
            return Quantized(latent_LE, no_code)
        nats_LE = 0.5 * (mean_LE.square() + log_variance_LE.exp() - 1 - log_variance_LE)
        nats_L1 = nats_LE.sum(dim=1, keepdim=True)
        kl = mean_of_rows(nats_L1).mean() if num_ranks() > 1 else nats_L1.mean()
        return Quantized(latent_LE, no_code, {"kl": kl})

    def _moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            mean, log_variance = self.to_moments(z.float()).chunk(2, dim=-1)
            return mean, log_variance.clamp(*_LOG_VARIANCE_RANGE)


class NoBottleneck(Bottleneck):
    """The latent as it is."""

    is_discrete = False

    def encode(self, z: Tensor) -> Tensor:
        return z.float()

    def decode(self, token: Tensor) -> Tensor:
        return token

    def forward(self, z_LE: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents [L, E] -> the same, float32."""
        return Quantized(z_LE.float(), torch.empty(0, dtype=torch.long, device=z_LE.device))


def build_bottleneck(name: str, codebook_size: int, code_width: int, fsq_levels: list[int]) -> Bottleneck:
    """Of the config's `bottleneck`."""
    match name:
        case "fsq":
            return FiniteScalarQuantizer(fsq_levels)
        case "kl":
            return KLBottleneck(code_width)
        case "none":
            return NoBottleneck()
    return VectorQuantizer(codebook_size, code_width)
