"""Structured initialisation: an untrained tokenizer is already a coarse codec of cosine coefficients.

From random weights, a run of a few thousand steps spends them all on learning that a token describes a place and a
patch consists of pixels. Here the weights start with that knowledge; the architecture is unchanged:

    patch embedding      cosine filters of the patch, lowest frequency first; the pixel layer is their transpose
    a token's latent     the lowest `code_width - 1` coefficients of the cells it pools, beside a constant; so the
                         direction of the latent, which is all that the quantiser keeps, holds their amplitude
    decoder, cross       values pass through: a patch starts from the tokens that its attention finds near its place
    all other branches   add nothing yet: their last linear maps are 0
    queries and keys     whole waves of the positions, shared out among the heads, and nothing of the content: so the
                         product of two places falls with their distance, in every head, whatever their content

Two numbers of every token, +c and -c, are constant: beside them a LayerNorm leaves the amplitude of the others as it
is. A third one is minus the sum of the others, so that it subtracts no mean either. The constants below make latents of
about equal spread from natural pictures; training moves all of them, at a low rate: at 1e-4 the codec improves, at 1e-3
a hundred steps undo it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tokenizer.blocks.patches import Grid, cosine_filters, pooling_pyramid, sincos_3d, waves_3d
from tokenizer.blocks.transformer import QFormer, QFormerLayer

if TYPE_CHECKING:
    from tokenizer.model import VideoTokenizer

NEARNESS = 16.0  # weight of a wave in the product of query and key: how sharply near places find each other
_WIDER = (4.0, 1.0)  # the same of heads that carry no coefficient, in turn: some neighbours, or a wide surrounding
_COLOUR_RANK = 1.2  # colour differences come right behind the first brightness differences
_CONTENT, _CONSTANT = 0.3, 6.0  # amplitude of coefficients and of the constant pair in the encoder
_SHOWN, _SHOWN_CONSTANT = 0.15, 6.0  # the same in the decoder
_FLAG = 8.0  # what tells first and second tokens of a cell apart, in queries and keys
_FAINT = 0.1  # of rows that hold no wave
_OWN = 16.0  # of a patch, its own tokens against the first token of its block
_DC_GAIN, _COLOUR_GAIN, _AC_GAIN = 0.09, 0.10, 0.20  # from coefficients to latents: means are the loudest
_LATENT_NORM = 1.2  # of a latent before normalisation, typically


def start_codec(model: VideoTokenizer) -> None:
    """Both ends of a tokenizer, and its second tokens if it has them."""
    c = model.config
    filters = patch_filters(c.patch_frames, c.patch_size)
    start_encoder(model.patch_embed, model.query_embed, model.encoder, model.encoder_norm, model.to_latent, *filters)
    start_decoder(model.from_latent, model.decoder, model.decoder_norm, model.to_pixels, *filters)
    if model.second_embed is None:
        return
    token_pos = model.decoder_token_pos
    second_KD = token_pos.unflatten(0, (c.num_blocks, -1))[:, 2 * c.finest :]
    start_second_tokens(
        model.second_embed, model.from_latent, model.decoder, model.to_pixels, token_pos, second_KD, filters[1]
    )


def start_positions(patch_pos: Tensor, token_pos: Tensor, grid: Grid, block_queries: int, finest: int) -> None:
    """3D: separable sin-cos; 1D: the mean of the 3D rows of the cells that a query pools."""
    num_blocks = len(token_pos) // block_queries
    patch_pos.copy_(sincos_3d(num_blocks, grid, patch_pos.shape[1]))
    cells = pooling_pyramid(patch_pos.unflatten(0, (num_blocks, -1)), grid)  # [N, K, D]
    if block_queries > cells.shape[1]:  # second tokens of the last cells
        cells = torch.cat([cells, cells[:, -finest:]], dim=1)
    token_pos.copy_(cells[:, :block_queries].flatten(0, 1))


def start_encoder(
    patch_embed: nn.Linear,
    query_embed: nn.Linear,
    encoder: QFormer,
    norm: nn.LayerNorm,
    to_latent: nn.Sequential,
    filter_PP: Tensor,
    gain_P: Tensor,
) -> None:
    """Pixels -> latents of low coefficients and a constant."""
    width, num = len(patch_embed.weight), min(len(patch_embed.weight) - 3, len(filter_PP))
    patch_embed.weight.zero_()[:num] = _CONTENT * filter_PP[:num]
    patch_embed.weight[width - 3] = -patch_embed.weight[:num].sum(dim=0)
    query_embed.weight.copy_(torch.eye(width))
    query_embed.bias[-2:] = torch.tensor([_CONSTANT, -_CONSTANT])
    for layer in encoder:
        _quieten(layer.norm_self, layer.norm_cross, layer.norm_mlp)
        _start_attention(layer, carried=range(0), content=range(width - 3, width))
        for branch in (layer.self_attention.to_out, layer.cross_attention.to_out, _linear(layer.mlp[2])):
            branch.weight.zero_()
    narrow, last = map(_linear, to_latent)
    kept = last.out_features - 1
    narrow.weight[:kept] = torch.eye(kept, width)
    narrow.weight[kept] = 0
    _quieten(norm)
    narrow.weight[kept, -2:] = torch.tensor([0.5, -0.5]) / norm.weight[-1]
    spread = _spread(width, _CONSTANT)
    last.weight.zero_()[:kept, :kept] = (gain_P[:kept] * spread / _CONTENT).diag()
    last.weight[kept, kept] = spread / _CONSTANT  # the constant becomes 1


def start_decoder(
    from_latent: nn.Sequential,
    decoder: QFormer,
    norm: nn.LayerNorm,
    to_pixels: nn.Linear,
    filter_PP: Tensor,
    gain_P: Tensor,
) -> None:
    """Latents -> pixels of the coefficients they hold."""
    width = to_pixels.in_features
    wide, last = map(_linear, from_latent)
    wide.weight[: wide.in_features] = torch.eye(wide.in_features)
    kept = wide.in_features - 1
    last.weight.zero_()[:kept, :kept] = (_SHOWN * _LATENT_NORM / gain_P[:kept]).diag()
    # the pair is the constant of the latent, so the last LayerNorm divides the others by it: a latent has no length
    last.weight[-2:, kept] = _LATENT_NORM * torch.tensor([_SHOWN_CONSTANT, -_SHOWN_CONSTANT])
    last.weight[width - 3] = -last.weight[:kept].sum(dim=0)
    _quieten(norm)
    for layer in decoder:
        _quieten(layer.norm_self, layer.norm_cross, layer.norm_mlp)
        _start_attention(layer, carried=range(kept), content=[*range(kept), *range(width - 3, width)])
        layer.self_attention.to_out.weight.zero_()
        _linear(layer.mlp[2]).weight.zero_()
        layer.cross_attention.to_v.weight.copy_(torch.eye(width))
        layer.cross_attention.to_out.weight.copy_(torch.eye(width) * (_OWN / len(decoder)))
    num = min(width - 3, len(filter_PP))
    scale = _spread(width, (1 + _OWN) * _SHOWN_CONSTANT) / ((1 + _OWN) * _SHOWN)
    to_pixels.weight.zero_()[:, :num] = scale * filter_PP[:num].T


def start_second_tokens(
    second_embed: nn.Linear,
    from_latent: nn.Sequential,
    decoder: QFormer,
    to_pixels: nn.Linear,
    token_pos: Tensor,
    second_pos: Tensor,
    gain_P: Tensor,
) -> None:
    """The second token of a cell holds the coefficients that follow those of the first.

    Its constant is negative, which tells the two apart. In the decoder, head 0 looks at first tokens and head 1 at
    second ones; the last feed-forward adds what head 1 found, if its constant is negative. A block without second
    tokens shows head 1 a first token, and nothing is added. `second_pos`: the rows of `token_pos` of second tokens.
    A decoder of one head, or of very narrow ones, starts without.
    """
    wide, last = map(_linear, from_latent)
    layers = list(decoder)
    width, kept = len(last.weight), wide.in_features - 1
    head_width = width // layers[0].cross_attention.heads
    if width < 2 * head_width or head_width < kept + 2:
        return
    follow = torch.arange(kept, 2 * kept)  # the coefficients of second tokens
    second_embed.weight.zero_()[torch.arange(kept), follow] = gain_P[follow] / gain_P[:kept]
    second_embed.bias[-2:] = torch.tensor([-_CONSTANT, _CONSTANT])

    # head 1 carries a copy of the latent: coefficients at `copy`, the constant at `flag`
    copy, flag = head_width + torch.arange(kept), head_width + kept
    last.weight[copy, torch.arange(kept)] = _SHOWN
    last.weight[flag, kept] = _SHOWN
    last.weight[width - 3] -= last.weight[head_width : flag + 1].sum(dim=0)
    to_pixels.weight[:, head_width : flag + 1] = 0  # the copy itself is not shown
    token_pos[:, kept] = 0  # the slowest wave that is left tells first tokens from second ones
    second_pos[..., kept] = 1
    for layer in layers:
        attention = layer.cross_attention
        for weight in (attention.to_q.weight, attention.to_k.weight):  # head 1 picks one place, as head 0 does
            weight[head_width : 2 * head_width] *= (NEARNESS / _WIDER[1]) ** 0.5
        for channel in (kept, *range(head_width, flag + 1)):
            attention.to_k.weight[:, channel] = attention.to_q.weight[:, channel] = 0
        for head, sign in ((0, -1.0), (1, 1.0), (width // head_width - 1, -1.0)):
            row = (head + 1) * head_width - 1
            attention.to_q.weight[row] = attention.to_k.weight[row] = 0
            attention.to_k.weight[row, kept] = attention.to_q.bias[row] = _FLAG
            attention.to_q.bias[row] *= sign

    _gate(layers[-1], copy, flag, follow, gain_P)


def _gate(layer: QFormerLayer, copy: Tensor, flag: int, follow: Tensor, gain_P: Tensor) -> None:
    """Let a feed-forward add the numbers at `copy` to the coefficients `follow` if the number at `flag` is negative."""
    first, output, kept = _linear(layer.mlp[0]), _linear(layer.mlp[2]), len(copy)
    # of a number in the stream, behind the LayerNorm
    shown = (1 + _OWN) / _spread(first.in_features, (1 + _OWN) * _SHOWN_CONSTANT)
    gate, slope = 3.0 * _LATENT_NORM / (shown * _SHOWN), 1.0 / (shown * _SHOWN)
    for sign, unit in ((1.0, torch.arange(kept)), (-1.0, torch.arange(kept, 2 * kept))):
        first.weight[unit] = 0
        first.weight[unit, flag] = -gate  # GELU(3 + x) - GELU(3 - x) = 2 x, and nothing with -3
        first.weight[unit, copy] = sign * slope
        output.weight[follow, unit] = sign * _SHOWN / gain_P[follow] * (1 + _OWN) / 2


def patch_filters(patch_frames: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """The cosine filters that both ends start from, [P, P], and how loud a latent holds each coefficient, [P]."""
    filter_PP, frequency_P, _ = cosine_filters(patch_frames, patch_size, _COLOUR_RANK)
    gain_P = torch.where(frequency_P == frequency_P.new_tensor(_COLOUR_RANK), _COLOUR_GAIN, _AC_GAIN)
    return filter_PP, torch.where(frequency_P == 0, _DC_GAIN, gain_P)


def _start_attention(layer: QFormerLayer, carried: range, content: Sequence[int]) -> None:
    """Both attentions of a layer look for near places.

    `content`: channels that hold more than a position; `carried`: those of them whose values the layer passes on.

    Heads whose values are coefficients find one place alone. All others see around it: a softmax that picks one key
    passes no gradient to queries and keys, so such a head would look at its own place for good.

    The waves of each axis are dealt out to the heads in turn; no head is left without one of each. Rows that remain
    stay random but faint, because queries and keys that are both 0 would never learn.
    """
    for attention, values in ((layer.self_attention, range(0)), (layer.cross_attention, carried)):
        weight, heads = attention.to_q.weight, attention.heads
        axes = [[wave for wave in axis if not set(wave) & set(content)] for axis in waves_3d(len(weight))]
        head_width = len(weight) // heads
        for head in range(heads):
            waves = [wave for axis in axes for wave in axis[head::heads] or axis[head % max(1, len(axis)) :][:1]]
            channels = [channel for wave in waves for channel in wave][:head_width]
            own = range(head * head_width, (head + 1) * head_width)
            nearness = NEARNESS if set(own) & set(values) else _WIDER[head % len(_WIDER)]
            weight[own] *= _FAINT
            rows = own[: len(channels)]
            weight[rows] = 0
            weight[rows, channels] = nearness**0.5
        weight[:, list(content)] = 0
        attention.to_k.weight.copy_(weight)


def _quieten(*norms: nn.LayerNorm) -> None:
    """Let the constant pair leave a LayerNorm as +1 and -1; as the loudest input, it would make every step a leap."""
    for norm in norms:
        norm.weight[-2:] = (len(norm.weight) / 2) ** -0.5


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module


def _spread(width: int, constant: float) -> float:
    """What a LayerNorm divides by where the constant pair is loudest."""
    return (2 * constant**2 / width) ** 0.5
