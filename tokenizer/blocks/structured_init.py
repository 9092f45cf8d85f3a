"""The structured start: an untrained tokenizer that already is a coarse codec of cosine coefficients.

With random weights a run of a few thousand steps spends all of them on finding out that a token speaks about a place
and a patch is made of pixels (paper.md section 2, "Initialisation that makes small runs learn"). So everything begins
as what it will have to be able to do anyway, and nothing of the architecture changes:

    patch embedding      cosine filters of the patch, lowest frequency first; the pixel layer is their transpose
    a token's latent     the lowest `code_width - 1` coefficients of the cells it pools, beside a constant; so the
                         direction of the latent, which is all that the quantiser keeps, holds their amplitude
    decoder, cross       values pass through: a patch starts from the tokens that its attention finds near its place
    all other branches   add nothing yet: their last linear maps are 0
    queries and keys     W_q = W_k, scaled so that near places find each other

Two numbers of every token, +c and -c, are constant: beside them a LayerNorm leaves the amplitude of the others as it
is. The constants below make latents of about equal spread from natural pictures; training moves all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizer.blocks.attention import Attention
from tokenizer.blocks.frequency import cosine_filters
from tokenizer.blocks.transformer import QFormer

NEARNESS = 16.0  # W_q^T W_k against plain Xavier: how sharply near places find each other
_COLOUR_RANK = 1.2  # colour differences come right behind the first brightness differences
_CONTENT, _CONSTANT = 0.3, 6.0  # amplitude of coefficients and of the constant pair in the encoder
_SHOWN, _SHOWN_CONSTANT = 0.15, 3.0  # the same in the decoder
_OWN = 4.0  # of a patch, its own tokens against the first token of its block
_DC_GAIN, _AC_GAIN = 0.25, 1.0  # from normalised coefficients to latents: mean brightness is the loudest
_LATENT_NORM = 1.4  # of a latent before normalisation, typically


def start_attention(attention: Attention) -> None:
    """Equal queries and keys: an attention whose first choice is its own neighbourhood."""
    attention.to_q.weight.mul_(NEARNESS**0.5)
    attention.to_k.weight.copy_(attention.to_q.weight)


def start_encoder(
    patch_embed: nn.Linear, query_embed: nn.Linear, encoder: QFormer, to_latent: nn.Sequential, filter_PP: Tensor
) -> None:
    """Pixels -> latents of low coefficients and a constant."""
    width, num = len(patch_embed.weight), min(len(patch_embed.weight) - 2, len(filter_PP))
    patch_embed.weight.zero_()[:num] = _CONTENT * filter_PP[:num]
    query_embed.weight.copy_(torch.eye(width))
    query_embed.bias[-2:] = torch.tensor([_CONSTANT, -_CONSTANT])
    for layer in encoder:
        for branch in (layer.self_attention.to_out, layer.cross_attention.to_out, _linear(layer.mlp[2])):
            branch.weight.zero_()
    narrow, last = map(_linear, to_latent)
    kept, gain = _kept(last.out_features)
    narrow.weight[:kept] = torch.eye(kept, width)
    narrow.weight[kept] = 0
    narrow.weight[kept, -2:] = torch.tensor([0.5, -0.5])
    last.weight.zero_()[:kept, :kept] = gain.diag()
    last.weight[kept, kept] = _spread(width, _CONSTANT) / _CONSTANT  # the constant becomes 1


def start_decoder(from_latent: nn.Sequential, decoder: QFormer, to_pixels: nn.Linear, filter_PP: Tensor) -> None:
    """Latents -> pixels of the coefficients they hold."""
    width = to_pixels.in_features
    wide, last = map(_linear, from_latent)
    wide.weight[: wide.in_features] = torch.eye(wide.in_features)
    kept, gain = _kept(wide.in_features)
    coefficient = _LATENT_NORM * _spread(width, _CONSTANT) / _CONTENT / gain
    last.weight.zero_()[:kept, :kept] = (_SHOWN * coefficient).diag()
    last.bias[-2:] = torch.tensor([_SHOWN_CONSTANT, -_SHOWN_CONSTANT])
    for layer in decoder:
        layer.self_attention.to_out.weight.zero_()
        _linear(layer.mlp[2]).weight.zero_()
        layer.cross_attention.to_v.weight.copy_(torch.eye(width))
        layer.cross_attention.to_out.weight.copy_(torch.eye(width) * (_OWN / len(decoder)))
    num = min(width - 2, len(filter_PP))
    scale = _spread(width, (1 + _OWN) * _SHOWN_CONSTANT) / ((1 + _OWN) * _SHOWN)
    to_pixels.weight.zero_()[:, :num] = scale * filter_PP[:num].T


def patch_filters(patch_frames: int, patch_size: int) -> Tensor:
    """The cosine filters that both ends start from, [P, P]."""
    return cosine_filters(patch_frames, patch_size, _COLOUR_RANK)[0]


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def _kept(code_width: int) -> tuple[int, Tensor]:
    """How many coefficients a latent holds, and the gain of each."""
    gain = torch.full((code_width - 1,), _AC_GAIN)
    gain[:1] = _DC_GAIN
    return code_width - 1, gain


def _spread(width: int, constant: float) -> float:
    """What a LayerNorm divides by where the constant pair is loudest."""
    return (2 * constant**2 / width) ** 0.5
