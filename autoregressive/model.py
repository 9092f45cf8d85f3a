"""The GPT: the class or given frames of a clip in, its tokens out, one after the other (arXiv 2603.12267).

A plain decoder: RMSNorm, SwiGLU, no biases, learned absolute positions, an untied head. Sequences are packed, never
padded, so a clip with fewer tokens is less work in training and in sampling. `block_positions` goes beyond the paper:
in addition to its absolute position, an id gets the place in its block of the code that comes next.

Letters: L packed tokens, W those whose successor is predicted (K of them at a time), R rows of a decoding step, S
slots, D width, V ids of the head, h heads, e head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from autoregressive.attention import FP8, KVCache, Live, attend_causal, bytes_per_slot
from autoregressive.cpu_kernel import linear as few_rows
from autoregressive.sequence import SequenceLayout, block_positions
from tokenizer.common.device import send
from tokenizer.common.errors import UserError
from tokenizer.common.hub import HubModel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(queries, keys, values), each [L, h, e], of one layer -> what each token takes from those before it, [L, h, e]."""

_HIDDEN_MULTIPLE = 256  # of the feed-forward's width; narrower models round up to 64
_ENTRIES = 2**23, 2**25  # of a part of tokens times ids, CPU and GPU; a CPU is slower with fewer


@dataclass
class GPTConfig:
    """Shape of a model and of its sequences. The defaults are GPT-B on UCF-101 with the paper's tokenizer."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    dropout: float = 0.1  # after the embedding, the attention and the feed-forward
    codebook_size: int = 8192
    levels: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512])
    num_blocks: int = 4
    num_classes: int = 101  # 0 for frame prediction
    condition_lengths: list[int] = field(default_factory=list)  # frame prediction: e.g. [512, 128]
    block_positions: bool = False  # also learn positions inside the block; the paper's models do not

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads) < 1 or self.width % self.heads:
            raise UserError(f"width = {self.width} must be a multiple of heads = {self.heads}, layers at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout = {self.dropout}: must lie in [0, 1)")
        self.layout.__post_init__()

    @property
    def layout(self) -> SequenceLayout:
        levels, condition = tuple(self.levels), tuple(self.condition_lengths)
        return SequenceLayout(self.codebook_size, levels, self.num_blocks, self.num_classes, condition)

    @property
    def hidden_width(self) -> int:
        """Of the SwiGLU: 8/3 of the width, rounded up to 256 (to 64 in models narrower than 256)."""
        multiple = _HIDDEN_MULTIPLE if self.width >= _HIDDEN_MULTIPLE else 64
        return -(-8 * self.width // (3 * multiple)) * multiple


class Block(nn.Module):
    """Attention, then SwiGLU, each on a normalised copy of the stream."""

    compiles = True  # see compile_layers

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden_width
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.feed_norm = nn.RMSNorm(width, eps=1e-5)
        self.to_hidden = nn.Linear(width, 2 * hidden, bias=False)  # gate and value
        self.from_hidden = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_LD: Tensor, attention: _Attention) -> Tensor:
        """[L, D] -> [L, D]"""
        # on a CPU, products of few rows are read from memory at full speed (cpu_kernel.py)
        qkv = few_rows(self.to_qkv, self.attention_norm(x_LD))
        q, k, v = rearrange(qkv, "L (three h e) -> three L h e", three=3, h=self.heads)
        mixed_Lhe = attention(q, k, v)
        mixed_LD = rearrange(mixed_Lhe, "L h e -> L (h e)")
        x_LD = x_LD + self.dropout(few_rows(self.to_out, mixed_LD))
        gate, value = few_rows(self.to_hidden, self.feed_norm(x_LD)).chunk(2, dim=-1)
        return x_LD + self.dropout(few_rows(self.from_hidden, F.silu(gate) * value))


class _Attention:
    """An attention call for one batch, made outside of the compiled code because it depends on the batch's lengths."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend  # torch.compile does not look into it, so it does not compile anew for other lengths

    @torch.compiler.disable
    def __call__(self, q_Lhe: Tensor, k_Lhe: Tensor, v_Lhe: Tensor) -> Tensor:
        return self.attend(q_Lhe, k_Lhe, v_Lhe)


