"""Packed against padded: forward and backward on clips of random assignments.

    python scripts/bench/packed.py [--quick] [--only encoder,gpt]

encoder  the S-B encoder on 8 clips
gpt      a GPT training step at GPT-B's width, 2 layers, 8 clips

Both sides run the same layers with the same weights. The padded side gives every clip the largest assignment as a plain
batch without a mask; real padding would have to be masked, so this favours it. One thread, CPU time, the two sides
interleaved, minimum of 3. The ratio is speed-up / FLOP ratio: at 1 every token saved is time saved. Goal: 0.9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from _bench import Part, run_parts, thread_seconds
from torch import Tensor

from autoregressive.model import GPT, GPTConfig
from autoregressive.presets import PRESETS as GPT_PRESETS
from autoregressive.sequence import ClipCodes, PackedSequences, pack_sequences
from autoregressive.train import cross_entropy, read
from tokenizer.assignment import Packing, pack
from tokenizer.model import TokenizerConfig, TransformerConfig
from tokenizer.presets import PRESETS, build_tokenizer

GOAL, REPEATS = 0.9, 3
Side = TypeVar("Side")


def main() -> None:
    run_parts("packed against padded", "Forward and backward: packed against padded.", {"encoder": encoder, "gpt": gpt})


def encoder(quick: bool) -> Part:
    layers, num_clips = (1, 4) if quick else (6, 8)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    paper = PRESETS["VQ_SB"]
    model = build_tokenizer(  # decoder and codebook are unused
        paper, encoder=TransformerConfig(layers, 512, 8), decoder=TransformerConfig(1, 8, 1), codebook_size=1
    )
    row_B = model.space.draw_rows(num_clips, torch.Generator().manual_seed(0))
    sides = {
        "packed": pack(model.space.lengths_of(row_B)),
        "padded": pack(torch.full((num_clips, paper.num_blocks), paper.levels[-1])),
    }
    video_BCTHW = torch.rand(num_clips, 3, paper.num_frames, paper.size, paper.size)

    def step(packing: Packing) -> None:
        model.zero_grad()
        model.encode_latents(video_BCTHW, packing).square().mean().backward()

    flops = {name: encoder_flops(model.config, packing) for name, packing in sides.items()}
    tokens = sides["packed"].num_tokens / num_clips
    return _compared(step, sides, flops, tokens_per_clip=tokens, num_clips=num_clips, layers=layers)


def gpt(quick: bool) -> Part:
    layers, num_clips = (1, 4) if quick else (2, 8)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = replace(GPT_PRESETS["GPT-B"], layers=layers, dropout=0.0)
    model, space = GPT(config), config.layout.space
    rows = space.draw_rows(num_clips, torch.Generator().manual_seed(0))
    longest = [[config.levels[-1]] * config.num_blocks] * num_clips
    lengths = {"packed": space.lengths_of(rows).tolist(), "padded": longest}
    sides = {name: pack_sequences(config.layout, random_sequences(config, some)) for name, some in lengths.items()}

    def step(batch: PackedSequences) -> None:
        model.zero_grad()
        cross_entropy(*read(model, batch)).sum().backward()

    flops = {name: gpt_flops(config, batch) for name, batch in sides.items()}
    ids = len(sides["packed"].id_L) / num_clips
    return _compared(step, sides, flops, ids_per_clip=ids, num_clips=num_clips, layers=layers)


def _compared(step: Callable[[Side], None], sides: Mapping[str, Side], flops: dict[str, int], **facts: Any) -> Part:
    step(sides["packed"])  # the first call pays for allocations
    runs = [{name: thread_seconds(step, side) for name, side in sides.items()} for _ in range(REPEATS)]
    seconds = {name: min(run[name] for run in runs) for name in sides}
    speed_up, flop_ratio = (x["padded"] / x["packed"] for x in (seconds, flops))
    facts |= {
        "speed_up": round(speed_up, 3),
        "flop_ratio": round(flop_ratio, 3),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "gflop_per_second": {name: round(3 * flops[name] / seconds[name] / 1e9, 1) for name in sides},
    }
    return Part(speed_up / flop_ratio, GOAL, facts=facts)


def random_sequences(config: GPTConfig, lengths_of_clips: list[list[int]]) -> list[Tensor]:
    """Random codes and classes with these lengths, one sequence of ids for each clip."""
    clips = [
        ClipCodes(torch.randint(config.codebook_size, (sum(lengths),)), tuple(lengths), number % config.num_classes)
        for number, lengths in enumerate(lengths_of_clips)
    ]
    return [config.layout.encode(clip) for clip in clips]


def encoder_flops(config: TokenizerConfig, packing: Packing) -> int:
    """Multiplications and additions of one forward through the encoder; a backward is twice that on both sides."""
    width, cells = config.encoder.width, config.block_patches
    matrices = 6 + 2 * config.mlp_ratio  # self: q k v out; cross: q out; and the two of the feed-forward
    per_layer = 2 * matrices * width**2 * packing.num_tokens
    per_layer += 2 * 2 * width**2 * packing.num_clips * packing.num_blocks * cells  # cross: k v of the patches
    for lengths, ends in zip(packing.lengths, packing.block_ends, strict=True):
        for t, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            per_layer += 2 * 2 * width * length * (end + (t + 1) * cells)  # scores and mixing, self and cross
    embedding = 2 * config.patch_width * width * packing.num_clips * packing.num_blocks * cells
    ends_of_it = 2 * width * (width + config.bottleneck_width) * packing.num_tokens  # query_embed, first of to_latent
    return int(per_layer * config.encoder.layers + embedding + ends_of_it)


def gpt_flops(config: GPTConfig, batch: PackedSequences) -> int:
    """Multiplications and additions of one forward; a backward is twice that on both sides."""
    width = config.width
    matrices = config.layers * (4 * width**2 + 3 * width * config.hidden_width) + width * config.layout.num_ids
    attention = config.layers * sum(2 * width * length**2 // 2 for length in batch.lengths)  # causal: half of it
    return 2 * (matrices * len(batch.id_L) + attention)


if __name__ == "__main__":
    main()
