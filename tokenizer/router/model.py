"""The router: one look at a clip, a score for every assignment (paper.md section 4).

A pre-LayerNorm vision transformer over raw spatio-temporal patches: [CLS] gathers what matters, a linear head rates the
rows of the assignment table. The higher a score the better the row. Scores of one clip can be compared, those of two
clips only in their differences: the softmax of the training loss leaves a constant free for each clip.

Letters: B clips, C T H W, M patches, P numbers in a patch, D width, A assignments (rows).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokenizer.assignment import AssignmentSpace
from tokenizer.blocks.frequency import cosine_filters
from tokenizer.blocks.patchify import patchify
from tokenizer.blocks.vit import ViTLayer
from tokenizer.common.errors import UserError

TABLE_STD = 0.02
COLOUR_RANK = 3.0  # colour is fainter than brightness, so it comes later
MOTION_GAIN = 8.0  # of 0, 4 and 10 the larger learned faster from 250 clips; see frequency_filters


@dataclass
class RouterConfig:
    """Input, assignment levels and size of a router. The defaults are the paper's: 19.76M parameters."""

    num_frames: int = 16
    size: int = 128  # height and width in pixels
    patch_frames: int = 4  # frames of a patch, and of a temporal block
    patch_size: int = 8
    levels: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    layers: int = 6
    width: int = 512
    heads: int = 8
    mlp_ratio: float = 4.0
    stem: str = "raw"  # linear patches of pixels, the only stem so far
    init: str = "structured"  # the patch embedding starts as frequency filters; "random": as noise

    def __post_init__(self) -> None:
        for name, length, part in (("num_frames", "num_frames", "patch_frames"), ("size", "size", "patch_size")):
            if getattr(self, length) % getattr(self, part):
                raise UserError(f"{name} = {getattr(self, length)} is not a multiple of {part} = {getattr(self, part)}")
        if self.width % self.heads:
            raise UserError(f"width = {self.width} is not a multiple of heads = {self.heads}")
        for name, known in (("stem", ("raw",)), ("init", ("structured", "random"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} = {getattr(self, name)!r} is none of {', '.join(known)}")

    @property
    def num_blocks(self) -> int:
        """Temporal blocks of a clip."""
        return self.num_frames // self.patch_frames

    @property
    def grid(self) -> int:
        """Patches along the height and along the width of a block."""
        return self.size // self.patch_size

    @property
    def space(self) -> AssignmentSpace:
        """The assignments that the router rates."""
        return AssignmentSpace(tuple(self.levels), self.num_blocks)


class Router(nn.Module):
    """Clip -> score of every assignment. `space` says which assignment a score belongs to."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.space = config.space
        width = config.width
        patch_numbers = 3 * config.patch_frames * config.patch_size**2
        self.embed = nn.Linear(patch_numbers, width)
        self.cls_D = nn.Parameter(torch.empty(width))
        # Where a patch is = its block + its place in the frame: two small tables; one for all pairs makes it 20.2M.
        self.block_position_N1D = nn.Parameter(torch.empty(config.num_blocks, 1, width))
        self.place_position_1GD = nn.Parameter(torch.empty(1, config.grid**2, width))
        self.layers = nn.ModuleList(ViTLayer(width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.space.num_rows)
        self.init_weights()

    def init_weights(self) -> None:
        """Matrices: normal, std width^-0.5. Biases: 0. Head: 0, so that all rows start equal. Tables: normal, std 0.02.

        Structured: the patch embedding starts as frequency filters, in which motion, small in pixels beside brightness,
        is heard from the first step. The tables start faint: sin-cos ones, loud, hid the content from a small run.
        """
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.width**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)
        for table in (self.cls_D, self.block_position_N1D, self.place_position_1GD):
            nn.init.normal_(table, std=TABLE_STD)
        if config.init == "structured":
            with torch.no_grad():
                filter_DP = frequency_filters(config.patch_frames, config.patch_size)[: config.width]
                self.embed.weight[: len(filter_DP)].copy_(filter_DP)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Pixels in [0, 1] -> logits_BA, one score for each row of the assignment table."""
        config = self.config
        x_BMD = self.embed(patchify(video_BCTHW - 0.5, config.patch_frames, config.patch_size))
        x_BMD = x_BMD + (self.block_position_N1D + self.place_position_1GD).flatten(0, 1)
        x_BMD = torch.cat([self.cls_D.expand(len(x_BMD), 1, -1), x_BMD], dim=1)  # B 1+M D
        for layer in self.layers:
            x_BMD = layer(x_BMD)
        return self.head(self.norm(x_BMD[:, 0]))  # B A


def frequency_filters(patch_frames: int, patch_size: int) -> Tensor:
    """Cosine filters of a patch, low frequencies first, each with a gain: [P, P], orthogonal.

    The higher its frequency the louder a filter: natural images fade as frequency grows, so all filters speak about
    equally loud. Those that see change over time are louder still, because motion is what tokens are spent on.
    """
    filter_PP, frequency_P, frame_P = cosine_filters(patch_frames, patch_size, COLOUR_RANK)
    return 0.5 * (1 + frequency_P + MOTION_GAIN * frame_P)[:, None] * filter_PP