class GPT(HubModel, nn.Module):
    """Ids of packed sequences -> logits of the id that follows each."""

    kind, config_class, config_key = "GPT", GPTConfig, "condition_lengths"

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.layout = config, config.layout
        self.embedding = nn.Embedding(self.layout.num_input_ids, config.width)
        self.positions = nn.Parameter(torch.empty(self.layout.max_length, config.width))
        self.block_positions: nn.Parameter | None = None
        if config.block_positions:
            self.block_positions = nn.Parameter(torch.empty(self.layout.num_block_positions, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, self.layout.num_ids, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self._kept_head: tuple[object, Tensor] | None = None  # see padded_head
        if self.positions.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """How every weight begins.

        linear                 N(0, 1 / inputs): as large out as in, however wide the model
        embedding, positions   N(0, 0.02^2)
        head                   0, so that training starts from equal probabilities: loss = ln V
        gains of the norms     1
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        if self.block_positions is not None:
            nn.init.normal_(self.block_positions, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, id_L: Tensor, lengths: Sequence[int], given: int = 0) -> Tensor:
        """Packed sequences of `lengths` ids each, int64 [L] -> logits [W, V]; each sees its own past only.

        W is L without the first `given` ids of each sequence: what follows them is not predicted.
        """
        return self._logits(self._features(id_L, lengths, given))

    def loss(self, id_L: Tensor, lengths: Sequence[int], target_W: Tensor, given: int = 0) -> tuple[Tensor, Tensor]:
        """The cross-entropy of `forward`'s logits, summed, with gradients, and of each id, [W], without."""
        return linear_cross_entropy(self._features(id_L, lengths, given), self.head.weight, target_W)

    def _features(self, id_L: Tensor, lengths: Sequence[int], given: int) -> Tensor:
        """What the head reads, [W, D]."""
        position_L = send(torch.cat([torch.arange(length) for length in lengths]), id_L.device)
        attend = partial(attend_causal, lengths=lengths)
        x_LD = self._embed(id_L, position_L, self._inner(id_L, position_L))
        x_LD = self._hidden(x_LD, lambda layer: attend)
        # slices: an index's backward adds with atomics, or sorts
        return torch.cat([x_QD[given:] for x_QD in x_LD.split(list(lengths))]) if given else x_LD

    def step(
        self, id_R: Tensor, position_S: Tensor, live: Live, cache: KVCache, inner_S: Tensor | None = None
    ) -> Tensor:
        """The next id of every row, at its slot's position -> logits [R, V]. `live`: which keys are read.

        `inner_S`: the place in its block of the id that follows (`BlockPositions`), for models that learn it.
        """
        streams = len(id_R) // len(position_S)
        inner_R = None if inner_S is None else inner_S.repeat_interleave(streams)
        attend = partial(cache.step, position_S=position_S, live=live)
        x_RD = self._embed(id_R, position_S.repeat_interleave(streams), inner_R)
        return self._logits(self._hidden(x_RD, lambda layer: partial(attend, layer)))

    def prefill(self, id_Q: Tensor, slot: int, cache: KVCache) -> None:
        """Take the first ids of a sequence into a slot of the cache, all in one pass."""

        def attend(layer: int, q_Qhe: Tensor, k_Qhe: Tensor, v_Qhe: Tensor) -> Tensor:
            cache.fill(layer, slot, k_Qhe, v_Qhe)
            return attend_causal(q_Qhe, k_Qhe, v_Qhe, (len(id_Q),))

        position_Q = torch.arange(len(id_Q), device=id_Q.device)
        x_QD = self._embed(id_Q, position_Q, self._inner(id_Q, position_Q))
        self._hidden(x_QD, lambda layer: partial(attend, layer))

    def new_cache(self, slots: int, streams: int, places: int | None = None, fp8: bool = False) -> KVCache:
        """Room for sequences of `places` ids (default: of any length), in the precision of the weights or in 8 bits."""
        c, weight = self.config, self.head.weight
        places = places or self.layout.max_length
        dtype = FP8 if fp8 else weight.dtype
        return KVCache(c.layers, c.heads, c.width // c.heads, slots, streams, places, dtype, weight.device)

    def cache_bytes_per_slot(self, streams: int, places: int | None = None, fp8: bool = False) -> int:
        """What one slot of `new_cache` takes."""
        places, dtype = places or self.layout.max_length, FP8 if fp8 else self.head.weight.dtype
        return bytes_per_slot(self.config.layers, self.config.width, streams, places, dtype)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def _logits(self, x_LD: Tensor) -> Tensor:
        """[L, D] -> [L, V].

        Matrix units of a GPU want rows by eights: 8197 ids ran at 91 TFLOP/s on an H200, the other products at 600.
        """
        if not x_LD.is_cuda or self.layout.num_ids % 8 == 0:
            return few_rows(self.head, x_LD)
        return F.linear(x_LD, self.padded_head())[:, : self.layout.num_ids]

    def padded_head(self) -> Tensor:
        """The head's weights with rows of 0 up to a multiple of 8, [V + ., D].

        Without gradients the copy (21 MB at GPT-LP) is kept until the weights change; with them it is made anew.
        """
        weight_VD = self.head.weight
        pad = (0, 0, 0, -len(weight_VD) % 8)
        if torch.is_grad_enabled():
            return F.pad(weight_VD, pad)
        state = (weight_VD.data_ptr(), weight_VD._version, weight_VD.dtype)
        if self._kept_head is None or self._kept_head[0] != state:
            self._kept_head = (state, F.pad(weight_VD.detach(), pad))
        return self._kept_head[1]

    def _inner(self, id_L: Tensor, position_L: Tensor) -> Tensor | None:
        """Positions in the blocks, of packed sequences; None if the model does not learn them."""
        return None if self.block_positions is None else block_positions(self.layout, id_L.device).of(id_L, position_L)

    def _embed(self, id_L: Tensor, position_L: Tensor, inner_L: Tensor | None) -> Tensor:
        x_LD = self.embedding(id_L) + self.positions[position_L]  # [L, D]
        if self.block_positions is not None:
            assert inner_L is not None, "this model learns positions in blocks: give inner_S"
            x_LD = x_LD + self.block_positions[inner_L]
        return self.dropout(x_LD)

    def _hidden(self, x_LD: Tensor, attend_of: Callable[[int], Attend]) -> Tensor:
        for layer, block in enumerate(self.blocks):
            x_LD = block(x_LD, _Attention(attend_of(layer)))
        return self.norm(x_LD)


def linear_cross_entropy(x_WD: Tensor, head_VD: Tensor, target_W: Tensor) -> tuple[Tensor, Tensor]:
    """-> sum of all losses, float32, with gradients; loss of each token, float32 [W], without.

    Logits of all tokens at once are the largest tensor of a training: here they exist K tokens at a time. Their
    gradients are those of the sum of all losses but for a factor, so they are computed along with the losses. The
    products run in the precision of autocast, everything else in float32.
    """
    device = x_WD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_WD.dtype
    with torch.autocast(device, enabled=False):
        total, each_W = _LinearCrossEntropy.apply(x_WD, head_VD, target_W, dtype)
    return total, each_W


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_WD: Tensor, head_VD: Tensor, target_W: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        num_ids, on_gpu = len(head_VD), x_WD.is_cuda
        learns = any(ctx.needs_input_grad)
        head_VD = head_VD.to(dtype)
        if on_gpu:  # matrix units want rows by eights
            head_VD = F.pad(head_VD, (0, 0, 0, -num_ids % 8))
        rows = max(1, _ENTRIES[on_gpu] // len(head_VD))
        losses, grads_KD = [], []
        grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if learns else None
        for x_KD, target_K in zip(x_WD.split(rows), target_W.split(rows), strict=True):
            x_KD, target_K1 = x_KD.to(dtype), target_K[:, None]
            logit_KV = (x_KD @ head_VD.T).float()
            logit_KV[:, num_ids:] = -torch.inf
            best_K1, at_K1 = logit_KV.max(dim=1, keepdim=True)
            wanted_K1 = logit_KV.gather(1, target_K1)
            prob_KV = logit_KV.softmax(dim=1)
            # log of the sum = logit - log of the probability, of the likeliest id: no further pass
            losses.append((best_K1 - prob_KV.gather(1, at_K1).log() - wanted_K1)[:, 0])
            if grad_VD is not None:
                slope_KV = prob_KV.scatter_(1, target_K1, prob_KV.gather(1, target_K1) - 1).to(dtype)
                grads_KD.append(slope_KV @ head_VD)
                if dtype == torch.float32:
                    grad_VD.addmm_(slope_KV.T, x_KD)
                else:  # added up in float32
                    grad_VD += slope_KV.T @ x_KD
        each_W = torch.cat(losses)
        if grad_VD is not None:
            ctx.save_for_backward(torch.cat(grads_KD), grad_VD[:num_ids])
        ctx.mark_non_differentiable(each_W)
        return each_W.sum(), each_W

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_WD, grad_VD = ctx.saved_tensors
        return grad_WD * grad.to(grad_WD.dtype), grad_VD * grad, None, None
