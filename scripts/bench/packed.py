"""Packed against padded: forward and backward of the S-B encoder on 8 clips of random assignments.

    python scripts/bench/packed.py [--quick]

Both sides run the same layers with the same weights. The padded one gives every block the largest level, 2048 tokens
a clip, so it needs no mask and takes the batched path; that flatters it: real padding would have to be masked out.
One thread, CPU time of the thread, the two interleaved, minimum of 3. The ratio is speed-up / FLOP ratio: 1 means that
every token saved is time saved. The last line is JSON; exit 1 where the ratio is under 0.9. --quick takes one of the
six layers and 4 clips.
"""

from __future__ import annotations

import argparse
import time

import torch
from _report import report
from torch import Tensor

from tokenizer.assignment import Packing, pack
from tokenizer.model import TokenizerConfig, TransformerConfig, VideoTokenizer
from tokenizer.presets import PRESETS, build_tokenizer

GOAL = 0.9
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="Encoder forward and backward: packed against padded.")
    parser.add_argument("--quick", action="store_true", help="1 layer and 4 clips, not 6 and 8")
    layers, num_clips = (1, 4) if parser.parse_args().quick else (6, 8)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    paper = PRESETS["VQ_SB"]
    model = build_tokenizer(  # the decoder and the codebook take no part
        paper, encoder=TransformerConfig(layers, 512, 8), decoder=TransformerConfig(1, 8, 1), codebook_size=1
    )
    row_B = model.space.draw_rows(num_clips, torch.Generator().manual_seed(0))
    variants = {
        "packed": pack(model.space.lengths_of(row_B)),
        "padded": pack(torch.full((num_clips, paper.num_blocks), paper.levels[-1])),
    }
    video_BCTHW = torch.rand(num_clips, 3, paper.num_frames, paper.size, paper.size)
    _seconds(model, video_BCTHW, variants["packed"])  # the first call pays for allocations
    runs = [{name: _seconds(model, video_BCTHW, packing) for name, packing in variants.items()} for _ in range(REPEATS)]
    seconds = {name: min(run[name] for run in runs) for name in variants}
    flops = {name: count_flops(model.config, packing) for name, packing in variants.items()}

    speed_up, flop_ratio = (x["padded"] / x["packed"] for x in (seconds, flops))
    ratio = speed_up / flop_ratio
    report(
        "packed against padded encoder",
        ratio=ratio,
        goal=GOAL,
        holds=ratio >= GOAL,
        speed_up=round(speed_up, 3),
        flop_ratio=round(flop_ratio, 3),
        tokens_per_clip=variants["packed"].num_tokens / num_clips,
        num_clips=num_clips,
        layers=layers,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        gflop_per_second={name: round(3 * flops[name] / seconds[name] / 1e9, 1) for name in variants},
    )


def _seconds(model: VideoTokenizer, video_BCTHW: Tensor, packing: Packing) -> float:
    model.zero_grad()
    start = time.thread_time()
    model.encode_latents(video_BCTHW, packing).square().mean().backward()
    return time.thread_time() - start


def count_flops(config: TokenizerConfig, packing: Packing) -> int:
    """Multiplications and additions of one forward through the encoder; a backward is twice that on both sides."""
    width, cells = config.encoder.width, config.grid**2
    matrices = 6 + 2 * config.mlp_ratio  # self: q k v out; cross: q out; and the two of the feed-forward
    per_layer = 2 * matrices * width**2 * packing.num_tokens
    per_layer += 2 * 2 * width**2 * packing.num_clips * packing.num_blocks * cells  # cross: k v of the patches
    for lengths, ends in zip(packing.lengths, packing.block_ends, strict=True):
        for t, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            per_layer += 2 * 2 * width * length * (end + (t + 1) * cells)  # scores and mixing, self and cross
    embedding = 2 * config.patch_width * width * packing.num_clips * packing.num_blocks * cells
    ends_of_it = 2 * width * (width + config.bottleneck_width) * packing.num_tokens  # query_embed, first of to_latent
    return int(per_layer * config.encoder.layers + embedding + ends_of_it)


if __name__ == "__main__":
    main()
