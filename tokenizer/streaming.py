"""Encode and decode one temporal block at a time, with the weights of `VideoTokenizer` and a cache of earlier blocks.

Every attention is block-causal, so block t depends only on the frames and lengths of blocks <= t. Blocks can be
processed as they arrive, and curation walks a tree in which assignments with a common prefix share its work.
All clips of a batch run in lockstep: block t has the same length in each.

Letters: B clips, K tokens of one block, m patches of one block (G*G), D E widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import repeat
from torch import Tensor

from tokenizer.blocks.patches import level_cells, pooling_pyramid
from tokenizer.blocks.transformer import KeysValues, concat_blocks
from tokenizer.model import VideoTokenizer

Cache = list[list[KeysValues]]
"""Per layer, per block: (keys, values)."""


@dataclass(frozen=True)
class ClipPatches:
    """What the encoder reads of a batch of clips, computed once whatever the assignment."""

    cells: list[Tensor]  # per block: pooled start values of the queries, [B, 2*G*G, D]
    references: list[list[KeysValues]]  # per block t, per layer: cross-attention keys and values of blocks <= t


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


def read_patches(model: VideoTokenizer, video_BCTHW: Tensor) -> ClipPatches:
    """All patches of the clips, or of their first blocks -> start values and cross-attention keys and values."""
    block = model.config.grid**2
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
    cell_K = level_cells(length)
    x_BKD = model.query_embed(patches.cells[t][:, cell_K])
    pos_KD = model.encoder_token_pos[t * c.block_queries + cell_K]
    extended = []
    for layer, before, reference in zip(model.encoder, past.encoder, patches.references[t], strict=True):
        x_BKD, own = layer.step(x_BKD, pos_KD, before, reference)
        extended.append([*before, own])
    return model.quantizer.nearest(model.to_latent(model.encoder_norm(x_BKD))), extended


def decode_block(model: VideoTokenizer, code_BK: Tensor, t: int, past: Past) -> tuple[Tensor, Cache, Cache]:
    """-> frames of block t, [B, 3, patch_frames, H, W] in [0, 1], and the decoder's two extended pasts."""
    c = model.config
    token_BKD = model.from_latent(model.quantizer.lookup(code_BK))
    placed_BKD = token_BKD + model.decoder_token_pos[t * c.block_queries + level_cells(code_BK.shape[1])]
    x_BmD = repeat(token_BKD[:, 0], "B D -> B m D", m=c.grid**2)
    pos_mD = model.decoder_patch_pos[t * c.grid**2 :][: c.grid**2]
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
