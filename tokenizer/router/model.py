"""The router: a score for every assignment from one pass over a clip (arXiv 2603.12267).

A pre-LayerNorm vision transformer over raw spatio-temporal patches, or over features of a frozen V-JEPA 2 (stem.py):
a linear head on [CLS] rates the rows of the assignment table; higher is better. Only differences of scores within a
clip are meaningful: the softmax of the training loss leaves a constant per clip free.

With kind = "blockwise" (not in the paper) the same layers take one temporal block after the other, block-causally, and
a small head rates the levels of block t from blocks <= t and the levels chosen before: no table, any number of blocks,
no look-ahead. How an assignment is chosen from that: blockwise.py.

Letters: B clips, C T H W, M patches or V-JEPA 2 places, K of them, P numbers in one, D width, A assignments (rows), N
blocks, m levels, G assignments of a clip in a training step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.assignment import AssignmentSpace
from tokenizer.blocks.patches import cosine_filters, grid_of, patchify
from tokenizer.blocks.transformer import ViTLayer
from tokenizer.common.clip_shape import check_whole_patches, plain_size
from tokenizer.common.errors import UserError
from tokenizer.common.hub import HubModel
from tokenizer.frozen.encoders import FrozenConfig

if TYPE_CHECKING:
    from tokenizer.streaming import Cache

TABLE_STD = 0.02
CHOSEN_STD = 0.2  # of the levels chosen before, beside a state of unit size
COLOUR_RANK = 3.0  # colour is fainter than brightness, so it comes later
MOTION_GAIN = 8.0  # of 0, 4 and 10 the larger learned faster from 250 clips; see frequency_filters


@dataclass
class VJEPA2StemConfig:
    """Which features, and of which shape; the defaults are those of V-JEPA 2-L on 16 frames."""

    slots: int = 8  # in time
    grid: int = 16  # along the height and along the width
    width: int = 1024  # numbers in a feature
    encoder: FrozenConfig = field(default_factory=FrozenConfig)


@dataclass
class RouterConfig:
    """Input, assignment levels and size of a router. The defaults are the paper's: 19.76M parameters, 19.89M on
    V-JEPA 2."""

    kind: str = "table"  # scores of all m^N assignments; or "blockwise": of the levels of one block after the other
    num_frames: int = 16
    size: Any = 128  # pixels: one number for a square, or [height, width]
    patch_frames: int = 4  # frames of a patch, and of a temporal block
    patch_size: int = 8
    levels: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    head: str = "rows"  # a linear map to all rows (the paper's); or "prefixes": see PrefixHead
    layers: int = 6
    width: int = 512
    heads: int = 8
    mlp_ratio: float = 4.0
    stem: str = "raw"  # linear patches of pixels; or "vjepa2": features of a frozen V-JEPA 2
    vjepa2: VJEPA2StemConfig = field(default_factory=VJEPA2StemConfig)  # read if stem = "vjepa2"
    init: str = "structured"  # the embedding of pixels starts as frequency filters; "random": as noise

    def __post_init__(self) -> None:
        self.size = plain_size(self.size, "size")
        if self.num_frames % self.patch_frames:
            raise UserError(f"num_frames = {self.num_frames} is not a multiple of patch_frames = {self.patch_frames}")
        check_whole_patches(self.size, self.patch_size)
        if self.width % self.heads:
            raise UserError(f"width = {self.width} is not a multiple of heads = {self.heads}")
        choices = {"kind": ("table", "blockwise"), "head": ("rows", "prefixes")}
        choices |= {"stem": ("raw", "vjepa2"), "init": ("structured", "random")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} = {getattr(self, name)!r} is none of {', '.join(known)}")
        if self.kind == "table":
            self.space.check_table(self.space.num_rows)  # a score for every row
        elif self.head != "rows":
            raise UserError(f"kind = 'blockwise' has a head of its own, but head = {self.head!r}: leave it")
        elif self.stem != "raw":
            raise UserError("kind = 'blockwise' sees no later block, but V-JEPA 2 sees the whole clip: set stem=raw")
        if self.stem == "vjepa2" and not isinstance(self.size, int):
            raise UserError(f"stem = 'vjepa2' reads square clips, but size = {self.size}: set stem=raw")
        if self.stem == "raw" and self.vjepa2 != VJEPA2StemConfig():
            raise UserError("the section vjepa2 is set, but stem = 'raw' does not read it: set stem=vjepa2")

    @property
    def num_blocks(self) -> int:
        return self.num_frames // self.patch_frames

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of what the router reads of a moment: patches, or places of V-JEPA 2."""
        return (self.vjepa2.grid,) * 2 if self.stem == "vjepa2" else grid_of(self.size, self.patch_size)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Moments, places in each, and numbers in a place, of what the router reads."""
        places = self.grid[0] * self.grid[1]
        if self.stem == "vjepa2":
            return self.vjepa2.slots, places, self.vjepa2.width
        return self.num_blocks, places, 3 * self.patch_frames * self.patch_size**2

    @property
    def num_places(self) -> int:
        """Patches of a clip, or places of V-JEPA 2, that the router reads at once: if blockwise, those of a block."""
        return self.input_shape[1] * (1 if self.kind == "blockwise" else self.input_shape[0])

    @property
    def space(self) -> AssignmentSpace:
        """The assignments that the router rates."""
        return AssignmentSpace(tuple(self.levels), self.num_blocks)


class PrefixHead(nn.Linear):
    """Rows that begin alike share what they learn: the score of a row is the sum of a number for each of its prefixes.

    Not in the paper. As the table is a mean over blocks, and a block depends on the levels up to its own, nothing is
    lost; a thinned table, which shows few rows of a clip, teaches more.
    """

    def __init__(self, width: int, space: AssignmentSpace) -> None:
        self.num_levels = len(space.levels)
        self.num_prefixes = [self.num_levels**t for t in range(1, space.num_blocks + 1)]  # of 1, 2, .. N blocks
        super().__init__(width, sum(self.num_prefixes))

    def forward(self, x_BD: Tensor) -> Tensor:
        """[B, D] -> score_BA."""
        score_BA, *longer = super().forward(x_BD).split(self.num_prefixes, dim=1)
        for number_BJ in longer:
            score_BA = score_BA.repeat_interleave(self.num_levels, dim=1) + number_BJ
        return score_BA


class BlockHead(nn.Module):
    """What a block looks like, and the levels chosen before it -> a number for each of its levels."""

    def __init__(self, num_blocks: int, num_levels: int, width: int) -> None:
        super().__init__()
        self.chosen_NmD = nn.Parameter(torch.empty(num_blocks, num_levels, width))
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.rate = nn.Linear(width, num_levels)

    def forward(self, state: Tensor, before: Tensor) -> Tensor:
        """[..., D] of blocks <= t, and the sum of `chosen_NmD` over the levels of blocks < t, [..., D] -> [..., m]."""
        x = state + before
        return self.rate(x + self.mix(x))


class Router(HubModel, nn.Module):
    """Clip -> score of every assignment. `space` maps a score's row to its assignment."""

    kind, config_class, config_key = "router", RouterConfig, "stem"

    head: nn.Module
    encoder_sha256: Tensor  # with V-JEPA 2: of its weights, so that a router never meets the features of others

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.space = config.space
        width, (moments, places, numbers) = config.width, config.input_shape
        self.embed = nn.Linear(numbers, width)
        self.cls_D = nn.Parameter(torch.empty(width))
        # Where a patch is = its block + its place in the frame: two small tables; one for all pairs makes it 20.2M.
        self.block_position_N1D = nn.Parameter(torch.empty(moments, 1, width))
        self.place_position_1GD = nn.Parameter(torch.empty(1, places, width))
        self.layers = nn.ModuleList(ViTLayer(width, config.heads, config.mlp_ratio) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.head = self._new_head()
        if config.stem == "vjepa2":
            self.register_buffer("encoder_sha256", torch.zeros(32, dtype=torch.uint8))
        if self.cls_D.device.type != "meta":
            self.init_weights()

    @classmethod
    def build(cls, config: RouterConfig) -> Router:
        return BlockwiseRouter(config) if config.kind == "blockwise" else Router(config)

    def _new_head(self) -> nn.Module:
        if self.config.head == "prefixes":
            return PrefixHead(self.config.width, self.space)
        return nn.Linear(self.config.width, self.space.num_rows)

    def _last_linear(self) -> nn.Linear:
        return cast("nn.Linear", self.head)

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
        nn.init.zeros_(self._last_linear().weight)
        for table in (self.cls_D, self.block_position_N1D, self.place_position_1GD):
            nn.init.normal_(table, std=TABLE_STD)
        if config.init == "structured" and config.stem == "raw":
            with torch.no_grad():
                filter_DP = frequency_filters(config.patch_frames, config.patch_size)[: config.width]
                self.embed.weight[: len(filter_DP)].copy_(filter_DP)

    def forward(self, seen: Tensor, seen_BK: Tensor | None = None) -> Tensor:
        """Pixels in [0, 1], [B, C, T, H, W], or features of V-JEPA 2, [B, M, P] -> logits_BA, a score for each row.

        seen_BK: numbers of the patches that alone are looked at, to train on fewer; without it all are.
        """
        config = self.config
        seen_BMP = seen if config.stem == "vjepa2" else patchify(seen - 0.5, config.patch_frames, config.patch_size)
        position_MD = (self.block_position_N1D + self.place_position_1GD).flatten(0, 1)
        if seen_BK is not None:
            seen_BMP = seen_BMP.take_along_dim(seen_BK[..., None], dim=1)  # B K P
            position_MD = position_MD[seen_BK]  # B K D
        x_BMD = self.embed(seen_BMP) + position_MD
        x_BMD = torch.cat([self.cls_D.expand(len(x_BMD), 1, -1), x_BMD], dim=1)  # B 1+M D
        for layer in self.layers:
            x_BMD = layer(x_BMD)
        return self.head(self.norm(x_BMD[:, 0]))  # B A


class BlockwiseRouter(Router):
    """Clip -> what each of its blocks looks like after those before it; `head` rates levels from that."""

    def _new_head(self) -> nn.Module:
        return BlockHead(self.config.num_blocks, len(self.config.levels), self.config.width)

    def _last_linear(self) -> nn.Linear:
        return self.block_head.rate

    @property
    def block_head(self) -> BlockHead:
        return cast("BlockHead", self.head)

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.block_head.chosen_NmD, std=CHOSEN_STD)

    def forward(self, video_BCTHW: Tensor, seen_BK: Tensor | None = None, place_BGN: Tensor | None = None) -> Tensor:
        """Pixels in [0, 1] -> state_BND; with assignments, as places of their levels: a number for each level that
        could have followed their blocks < t, [B, G, N, m].

        seen_BK: the patches of a block that alone are looked at, the same in every block.
        """
        states, past = [], self.no_past()
        for t, block_BCTHW in enumerate(video_BCTHW.split(self.config.patch_frames, dim=2)):
            state_BD, past = self.step(block_BCTHW, t, past, seen_BK)
            states.append(state_BD)
        state_BND = torch.stack(states, dim=1)
        if place_BGN is None:
            return state_BND
        block_N = torch.arange(self.config.num_blocks, device=place_BGN.device)
        chosen_BGND = self.block_head.chosen_NmD[block_N, place_BGN]
        before_BGND = F.pad(chosen_BGND.cumsum(dim=2)[:, :, :-1], (0, 0, 1, 0))  # of blocks < t
        return self.head(state_BND[:, None], before_BGND)

    def no_past(self) -> Cache:
        """Before block 0."""
        return [[] for _ in self.layers]

    def step(self, block_BCTHW: Tensor, t: int, past: Cache, seen_BK: Tensor | None = None) -> tuple[Tensor, Cache]:
        """The frames of block t -> state_BD, and the past of block t + 1. One clip at a time, whole or as it arrives,
        it is the same arithmetic to the bit."""
        config = self.config
        seen_BMP = patchify(block_BCTHW - 0.5, config.patch_frames, config.patch_size)
        position_MD = self.block_position_N1D[t] + self.place_position_1GD[0]
        if seen_BK is not None:
            seen_BMP, position_MD = seen_BMP.take_along_dim(seen_BK[..., None], dim=1), position_MD[seen_BK]
        x_BMD = self.embed(seen_BMP) + position_MD
        cls_BMD = (self.cls_D + self.block_position_N1D[t]).expand(len(x_BMD), 1, -1)
        x_BMD, extended = torch.cat([cls_BMD, x_BMD], dim=1), []
        for layer, before in zip(self.layers, past, strict=True):
            x_BMD, own = cast("ViTLayer", layer).step(x_BMD, before)
            extended.append([*before, own])
        return self.norm(x_BMD[:, 0]), extended


def frequency_filters(patch_frames: int, patch_size: int) -> Tensor:
    """Cosine filters of a patch, low frequencies first, each with a gain: [P, P], orthogonal.

    The higher its frequency the louder a filter: natural images fade as frequency grows, so all filters speak about
    equally loud. Those that see change over time are louder still, because motion is what tokens are spent on.
    """
    filter_PP, frequency_P, frame_P = cosine_filters(patch_frames, patch_size, COLOUR_RANK)
    return 0.5 * (1 + frequency_P + MOTION_GAIN * frame_P)[:, None] * filter_PP
