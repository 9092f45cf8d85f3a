"""What every training entry shares: its command line, the default results folder, and the rehearsal (`--dry-run`)."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tokenizer.common.config import load_config
from tokenizer.common.loop import LossFn, RunConfig, TrainState, train_step
from tokenizer.common.optim import OptimConfig

T = TypeVar("T")


def parse_training_arguments(schema: type[T], stage: str, description: str) -> tuple[T, bool]:
    """`CONFIG.yaml [key.sub=value ...] [--dry-run]` -> the config with `run.dir` filled in, and whether to rehearse.

    The default results folder is results/<stage>/<file name of the config without .yaml>.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=Path, help="YAML of this stage, see configs/README.md")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the YAML")
    parser.add_argument("--dry-run", action="store_true", help="build all, run two steps, say what the run would cost")
    args = parser.parse_intermixed_args()  # so that --dry-run may stand before, between or after the settings
    config: Any = load_config(schema, args.config, args.overrides)
    config.run.dir = config.run.dir or f"results/{stage}/{args.config.name.removesuffix('.yaml')}"
    return config, args.dry_run


def rehearse(
    run: RunConfig,
    optim: OptimConfig,
    state: TrainState,
    batches: Callable[[int], Iterator[Any]],
    loss_fn: LossFn,
    parts: dict[str, int],
) -> None:
    """Two steps without a results folder; prints parameters by part, the loss terms, and hours at this speed."""
    source = batches(0)
    state.train_mode(True)
    train_step(run, optim, state, next(source), loss_fn)  # the first step pays for allocations; time the second
    start = time.perf_counter()
    values = train_step(run, optim, state, next(source), loss_fn)
    seconds = time.perf_counter() - start
    total = sum(parts.values())
    by_part = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in parts.items())
    print(f"parameters  {total / 1e6:.2f}M: {by_part}")
    print(f"memory      weights, gradients, Adam and EMA in fp32: {total * 4 * 5 / 2**30:.2f} GiB, plus activations")
    print("loss        " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    print(f"speed       {seconds:.2f} s a step of {run.batch_size} clips on {state.device}")
    print(f"the run     {run.steps} steps, about {run.steps * seconds / 3600:.1f} h at this speed, into {run.dir}")
    print("dry run: nothing was written")
