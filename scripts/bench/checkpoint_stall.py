"""What checkpoints cost a run: the time that the loop waits for them, as a share of the steps between two.

    python scripts/bench/checkpoint_stall.py [--quick]

The state is that of the mini tokenizer (with --quick the debug one) after one step: weights, average, moments. The
stall of a checkpoint is the CPU time of the loop's thread in copying it to memory plus what is left of the writing
when the next one is due, here nothing: the writing thread gets a whole interval of steps. The ratio is that stall /
(the CPU time of run.checkpoint_every steps at the default of 200); the last line is JSON; exit 1 where it is above
0.05. One step is timed with l1 and the commitment term. `foreground_seconds` is the same for a write that the loop
waits for.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from _report import report

from tokenizer.common.checkpoint import CheckpointStore
from tokenizer.presets import build_tokenizer
from tokenizer.training.optim import OptimConfig
from tokenizer.training.trainer import BackgroundWriter, RunConfig, TrainState, train_step

GOAL = 0.05
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of a run's time that waits for checkpoints.")
    parser.add_argument("--quick", action="store_true", help="the debug tokenizer, not the mini one")
    preset = "VQ_debug" if parser.parse_args().quick else "VQ_mini"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run, optim = RunConfig(device="cpu"), OptimConfig()
    model = build_tokenizer(preset)
    state = TrainState.start(model, run, optim)
    video_BCTHW = torch.rand(run.batch_size, 3, model.config.num_frames, model.config.size, model.config.size)
    length_BN = model.space.lengths_of(model.space.draw_rows(run.batch_size, torch.Generator().manual_seed(0)))

    def loss(batch: torch.Tensor, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = model(batch, length_BN)
        return (output.video_BCTHW - batch).abs().mean() + output.quantized.terms["commitment"], {}

    steps, stalls, whole = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder))
        for _ in range(REPEATS):
            start = time.thread_time()
            train_step(run, optim, state, video_BCTHW, loss)
            steps.append(time.thread_time() - start)
            writer = BackgroundWriter(store)
            start = time.thread_time()
            state.save(writer, {})
            stalls.append(time.thread_time() - start)
            writer.join()
            start = time.thread_time()
            state.save(store, {})
            whole.append(time.thread_time() - start)
    interval = run.checkpoint_every * min(steps)
    report(
        f"checkpoint stall of {preset} at the default interval",
        ratio=min(stalls) / interval,
        goal=GOAL,
        holds=min(stalls) / interval <= GOAL,
        stall_seconds=round(min(stalls), 4),
        foreground_seconds=round(min(whole), 4),
        step_seconds=round(min(steps), 4),
        interval=run.checkpoint_every,
        clock="CPU time of the thread",
    )


if __name__ == "__main__":
    main()
