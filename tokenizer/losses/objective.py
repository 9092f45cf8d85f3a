"""The tokenizer's loss without its GAN term (arXiv 2603.12267, section 3):

l1 + perceptual + codebook + commitment + entropy      from the clip and its reconstruction
+ align                                                from frozen V-JEPA 2 features, see alignment.py
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.common.errors import UserError
from tokenizer.losses.perceptual import PerceptualDistance
from tokenizer.model import TokenizerOutput


@dataclass
class LossConfig:
    l1: float = 1.0
    perceptual: float = 1.0
    perceptual_net: str = "lpips_vgg"  # see losses/perceptual.py; "none" where perceptual = 0
    perceptual_frames: int = 0  # frames a clip, drawn anew each step; 0 = all of them
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.02
    kl: float = 1e-6  # of model.bottleneck=kl: nats a token against a standard normal
    gan: float = 0.0  # 0.3 in the paper's recipe; see the section `discriminator`
    align: float = 0.0  # 0.7 in the paper's recipe; see the section `alignment`

    def __post_init__(self) -> None:
        for name in ("l1", "perceptual", "codebook", "commitment", "entropy", "gan", "align"):
            if getattr(self, name) < 0:
                raise UserError(f"loss.{name} = {getattr(self, name)}: a weight must be >= 0")
        if (self.perceptual > 0) != (self.perceptual_net != "none"):
            raise UserError(
                f"loss.perceptual = {self.perceptual} and loss.perceptual_net = {self.perceptual_net!r} clash: "
                "a weight above 0 needs a network, and perceptual = 0 goes with 'none'"
            )


def tokenizer_loss(
    config: LossConfig,
    output: TokenizerOutput,
    target_BCTHW: Tensor,
    perceptual: PerceptualDistance | None,
    generator: torch.Generator,
    align: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> the weighted sum, and every term before weighting (scalars, detached), by name.

    target_BCTHW: pixels in [0, 1]. align: the alignment loss, a scalar, if the recipe has one.
    """
    terms = {"l1": F.l1_loss(output.video_BCTHW, target_BCTHW), **output.quantized.terms}
    if align is not None:
        terms["align"] = align
    if perceptual is not None:
        frame_T = _drawn_frames(target_BCTHW.shape[2], config.perceptual_frames, generator)
        ours, real = output.video_BCTHW[:, :, frame_T], target_BCTHW[:, :, frame_T]
        terms["perceptual"] = perceptual.clip_distance(ours, real).mean()
    total = reduce(torch.add, [getattr(config, name) * term for name, term in terms.items()])
    return total, {name: term.detach() for name, term in terms.items()}


def _drawn_frames(num_frames: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Evenly spaced frames from a random start, so that over time all frames count alike; 0 = all."""
    if wanted <= 0 or wanted >= num_frames:
        return torch.arange(num_frames)
    start = torch.randint(num_frames, (1,), generator=generator)
    return ((start + torch.arange(wanted) * num_frames // wanted) % num_frames).sort().values
