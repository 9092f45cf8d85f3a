"""How long a training on prepared clips would wait for its data with 2 workers, as a share of the step.

    python scripts/bench/data_wait.py [--quick]

A step of configs/mini/proxy.yaml needs its batch; two workers make batches while the step before is computed. What a
worker spends on a batch (its CPU time, measured here in one process) is divided by two workers; only where that is
more than the step's own CPU time does the loop wait, and beyond that it always pays for the hand-over of the tensors
between processes, which is measured too. The ratio is (wait + hand-over) / step; the last line is JSON; exit 1 where
it is above 0.02. Wall times on a shared machine say nothing, so none is taken; `perf` and `data_wait` in
metrics.jsonl do that for a real run. --quick times 1 step and 2 batches instead of 3 and 6.
"""

from __future__ import annotations

import argparse
import itertools
import pickle
import time

import torch
from _report import report

from tokenizer.common.loop import RunConfig, TrainState, train_step
from tokenizer.common.optim import OptimConfig
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.loader import batches
from tokenizer.presets import build_tokenizer

GOAL = 0.02
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of a step that waits for prepared clips.")
    parser.add_argument("--quick", action="store_true", help="1 step and 2 batches, not 3 and 6")
    num_steps = 1 if parser.parse_args().quick else 3
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run, optim = RunConfig(device="cpu"), OptimConfig()
    model = build_tokenizer("VQ_mini")
    state = TrainState.start(model, run, optim)
    # the bundled clips are small H.264 files, as tokenizer/data/prepare.py makes them
    data = build_dataset(DataConfig(sources=["bundled:train"], size=model.config.size))

    source = batches(data, run.batch_size, 0)
    next(source)
    start = time.process_time()
    loaded = list(itertools.islice(source, 2 * num_steps))
    batch_seconds = (time.process_time() - start) / len(loaded)
    start = time.process_time()
    for batch in loaded:
        pickle.loads(pickle.dumps(batch.video_BCTHW.numpy()))  # dearer than the shared memory that torch uses
    hand_over = (time.process_time() - start) / len(loaded)

    length_BN = model.space.lengths_of(model.space.draw_rows(run.batch_size, torch.Generator().manual_seed(0)))

    def loss(batch: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(batch, length_BN)
        return (output.video_BCTHW - batch).abs().mean() + output.quantized.terms["commitment"], {}

    train_step(run, optim, state, loaded[0].video_BCTHW, loss)
    seconds = []
    for batch in loaded[:num_steps]:
        start = time.process_time()
        train_step(run, optim, state, batch.video_BCTHW, loss)
        seconds.append(time.process_time() - start)
    step = min(seconds)
    wait = max(0.0, batch_seconds / WORKERS - step) + hand_over
    report(
        "data wait of the mini tokenizer with 2 workers",
        ratio=wait / step,
        goal=GOAL,
        holds=wait / step <= GOAL,
        batch_seconds=round(batch_seconds, 4),
        hand_over_seconds=round(hand_over, 5),
        step_seconds=round(step, 4),
        batch_size=run.batch_size,
        clock="CPU time, perceptual loss left out of the step",
    )


if __name__ == "__main__":
    main()
