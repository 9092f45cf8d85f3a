"""Bottlenecks beside the paper's vector quantiser: finite scalars, a Gaussian, and none.

    fsq     every number of a latent is rounded to one of a few values; a code is the row of values
            (finite scalar quantisation, arXiv 2309.15505). Nothing to learn, no loss terms.
    kl      the latent is the mean of a Gaussian whose variance is predicted; the term `kl` draws it to the standard
            normal, as in a VAE. Continuous.
    none    the latent itself. Continuous; the upper bound of what the other three can reach.

All run in float32 whatever the autocast, as the quantiser does. Letters: L packed tokens, E code width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenizer.blocks.quantizer import Bottleneck, Quantized
from tokenizer.common.distributed import mean_of_rows, num_ranks

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
            noise_LE = torch.randn(mean_LE.shape, generator=generator).to(mean_LE.device)
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
