"""The tokenizer's loss without its GAN term (arXiv 2603.12267, section 3):

    l1 + perceptual + codebook + commitment + entropy      from the clip and its reconstruction
    + align                                                features of the decoder against those of a frozen V-JEPA 2

Alignment: decoder layer l -> MLP -> linear, and the numbers of a cell spread over the finer places that it answers for.
The head learns beside the tokenizer and is thrown away with the run: it is no part of the shipped weights.

Letters: B clips, M cells of the decoder (blocks x rows x columns), D width of the decoder, S places of V-JEPA 2 (time
slots x rows x columns), E width of a V-JEPA 2 feature.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tokenizer.common.device import send
from tokenizer.common.errors import UserError
from tokenizer.frozen.encoders import FeatureShape, FrozenConfig, FrozenVJEPA2
from tokenizer.losses.perceptual import PerceptualDistance
from tokenizer.model import TokenizerConfig, TokenizerOutput


@dataclass
class LossConfig:
    l1: float = 1.0
    perceptual: float = 1.0
    perceptual_net: str = "lpips_vgg"  # see losses/perceptual.py; "none" if perceptual = 0
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
        ours, real = output.video_BCTHW, target_BCTHW
        if frame_T is not None:
            ours, real = (x.index_select(2, send(frame_T, x.device)) for x in (ours, real))
        terms["perceptual"] = perceptual.clip_distance(ours, real).mean()
    total = reduce(torch.add, [getattr(config, name) * term for name, term in terms.items()])
    return total, {name: term.detach() for name, term in terms.items()}


def _drawn_frames(num_frames: int, wanted: int, generator: torch.Generator) -> Tensor | None:
    """Evenly spaced frames from a random start, so that over time all frames count alike; None for all."""
    if wanted <= 0 or wanted >= num_frames:
        return None
    start = torch.randint(num_frames, (1,), generator=generator)
    return ((start + torch.arange(wanted) * num_frames // wanted) % num_frames).sort().values


@dataclass
class AlignmentConfig:
    """Read if loss.align is above 0."""

    layer: int = 3  # the decoder layer after which features are taken, counted from 1
    hidden: int = 2048  # width of the MLP
    encoder: FrozenConfig = field(default_factory=FrozenConfig)  # V-JEPA 2

    def __post_init__(self) -> None:
        if min(self.layer, self.hidden) < 1:
            raise UserError(f"alignment.layer = {self.layer} and alignment.hidden = {self.hidden} must be at least 1")


class AlignmentHead(nn.Module):
    """Features of the decoder -> a guess of the features of V-JEPA 2, feature_BSE."""

    def __init__(self, config: AlignmentConfig, tokenizer: TokenizerConfig, target: FeatureShape) -> None:
        """Raises UserError if a decoder cell is no whole number of V-JEPA 2 places."""
        super().__init__()
        blocks, (rows, columns) = tokenizer.num_blocks, tokenizer.grid
        self.blocks, self.rows = blocks, rows
        if config.layer > tokenizer.decoder.layers:
            raise UserError(f"alignment.layer = {config.layer}, but the decoder has {tokenizer.decoder.layers} layers")
        if rows != columns or target.slots % blocks or target.grid % rows:
            raise UserError(
                f"V-JEPA 2 gives {target.slots} x {target.grid} x {target.grid} features, which are no whole "
                f"number for each of the decoder's {blocks} x {rows} x {columns} cells: set loss.align=0 or "
                "use another encoder"
            )
        self.slots, self.places = target.slots // blocks, target.grid // rows
        self.mlp = nn.Sequential(
            nn.Linear(tokenizer.decoder.width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
        )
        self.to_places = nn.Linear(config.hidden, self.slots * self.places**2 * target.width)

    def forward(self, feature_BMD: Tensor) -> Tensor:
        return rearrange(
            self.to_places(self.mlp(feature_BMD)),
            "B (t h w) (s p q E) -> B (t s h p w q) E",
            t=self.blocks,
            h=self.rows,
            s=self.slots,
            p=self.places,
            q=self.places,
        )


def alignment_loss(guess_BSE: Tensor, target_BSE: Tensor) -> Tensor:
    """Minus the mean cosine over all places, a scalar in [-1, 1]; only the direction of a feature counts."""
    return -F.cosine_similarity(guess_BSE.float(), target_BSE.float(), dim=-1).mean()


class Alignment:
    """The frozen encoder and the head that learns to meet it."""

    def __init__(self, config: AlignmentConfig, tokenizer: TokenizerConfig, device: torch.device) -> None:
        """Raises UserError if weights are absent or shapes do not fit."""
        self.layer = config.layer
        self.encoder = FrozenVJEPA2(config.encoder).to(device)
        self.head = AlignmentHead(config, tokenizer, self.encoder.shape_of(tokenizer.num_frames)).to(device)

    def term(self, feature_BMD: Tensor, video_BCTHW: Tensor) -> Tensor:
        """What the tokenizer and the head minimise together."""
        return alignment_loss(self.head(feature_BMD), self.encoder.features(video_BCTHW))
