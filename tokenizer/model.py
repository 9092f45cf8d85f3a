"""The tokenizer: encode a clip with an assignment into that many discrete tokens, and decode them (arXiv 2603.12267).

    encode    tokens start as pooled patches of their own block; Q-Former layers read the patches
    quantize  nearest code of a unit-length codebook
    decode    patches start as the first token of their block; Q-Former layers read the tokens

Every attention is block-causal: block t sees blocks <= t. Fewer tokens are fewer rows of
the packed batch, so a clip with fewer tokens costs less. Nothing is padded or masked.

Letters: B clips, C T H W, N blocks, M patches of a clip, L packed tokens, P numbers in a patch, D E widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from tokenizer.assignment import AssignmentSpace, Packing, pack, pack_uniform
from tokenizer.blocks.bottlenecks import (
    KLBottleneck,
    Quantized,
    VectorQuantizer,
    build_bottleneck,
)
from tokenizer.blocks.patches import (
    Grid,
    finest_cells,
    grid_of,
    most_queries,
    packed_queries,
    packed_rows,
    packed_second,
    patchify,
    unpatchify,
)
from tokenizer.blocks.structured_init import start_codec, start_positions
from tokenizer.blocks.transformer import QFormer, TransformerConfig, check_positive
from tokenizer.common.clip_shape import check_whole_patches, plain_size, sides
from tokenizer.common.device import send
from tokenizer.common.errors import UserError
from tokenizer.common.hub import HubModel

if TYPE_CHECKING:  # imported by the methods that need it: no training does
    from tokenizer.streaming import BlockTokens
    from tokenizer.tokens import VideoTokens


@dataclass
class TokenizerConfig:
    """Shape of a tokenizer. The defaults are the paper's S-B with a codebook of 16384."""

    num_frames: int = 16  # frames of a clip
    size: Any = 128  # pixels: one number for a square, or [height, width]
    patch_frames: int = 4  # frames of a temporal block
    patch_size: int = 8  # pixels of a patch's side
    levels: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])  # tokens a block may get
    bottleneck: str = "vq"  # the paper's; or "fsq", "kl", "none", see blocks/bottlenecks.py
    fsq_levels: list[int] = field(default_factory=list)  # for "fsq": values of each number of a code, e.g. [8, 8, 8, 5]
    codebook_size: int = 16384  # for "vq"; for "fsq" the product of its levels
    code_width: int = 8  # numbers in a code or a continuous latent; for "fsq" as many as it has levels
    bottleneck_width: int = 256  # between a transformer's width and the code width, on both sides
    mlp_ratio: float = 4.0
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=lambda: TransformerConfig(layers=12, width=768, heads=12))
    queries: str = "pyramid"  # the paper's, as far as known; or "grid": see blocks/patches.py
    init: str = "structured"  # or "random": how positions and attention begin; see VideoTokenizer.init_weights

    def __post_init__(self) -> None:
        self.size = plain_size(self.size, "model.size")
        check_positive(self)
        if self.num_frames % self.patch_frames:
            nearest = self.patch_frames * max(1, round(self.num_frames / self.patch_frames))
            raise UserError(
                f"model.num_frames = {self.num_frames} is not divisible by model.patch_frames = {self.patch_frames}; "
                f"the nearest that is: {nearest}"
            )
        check_whole_patches(self.size, self.patch_size, "model.")
        AssignmentSpace(tuple(self.levels), self.num_blocks)
        if self.levels[-1] > most_queries(self.grid):
            raise UserError(
                f"model.levels: {self.levels[-1]} is more than the {most_queries(self.grid)} queries that pooling a "
                f"{self.grid[0]}x{self.grid[1]} block gives; the largest possible level is {most_queries(self.grid)}"
            )
        if self.queries not in ("pyramid", "grid"):
            raise UserError(f"model.queries = {self.queries!r}: choose 'pyramid' or 'grid'")
        self._check_bottleneck()
        if self.init == "structured" and self.patch_width < self.code_width - 1:
            raise UserError(
                f"model.init = 'structured' puts {self.code_width - 1} cosine coefficients of a patch into a code, but "
                f"a patch of {self.patch_frames} x {self.patch_size} x {self.patch_size} has {self.patch_width} "
                "numbers: set model.init=random, or larger patches"
            )
        if self.init not in ("structured", "random"):
            raise UserError(f"model.init = {self.init!r}: choose 'structured' or 'random'")

    def _check_bottleneck(self) -> None:
        if self.bottleneck_width < self.code_width:
            raise UserError(
                f"model.bottleneck_width = {self.bottleneck_width} is below model.code_width = {self.code_width}; "
                "it must be at least as wide"
            )
        if self.bottleneck not in ("vq", "fsq", "kl", "none"):
            raise UserError(f"model.bottleneck = {self.bottleneck!r}: choose 'vq', 'fsq', 'kl' or 'none'")
        if (self.bottleneck == "fsq") != bool(self.fsq_levels):
            raise UserError(
                f"model.bottleneck = {self.bottleneck!r} and model.fsq_levels = {self.fsq_levels} clash: "
                "'fsq' needs levels, e.g. [8, 8, 8, 5], and no other reads them"
            )
        if self.fsq_levels:
            shape = (math.prod(self.fsq_levels), len(self.fsq_levels))
            if min(self.fsq_levels) < 2 or (self.codebook_size, self.code_width) != shape:
                raise UserError(
                    f"model.fsq_levels = {self.fsq_levels}: each must be at least 2, and they go with "
                    f"model.codebook_size={shape[0]} model.code_width={shape[1]}"
                )

    @property
    def is_discrete(self) -> bool:
        """Whether tokens are codes, as files of tokens and GPTs need them."""
        return self.bottleneck in ("vq", "fsq")

    @property
    def num_blocks(self) -> int:
        return self.num_frames // self.patch_frames

    # cached: every forward pass reads these, and a config that is built does not change

    @cached_property
    def grid(self) -> Grid:
        return grid_of(self.size, self.patch_size)

    @cached_property
    def block_patches(self) -> int:
        """m, patches of a block."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_width(self) -> int:
        """Numbers in a patch."""
        return self.patch_frames * self.patch_size**2 * 3

    @cached_property
    def block_queries(self) -> int:
        """Rows that a block owns in a table of 1D positions: the largest level, rounded up to a power of two.

        With queries = "grid": the cells of the pyramid, and second tokens if there are any.
        """
        if self.finest:
            return self.finest * (3 if self.has_second_tokens else 2)
        return 1 << (self.levels[-1] - 1).bit_length()

    @cached_property
    def has_second_tokens(self) -> bool:
        """Whether a block may get more tokens than its finest grid has cells."""
        return 0 < self.finest < self.levels[-1]

    @cached_property
    def finest(self) -> int:
        """With queries = "grid", the cells of the pyramid's last group, else 0; see `level_cells`."""
        return finest_cells(self.grid) if self.queries == "grid" else 0


