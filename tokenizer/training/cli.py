"""Command line and default results folder of the stages, and --dry-run of a training."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tokenizer.common import distributed
from tokenizer.common.cli import training_parser, work_parser
from tokenizer.common.config import load_config
from tokenizer.common.device import FlopCount, gemm_roof, peak_memory, pick_dtype, slow_precision
from tokenizer.common.errors import UserError
from tokenizer.common.work_units import check_locks
from tokenizer.training.train_state import RunConfig, TrainState
from tokenizer.training.train_step import StepFn, Values
from tokenizer.training.trainer import num_clips

T = TypeVar("T")


def parse_training_arguments(schema: type[T], stage: str, description: str) -> tuple[T, bool]:
    """`CONFIG.yaml [key.sub=value ...] [flags]` -> the config with `run.dir` filled in, and whether to rehearse.

    The default results folder is results/<stage>/<file name of the config without .yaml>.
    """
    parser = training_parser(description)
    args = parser.parse_intermixed_args()  # flags may come before, between or after the settings
    overrides = list(args.overrides)
    if args.global_batch_size is not None:
        overrides.append(f"run.batch_size={args.global_batch_size}")
    if args.overfit_one_batch:
        overrides.append("run.overfit_one_batch=true")
    config: Any = load_config(schema, args.config, overrides)
    if args.global_batch_size is not None and (ids := vars(config).get("batch_ids")):
        raise UserError(f"--global-batch-size: {args.config} cuts its steps by batch_ids={ids}; change that")
    config.run.dir = config.run.dir or f"results/{stage}/{args.config.name.removesuffix('.yaml')}"
    if args.overfit_one_batch:
        config.run.dir = f"{config.run.dir.rstrip('/')}-overfit"
    return config, args.dry_run


def parse_work_arguments(schema: type[T], stage: str, description: str) -> tuple[T, bool]:
    """The same for a stage whose work any number of processes share (2 and 5a): the config with `dir` filled in."""
    args = work_parser(description).parse_intermixed_args()
    config: Any = load_config(schema, args.config, args.overrides)
    config.dir = config.dir or f"results/{stage}/{args.config.name.removesuffix('.yaml')}"
    if args.dry_run and (no_locks := check_locks(Path(config.dir))):
        raise UserError(no_locks)
    return config, args.dry_run


def rehearse(
    run: RunConfig,
    state: TrainState,
    batches: Callable[[int], Iterator[Any]],
    step_fn: StepFn,
    parts: dict[str, int],
) -> None:
    """Run a few steps without a results folder; print parameters, memory, loss terms, hours, and missing parts.

    Two rounds of each kind of step: the first pays for allocations and its operations are counted, the second is timed.
    """
    source, flops = batches(0), 0.0
    state.train_mode(True)
    for batch in itertools.islice(source, state.period):
        with FlopCount() as count:
            step_fn(batch)
        flops += count.total / state.period
    for batch in itertools.islice(source, 2 if run.compile else 0):  # the first that are not counted compile
        step_fn(batch)
    values: Values = {}
    start = time.perf_counter()
    for batch in itertools.islice(source, state.period):
        values |= step_fn(batch)
    seconds = (time.perf_counter() - start) / state.period
    if not distributed.is_main():
        return
    total = sum(parts.values())
    by_part = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in parts.items())
    beside = {"head": state.head, "discriminator": state.discriminator.module if state.discriminator else None}
    others = {name: sum(p.numel() for p in m.parameters()) for name, m in beside.items() if m is not None}
    weights = (total * 5 + sum(others.values()) * 4) * 4 / 2**30
    print(f"parameters  {total / 1e6:.2f}M: {by_part}")
    for name, number in others.items():
        print(f"            beside the model: {name} {number / 1e6:.2f}M")
    print(f"memory      weights, gradients, Adam and EMA in fp32: {weights:.2f} GiB, plus activations; ", end="")
    print(f"at most {peak_memory(state.device) / 2**30:.2f} GiB in these steps")
    figures = {name: value for name, value in values.items() if isinstance(value, int | float)}
    print("loss        " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    roof = gemm_roof(state.device, pick_dtype(run.precision))
    print(f"speed       {seconds:.2f} s a step of {num_clips(batch, run)} clips on {state.device}", end="")
    print(f" x {distributed.num_ranks()}: {flops / 1e12:.3g} TFLOP, ", end="")
    print(f"{flops / seconds / roof:.0%} of the measured peak of {roof / 1e12:.3g} TFLOP/s")
    print(f"the run     {run.steps} steps, about {run.steps * seconds / 3600:.1f} h at this speed, into {run.dir}")
    if warning := slow_precision(state.device, run.precision):
        print(f"slow        {warning}")
    for line in missing(run, weights) or ["nothing"]:
        print(f"missing     {line}")
    print("dry run: nothing was written")


def missing(run: RunConfig, weights_gib: float) -> list[str]:
    """Everything that would stop this run later: packages, reference curve, locks, disk space, a folder in use."""
    lacks = [f"the package {name} of run.trackers" for name in run.trackers if importlib.util.find_spec(name) is None]
    if run.reference and not Path(run.reference).is_file():
        lacks.append(f"the file run.reference={run.reference}")
    if no_locks := check_locks(Path(run.dir)):
        lacks.append(f"locks: {no_locks}")
    place = Path(run.dir).absolute()
    if (place / "config.yaml").exists():
        lacks.append(
            f"an empty folder: {run.dir} holds a run already, which would be resumed if its config is this one"
        )
    while not place.exists():
        place = place.parent
    free, wanted = shutil.disk_usage(place).free / 2**30, weights_gib * (run.keep_last + 1)
    if free < wanted:
        lacks.append(f"room for checkpoints: {free:.1f} GiB are free at {place}, about {wanted:.1f} are needed")
    return lacks
