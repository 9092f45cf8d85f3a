"""A training step at S-B width on the CPU in fp32, as a fraction of the matrix-product roof of the same run.

    python scripts/bench/train_step.py [--quick]

The step is the loop's own: random assignments, packed, l1 and the quantiser's terms, gradients, clipping, AdamW and
the moving average. The perceptual network is left out: it is a fixed convolution stack, not the model. One thread,
CPU time of the thread, the best of 3 steps; the roof is a 1024 x 1024 product measured beside each step. The ratio is
(arithmetic of the step / its time) / roof; the last line is JSON; exit 1 where it is under 0.65. --quick takes 2 and
2 layers instead of 6 and 12, and 2 clips instead of 4.
"""

from __future__ import annotations

import argparse
import time

import torch
from _report import report

from tokenizer.losses.objective import LossConfig, tokenizer_loss
from tokenizer.model import TransformerConfig
from tokenizer.presets import build_tokenizer
from tokenizer.training.optim import OptimConfig
from tokenizer.training.profiling import FlopCount
from tokenizer.training.trainer import RunConfig, TrainState, train_step

GOAL = 0.65
REPEATS = 3
SIDE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step at S-B width against the matrix-product roof.")
    parser.add_argument("--quick", action="store_true", help="2 + 2 layers and 2 clips, not 6 + 12 and 4")
    quick = parser.parse_args().quick
    layers, num_clips = ((2, 2), 2) if quick else ((6, 12), 4)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run, optim = RunConfig(device="cpu", batch_size=num_clips), OptimConfig()
    encoder, decoder = TransformerConfig(layers[0], 512, 8), TransformerConfig(layers[1], 768, 12)
    model = build_tokenizer("VQ_SB", encoder=encoder, decoder=decoder, codebook_size=1024 if quick else 16384)
    state = TrainState.start(model, run, optim)
    video_BCTHW = torch.rand(num_clips, 3, 16, 128, 128)
    length_BN = model.space.lengths_of(model.space.draw_rows(num_clips, torch.Generator().manual_seed(0)))
    config = LossConfig(perceptual=0.0, perceptual_net="none")

    def loss(batch: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return tokenizer_loss(config, model(batch, length_BN), batch, None, torch.Generator(), {})

    with FlopCount() as count:  # this step also pays for the allocations
        train_step(run, optim, state, video_BCTHW, loss)
    seconds, roofs = [], []
    for _ in range(REPEATS):
        start = time.thread_time()
        train_step(run, optim, state, video_BCTHW, loss)
        seconds.append(time.thread_time() - start)
        roofs.append(_gemm())
    rate, roof = count.total / min(seconds), max(roofs)
    report(
        "train step at S-B width against the GEMM roof, fp32",
        ratio=rate / roof,
        goal=GOAL,
        holds=rate / roof >= GOAL,
        gflop_per_step=round(count.total / 1e9, 1),
        seconds=round(min(seconds), 3),
        tflops=round(rate / 1e12, 4),
        roof_tflops=round(roof / 1e12, 4),
        tokens=int(length_BN.sum()),
        num_clips=num_clips,
        layers=list(layers),
        clock="CPU time of the thread",
    )


def _gemm() -> float:
    """Operations a second of a product of two square matrices: the best of 4."""
    square = torch.rand(SIDE, SIDE)
    best = 0.0
    for _ in range(4):
        start = time.thread_time()
        square @ square
        best = max(best, 2 * SIDE**3 / (time.thread_time() - start))
    return best


if __name__ == "__main__":
    main()