@dataclass(frozen=True)
class TokenizerOutput:
    video_BCTHW: Tensor  # float32, not clamped, so that a loss sees overshoot
    quantized: Quantized
    feature_BMD: Tensor | None = None  # patches after decoder layer `feature_layer`


class ChoosesLengths(Protocol):
    """The part of a router that `encode` uses; see `tokenizer.router.predict.load_router`."""

    def assign(self, video_BCTHW: Tensor, budget: str = ..., price: float | None = ...) -> Tensor: ...

    def live(self, budget: str) -> Callable[[], Callable[[Tensor], int]] | None: ...


class VideoTokenizer(HubModel, nn.Module):
    """Pixels in [0, 1], float32, [B, 3, T, H, W]; lengths int64 [B, N] on the CPU."""

    kind, config_class, config_key = "tokenizer", TokenizerConfig, "encoder"
    bf16_stream: bool = False  # under bf16 autocast, keep residual streams in bf16: less memory, less exact gradients

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        c = self.config = config
        self.space = AssignmentSpace(tuple(c.levels), c.num_blocks)
        num_patches, num_queries = c.num_blocks * c.block_patches, c.num_blocks * c.block_queries

        self.patch_embed = nn.Linear(c.patch_width, c.encoder.width)
        self.query_embed = nn.Linear(c.encoder.width, c.encoder.width)
        self.second_embed = nn.Linear(c.encoder.width, c.encoder.width) if c.has_second_tokens else None
        self.encoder_patch_pos = nn.Parameter(torch.empty(num_patches, c.encoder.width))
        self.encoder_token_pos = nn.Parameter(torch.empty(num_queries, c.encoder.width))
        self.encoder = QFormer(c.encoder.layers, c.encoder.width, c.encoder.heads, c.mlp_ratio)
        self.encoder_norm = nn.LayerNorm(c.encoder.width)
        self.to_latent = _two_linears(c.encoder.width, c.bottleneck_width, c.code_width)
        self.quantizer = build_bottleneck(c.bottleneck, c.codebook_size, c.code_width, c.fsq_levels)

        self.from_latent = _two_linears(c.code_width, c.bottleneck_width, c.decoder.width)
        self.decoder_patch_pos = nn.Parameter(torch.empty(num_patches, c.decoder.width))
        self.decoder_token_pos = nn.Parameter(torch.empty(num_queries, c.decoder.width))
        self.decoder = QFormer(c.decoder.layers, c.decoder.width, c.decoder.heads, c.mlp_ratio)
        self.decoder_norm = nn.LayerNorm(c.decoder.width)
        self.to_pixels = nn.Linear(c.decoder.width, c.patch_width)
        if self.patch_embed.weight.device.type != "meta":
            self.init_weights()

    @property
    def gentle(self) -> tuple[str, ...]:
        """Weights that learn at a tenth of the rate.

        With the structured start their entries are small, and a change of all of them adds up over hundreds of pixels.
        """
        if self.config.init == "random":
            return ()
        last = f"decoder.{self.config.decoder.layers - 1}.mlp.2.weight"
        return ("patch_embed.weight", "from_latent.1.weight", *([last] if self.config.has_second_tokens else []))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise all weights.

        linear                 Xavier uniform, bias 0; the last one (to_pixels) N(0, 0.02), so that it starts grey
        codebook               random; training replaces it by real latents (VectorQuantizer.start)
        positions, random      N(0, 1/width)
        positions, structured  3D: separable sin-cos; 1D: the mean of the 3D rows of the cells that the query pools
        the rest, structured   a coarse codec of cosine coefficients: blocks/structured_init.py
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.to_pixels.weight, std=0.02)
        if isinstance(self.quantizer, VectorQuantizer):
            nn.init.normal_(self.quantizer.codebook.weight)
        elif isinstance(self.quantizer, KLBottleneck):
            self.quantizer.init_weights()
        tables = [self.encoder_patch_pos, self.encoder_token_pos, self.decoder_patch_pos, self.decoder_token_pos]
        for table in tables:
            nn.init.normal_(table, std=table.shape[1] ** -0.5)
        if self.config.init == "random":
            return
        c = self.config
        for patch_pos, token_pos in (tables[:2], tables[2:]):
            start_positions(patch_pos, token_pos, c.grid, c.block_queries, c.finest)
        start_codec(self)

    # --- the three phases ---------------------------------------------------------------------------------------

    def forward(
        self,
        video_BCTHW: Tensor,
        length_BN: Tensor,
        feature_layer: int = 0,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        """Reconstruct under the given assignment, with everything the losses need.

        feature_layer: also return the patches after this many decoder layers; 0 returns none. generator: of the noise
        that a KL bottleneck adds in training; None adds no noise.
        """
        packing = self._checked_packing(video_BCTHW, length_BN)
        quantized = self.quantizer(self.encode_latents(video_BCTHW, packing), generator)
        patch_BMD, feature_BMD = self._decode_patches(quantized.latent_LE, packing, feature_layer)
        return TokenizerOutput(self.to_video(patch_BMD), quantized, feature_BMD)

    def encode_latents(self, video_BCTHW: Tensor, packing: Packing) -> Tensor:
        """[B, 3, T, H, W] -> latents before quantisation, [L, E]."""
        patch_BMD = self.embed_patches(video_BCTHW)
        pooled_LD = packed_queries(patch_BMD, packing, self.config.grid, self.config.finest)
        token_LD = self.residual(self.embed_queries(pooled_LD, packing))
        patch_LD = rearrange(patch_BMD, "B M D -> (B M) D")
        placed_LD = patch_LD + repeat(self.encoder_patch_pos, "M D -> (B M) D", B=packing.num_clips)
        token_pos_LD = self.encoder_token_pos[self._token_rows(packing)]
        patches = pack_uniform(packing.num_clips, packing.num_blocks, self.config.block_patches)
        for layer in self.encoder:
            token_LD = layer(token_LD, token_pos_LD, patch_LD, placed_LD, packing, patches)
        return self.to_latent(self.encoder_norm(token_LD))

    def decode_latents(self, latent_LE: Tensor, packing: Packing) -> Tensor:
        """Quantised unit latents [L, E] -> [B, 3, T, H, W], not clamped."""
        return self.to_video(self._decode_patches(latent_LE, packing)[0])

    def _decode_patches(
        self, latent_LE: Tensor, packing: Packing, feature_layer: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Quantised latents [L, E] -> patches [B, M, D] after the last layer and after `feature_layer` layers."""
        m, feature_BMD = self.config.block_patches, None
        patches = pack_uniform(packing.num_clips, packing.num_blocks, m)
        token_LD = self.residual(self.from_latent(latent_LE))
        first_RD = token_LD[send(packing.first_BN.flatten(), token_LD.device)]
        patch_LD = repeat(first_RD, "R D -> (R m) D", m=m)
        patch_pos_LD = repeat(self.decoder_patch_pos, "M D -> (B M) D", B=packing.num_clips)
        placed_LD = token_LD + self.decoder_token_pos[self._token_rows(packing)]
        for count, layer in enumerate(self.decoder, start=1):
            patch_LD = layer(patch_LD, patch_pos_LD, token_LD, placed_LD, patches, packing)
            if count == feature_layer:
                feature_BMD = rearrange(patch_LD, "(B M) D -> B M D", B=packing.num_clips)
        return rearrange(patch_LD, "(B M) D -> B M D", B=packing.num_clips), feature_BMD

    # --- public methods -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        video_BCTHW: Tensor,
        length_BN: Tensor | None = None,
        *,
        router: ChoosesLengths | None = None,
        budget: str | None = None,
    ) -> VideoTokens:
        """Tokenize clips [B, 3, T, H, W] (or one, [3, T, H, W]) in [0, 1].

        Give the lengths, or a router with a budget ("router", "tokens:512", "price:0.01"), or a budget that needs no
        router ("uniform:256", "fixed:256,128,64,64"). The tokens of a clip never depend on the rest of the batch.
        Raises UserError for a wrong shape or lengths outside the levels.
        """
        from tokenizer.tokens import VideoTokens

        if not self.config.is_discrete:
            raise UserError(
                f"model.bottleneck = {self.config.bottleneck!r} has continuous latents, no codes: call "
                "encode_latents and decode_latents, or train with 'vq' or 'fsq'"
            )
        video_BCTHW = video_BCTHW[None] if video_BCTHW.ndim == 4 else video_BCTHW
        if length_BN is None:
            length_BN = self._chosen_lengths(video_BCTHW, router, budget)
        packing = self._checked_packing(video_BCTHW, length_BN)
        code_L = self.quantizer.encode(self.encode_latents(video_BCTHW.to(self.device), packing))
        c = self.config
        return VideoTokens(code_L.cpu(), packing.length_BN, c.num_frames, c.size, c.codebook_size, self.sha256)

    @torch.no_grad()
    def decode(self, tokens: VideoTokens) -> Tensor:
        """Tokens -> clips [B, 3, T, H, W] in [0, 1]; only codes and lengths are read.

        Raises UserError if the tokens were made by other weights or do not fit this tokenizer.
        """
        self.check_made_here(tokens.tokenizer_sha256)
        c = self.config
        theirs, ours = ((x.num_frames, x.size, x.codebook_size) for x in (tokens, c))
        if theirs != ours:
            raise UserError(f"tokens of (frames, size, codes) {theirs} do not fit this tokenizer's {ours}")
        self.space.rows_of(tokens.length_BN)
        latent_LE = self.quantizer.decode(tokens.code_L.to(self.device))
        return self.decode_latents(latent_LE, tokens.packing).clamp(0, 1)

    def stream(
        self, frames: Iterable[Tensor], *, router: ChoosesLengths | None = None, budget: str | None = None
    ) -> Iterator[BlockTokens]:
        """Tokenize an endless stream of frames [3, H, W] in [0, 1]; yields the tokens of one temporal block at a time.

        Lengths as in `encode`, where tokens:N looks ahead. With a router of whole clips a block waits for its clip.
        """
        from tokenizer.streaming import known_lengths, stream_blocks

        choose = partial(self._chosen_lengths, router=router, budget=budget)
        if router is None:
            return stream_blocks(self, frames, choose, known_lengths(choose(torch.empty(1))[0].tolist()))
        return stream_blocks(self, frames, choose, router.live(budget or "router"))

    def play(self, tokens: VideoTokens | Iterable[BlockTokens]) -> Iterator[Tensor]:
        """Decode tokens as they arrive: frames [3, T, H, W] in [0, 1] of one temporal block at a time.

        Takes the output of `stream`, or whole clips. Equals `decode` up to rounding and raises the same UserError.
        """
        from tokenizer.streaming import blocks_of, play_blocks
        from tokenizer.tokens import VideoTokens

        blocks = blocks_of(tokens, self.config.num_blocks) if isinstance(tokens, VideoTokens) else tokens
        return play_blocks(self, blocks)

    def check_made_here(self, made_by: str) -> None:
        """Raises UserError if tokens of a tokenizer with this sha256 do not fit; "" (never saved) passes."""
        if made_by and self.sha256 and made_by != self.sha256:
            raise UserError(
                f"tokens made by tokenizer {made_by[:12]} cannot be read by {self.sha256[:12]}: load that one"
            )

    @property
    def device(self) -> torch.device:
        return self.patch_embed.weight.device

    # --- parts shared with streaming.py -------------------------------------------------------------------------

    def embed_patches(self, video_BCTHW: Tensor) -> Tensor:
        """Pixels in [0, 1] -> embeddings [B, M, D]; any whole number of temporal blocks."""
        return self.residual(
            self.patch_embed(patchify(video_BCTHW - 0.5, self.config.patch_frames, self.config.patch_size))
        )

    def embed_queries(self, pooled_LD: Tensor, packing: Packing) -> Tensor:
        """Pooled patches -> first values of the tokens; second tokens of a cell have a map of their own."""
        token_LD = self.query_embed(pooled_LD)
        if self.second_embed is None:
            return token_LD
        second = send(packed_second(packing, self.config.finest), self.device)
        return token_LD.index_copy(0, second, self.second_embed(pooled_LD[second]))

    def residual(self, x: Tensor) -> Tensor:
        """The start of a residual stream between layers: float32 under autocast too, unless `bf16_stream`."""
        return x if self.bf16_stream else x.float()

    def to_video(self, patch_BMD: Tensor) -> Tensor:
        """Decoder output [B, M, D] -> pixels around [0, 1]; any whole number of temporal blocks."""
        pixel_BMP = self.to_pixels(self.decoder_norm(patch_BMD)).float()
        return unpatchify(pixel_BMP, self.config.patch_frames, self.config.patch_size, self.config.grid) + 0.5

    def _token_rows(self, packing: Packing) -> Tensor:
        """int64 [L]: the row of each packed token in a 1D position table."""
        row_L = packing.block_L * self.config.block_queries + packed_rows(packing, self.config.finest)
        return send(row_L, self.encoder_token_pos.device)

    def _chosen_lengths(self, video_BCTHW: Tensor, router: ChoosesLengths | None, budget: str | None) -> Tensor:
        if router is not None:
            return router.assign(video_BCTHW, budget or "router")
        if budget is None:
            raise UserError('encode: give length_BN, or router=..., or a budget such as "uniform:256"')
        from tokenizer.budget import parse_budget

        row = parse_budget(budget, self.space).fixed_row
        if row is None:
            raise UserError(f"budget {budget!r} needs a router: encode(video, router=load_router(...), budget=...)")
        return self.space.lengths_of(torch.full((len(video_BCTHW),), row))

    def _checked_packing(self, video_BCTHW: Tensor, length_BN: Tensor) -> Packing:
        want = (3, self.config.num_frames, *sides(self.config.size))
        if tuple(video_BCTHW.shape[1:]) != want:
            raise UserError(f"a clip must be {list(want)} (C, T, H, W), got {list(video_BCTHW.shape[1:])}")
        if not video_BCTHW.is_floating_point():
            raise UserError(f"pixels must be floats in [0, 1], got {video_BCTHW.dtype}; to_model_range makes them")
        if len(length_BN) != len(video_BCTHW):
            raise UserError(f"{len(video_BCTHW)} clips but lengths for {len(length_BN)}")
        self.space.rows_of(length_BN)  # raises if a length is not a level
        return pack(length_BN)


def _two_linears(width_in: int, width: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.Linear(width, width_out))
