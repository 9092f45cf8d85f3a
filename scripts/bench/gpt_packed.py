"""Packed against padded: a training step of the GPT, forward and backward, on clips of random assignments.

    python scripts/bench/gpt_packed.py [--quick]

Both sides run the same weights. The padded one gives every clip the sequence of the largest assignment, 2053 ids, as a
plain causal batch without a mask; that flatters it: real padding would have to be left out of the loss. GPT-B's width
with two of its twelve layers, 8 clips. One thread, CPU time of the thread, the two interleaved, minimum of 3. The ratio
is speed-up / FLOP ratio: 1 means that every id saved is time saved. The last line is JSON; exit 1 where the ratio is
under 0.9. --quick takes one layer and 4 clips.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from _report import report
from torch import Tensor

from autoregressive.model import GPT, GPTConfig
from autoregressive.presets import PRESETS
from autoregressive.sequence import ClipCodes, PackedSequences, pack_sequences
from autoregressive.train import cross_entropy, read

GOAL = 0.9
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step of the GPT: packed against padded.")
    parser.add_argument("--quick", action="store_true", help="1 layer and 4 clips, not 2 and 8")
    layers, num_clips = (1, 4) if parser.parse_args().quick else (2, 8)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = replace(PRESETS["GPT-B"], layers=layers, dropout=0.0)
    model, space = GPT(config), config.layout.space
    rows = space.draw_rows(num_clips, torch.Generator().manual_seed(0))
    variants = {
        "packed": random_batch(config, space.lengths_of(rows).tolist()),
        "padded": random_batch(config, [[config.levels[-1]] * config.num_blocks] * num_clips),
    }
    _seconds(model, variants["packed"])  # the first call pays for allocations
    runs = [{name: _seconds(model, batch) for name, batch in variants.items()} for _ in range(REPEATS)]
    seconds = {name: min(run[name] for run in runs) for name in variants}
    flops = {name: count_flops(config, batch) for name, batch in variants.items()}

    speed_up, flop_ratio = (x["padded"] / x["packed"] for x in (seconds, flops))
    ratio = speed_up / flop_ratio
    report(
        "packed against padded GPT train step",
        ratio=ratio,
        goal=GOAL,
        holds=ratio >= GOAL,
        speed_up=round(speed_up, 3),
        flop_ratio=round(flop_ratio, 3),
        ids_per_clip=len(variants["packed"].id_L) / num_clips,
        num_clips=num_clips,
        layers=layers,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        gflop_per_second={name: round(3 * flops[name] / seconds[name] / 1e9, 1) for name in variants},
    )


def random_batch(config: GPTConfig, lengths_of_clips: list[list[int]]) -> PackedSequences:
    """Random codes, classes and these lengths, as training packs them."""
    return pack_sequences(config.layout, random_sequences(config, lengths_of_clips))


def random_sequences(config: GPTConfig, lengths_of_clips: list[list[int]]) -> list[Tensor]:
    """The same, one by one."""
    clips = [
        ClipCodes(torch.randint(config.codebook_size, (sum(lengths),)), tuple(lengths), number % config.num_classes)
        for number, lengths in enumerate(lengths_of_clips)
    ]
    return [config.layout.encode(clip) for clip in clips]


def _seconds(model: GPT, batch: PackedSequences) -> float:
    model.zero_grad()
    start = time.thread_time()
    cross_entropy(*read(model, batch)).sum().backward()
    return time.thread_time() - start


def count_flops(config: GPTConfig, batch: PackedSequences) -> int:
    """Multiplications and additions of one forward; a backward is twice that on both sides."""
    width = config.width
    matrices = config.layers * (4 * width**2 + 3 * width * config.hidden_width) + width * config.layout.num_ids
    attention = config.layers * sum(2 * width * length**2 // 2 for length in batch.lengths)  # causal: half of it
    return 2 * (matrices * len(batch.id_L) + attention)


if __name__ == "__main__":
    main()
