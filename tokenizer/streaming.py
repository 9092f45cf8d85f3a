"""Encode and decode one temporal block at a time, with the weights of `VideoTokenizer` and a cache of earlier blocks.

Every attention is block-causal, so block t depends only on the frames and lengths of blocks <= t. Blocks can be
processed as they arrive, and curation walks a tree in which assignments with a common prefix share its work.
All clips of a batch run in lockstep: block t has the same length in each.

Letters: B clips, K tokens of one block, m patches of one block, D E widths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from einops import repeat
from torch import Tensor

from tokenizer.assignment import pack
from tokenizer.blocks.patches import level_cells, level_rows, pooling_pyramid
from tokenizer.blocks.transformer import KeysValues, concat_blocks
from tokenizer.common.clip_shape import sides
from tokenizer.common.errors import UserError
from tokenizer.tokens import VideoTokens

if TYPE_CHECKING:  # model.py calls this module
    from tokenizer.model import VideoTokenizer

Cache = list[list[KeysValues]]
"""Per layer, per block: (keys, values)."""


@dataclass(frozen=True)
class ClipPatches:
    """What the encoder reads of a batch of clips, computed once whatever the assignment."""

    cells: list[Tensor]  # per block: pooled start values of the queries, [B, cells, D]
    references: list[list[KeysValues]]  # per block t, per layer: cross-attention keys and values of blocks <= t

    def of_clips(self, index: Tensor) -> ClipPatches:
        """Some clips of the batch, int64 [B']."""
        return ClipPatches([cell[index] for cell in self.cells], _of_clips(self.references, index))


@dataclass(frozen=True)
class Past:
    """What blocks before this one left. Never changed, only extended, so branches of a tree can share it."""

    encoder: Cache  # of the encoder's self-attention
    decoder: Cache  # of the decoder's self-attention
    tokens: Cache  # of the decoder's cross-attention, which reads the tokens

    @staticmethod
    def empty(model: VideoTokenizer) -> Past:
        """Before block 0."""
        return Past([[] for _ in model.encoder], [[] for _ in model.decoder], [[] for _ in model.decoder])

    def of_clips(self, index: Tensor) -> Past:
        """Some clips of the batch, int64 [B']."""
        return Past(*(_of_clips(cache, index) for cache in (self.encoder, self.decoder, self.tokens)))


def _of_clips(cache: Cache, index: Tensor) -> Cache:
    return [[(k[index], v[index]) for k, v in each] for each in cache]


def read_patches(model: VideoTokenizer, video_BCTHW: Tensor) -> ClipPatches:
    """All patches of the clips, or of their first blocks -> start values and cross-attention keys and values."""
    block = model.config.block_patches
    patch_BMD = model.embed_patches(video_BCTHW)
    cells = [pooling_pyramid(patch_BmD, model.config.grid) for patch_BmD in patch_BMD.split(block, dim=1)]
    placed_BMD = patch_BMD + model.encoder_patch_pos[: patch_BMD.shape[1]]
    whole = [layer.cross_attention.keys_values(patch_BMD, placed_BMD) for layer in model.encoder]
    ends = [(t + 1) * block for t in range(len(cells))]
    return ClipPatches(cells, [[(k[:, :end], v[:, :end]) for k, v in whole] for end in ends])


def step_block(
    model: VideoTokenizer, patches: ClipPatches, t: int, length: int, past: Past
) -> tuple[Tensor, Tensor, Past]:
    """Encode, quantise and decode block t with `length` tokens.

    -> codes int64 [B, K], frames [B, 3, patch_frames, H, W] clamped to [0, 1], and the past of block t + 1.
    """
    code_BK, encoder = encode_block(model, patches, t, length, past)
    frames, decoder, tokens = decode_block(model, code_BK, t, past)
    return code_BK, frames, Past(encoder, decoder, tokens)


def encode_block(model: VideoTokenizer, patches: ClipPatches, t: int, length: int, past: Past) -> tuple[Tensor, Cache]:
    """-> codes of block t, int64 [B, K], and the encoder's extended past."""
    c = model.config
    pooled_BKD = patches.cells[t][:, level_cells(length, c.finest)]
    packing = pack(torch.full((len(pooled_BKD), 1), length))
    x_BKD = model.residual(model.embed_queries(pooled_BKD.flatten(0, 1), packing)).view_as(pooled_BKD)
    pos_KD = model.encoder_token_pos[t * c.block_queries + level_rows(length, c.finest)]
    extended = []
    for layer, before, reference in zip(model.encoder, past.encoder, patches.references[t], strict=True):
        x_BKD, own = layer.step(x_BKD, pos_KD, before, reference)
        extended.append([*before, own])
    return model.quantizer.encode(model.to_latent(model.encoder_norm(x_BKD))), extended


def decode_block(model: VideoTokenizer, code_BK: Tensor, t: int, past: Past) -> tuple[Tensor, Cache, Cache]:
    """-> frames of block t, [B, 3, patch_frames, H, W] in [0, 1], and the decoder's two extended pasts."""
    c = model.config
    token_BKD = model.residual(model.from_latent(model.quantizer.decode(code_BK)))
    placed_BKD = token_BKD + model.decoder_token_pos[t * c.block_queries + level_rows(code_BK.shape[1], c.finest)]
    x_BmD = repeat(token_BKD[:, 0], "B D -> B m D", m=c.block_patches)
    pos_mD = model.decoder_patch_pos[t * c.block_patches :][: c.block_patches]
    selves, crosses = [], []
    for layer, before, seen in zip(model.decoder, past.decoder, past.tokens, strict=True):
        seen = [*seen, layer.cross_attention.keys_values(token_BKD, placed_BKD)]
        x_BmD, own = layer.step(x_BmD, pos_mD, before, concat_blocks(seen))
        selves.append([*before, own])
        crosses.append(seen)
    return model.to_video(x_BmD).clamp(0, 1), selves, crosses


@torch.no_grad()
def reconstruct_streaming(model: VideoTokenizer, video_BCTHW: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Block by block, one assignment for the batch -> frames [B, 3, T, H, W] and codes [B, sum(lengths)]."""
    patches, past = read_patches(model, video_BCTHW), Past.empty(model)
    frames, codes = [], []
    for t, length in enumerate(lengths):
        code_BK, block, past = step_block(model, patches, t, length, past)
        frames.append(block)
        codes.append(code_BK)
    return torch.cat(frames, dim=2), torch.cat(codes, dim=1)


@torch.no_grad()
def encode_blocks(model: VideoTokenizer, video_BCTHW: Tensor, lengths: Sequence[int]) -> Tensor:
    """The first blocks of clips, later frames need not exist: [B, 3, T, H, W] -> codes, int64 [B, sum(lengths)]."""
    patches, past = read_patches(model, video_BCTHW), Past.empty(model)
    codes = []
    for t, length in enumerate(lengths):
        code_BK, encoder = encode_block(model, patches, t, length, past)
        codes.append(code_BK)
        past = replace(past, encoder=encoder)
    return torch.cat(codes, dim=1)


# --- a stream without end: frames in, tokens of one block after the other, frames out --------------------------------


@dataclass(frozen=True)
class BlockTokens:
    """The tokens of one temporal block of a stream."""

    code_K: Tensor  # int64, 0 .. codebook_size - 1
    block: int  # 0 .. N-1, its place in its clip
    num_frames: int  # real ones; the rest of the block repeats the last
    tokenizer_sha256: str = ""


def blocks_of(tokens: VideoTokens, num_blocks: int) -> Iterator[BlockTokens]:
    """The blocks of whole clips, in order."""
    in_block = tokens.num_frames // num_blocks
    lengths = tokens.length_BN.flatten().tolist()
    for i, code_K in enumerate(tokens.code_L.split(lengths)):
        yield BlockTokens(code_K, i % num_blocks, in_block, tokens.tokenizer_sha256)


def known_lengths(lengths: Sequence[int]) -> Callable[[], Callable[[Tensor], int]]:
    """For `stream_blocks`: the same lengths for every clip, whatever its frames show."""

    def new_clip() -> Callable[[Tensor], int]:
        rest = iter(lengths)
        return lambda block_BCTHW: next(rest)

    return new_clip


@torch.no_grad()
def stream_blocks(
    model: VideoTokenizer,
    frames: Iterable[Tensor],
    choose_lengths: Callable[[Tensor], Tensor],
    new_clip: Callable[[], Callable[[Tensor], int]] | None,
) -> Iterator[BlockTokens]:
    """Frames [3, H, W] in [0, 1] -> tokens, block after block; clips follow one another.

    new_clip(): what chooses the length of each block of a clip from its frames [1, 3, T, H, W]; a block then leaves as
    soon as they are there. None: choose_lengths(clip) needs the whole clip, and blocks leave when it is complete.
    """
    c = model.config
    frames = iter(frames)
    while first := list(itertools.islice(frames, c.patch_frames)):
        choose = new_clip and new_clip()
        clip, real, past = [], [], Past.empty(model)
        for t in range(c.num_blocks):
            block = first if t == 0 else list(itertools.islice(frames, c.patch_frames))
            if not block:
                break
            real.append(len(block))
            clip += block + block[-1:] * (c.patch_frames - len(block))
            if choose is not None:
                video_BCTHW = _as_clip(model, clip)
                length = choose(video_BCTHW[:, :, -c.patch_frames :])
                patches = read_patches(model, video_BCTHW)  # of earlier blocks again: little beside the layers
                code_BK, encoder = encode_block(model, patches, t, length, past)
                past = replace(past, encoder=encoder)
                yield BlockTokens(code_BK[0].cpu(), t, real[-1], model.sha256)
        if choose is None:
            padded = _as_clip(model, clip + clip[-1:] * (c.num_frames - len(clip)))
            tokens = model.encode(padded, choose_lengths(padded))
            for block_tokens, num_real in zip(blocks_of(tokens, c.num_blocks), real, strict=False):
                yield replace(block_tokens, num_frames=num_real)


@torch.no_grad()
def play_blocks(model: VideoTokenizer, blocks: Iterable[BlockTokens]) -> Iterator[Tensor]:
    """Tokens -> frames [3, num_frames, H, W] in [0, 1], each block as soon as its tokens are there.

    Block 0 begins the next clip. Raises UserError for tokens of another tokenizer and for a block out of order.
    """
    past, expected = Past.empty(model), 0
    for tokens in blocks:
        model.check_made_here(tokens.tokenizer_sha256)
        if tokens.block == 0:
            past, expected = Past.empty(model), 0
        if tokens.block != expected:
            raise UserError(f"block {tokens.block} of a clip came in place of block {expected}; keep the order")
        if len(tokens.code_K) not in model.space.levels:
            raise UserError(f"a block of {len(tokens.code_K)} tokens is none of the levels {model.space.levels}")
        video, decoder, crosses = decode_block(model, tokens.code_K[None].to(model.device), tokens.block, past)
        past, expected = replace(past, decoder=decoder, tokens=crosses), (expected + 1) % model.config.num_blocks
        yield video[0, :, : tokens.num_frames]


def _as_clip(model: VideoTokenizer, frames: Sequence[Tensor]) -> Tensor:
    want = (3, *sides(model.config.size))
    for frame in frames:
        if tuple(frame.shape) != want or not frame.is_floating_point():
            raise UserError(
                f"a frame must be floats {list(want)} in [0, 1], got {frame.dtype} {list(frame.shape)}; "
                "video_io.resize_center_crop and to_model_range make them"
            )
    return torch.stack(tuple(frames), dim=1)[None].to(model.device)  # [1, 3, T, H, W]
