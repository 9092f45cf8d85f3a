"""The first minutes of a tokenizer's training recipe as a curve, for `gpu.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tokenizer.common.config import load_config
from tokenizer.data.clip_store import open_store
from tokenizer.train import TokenizerTrainConfig, TokenizerTraining

ROOT = Path(__file__).parents[2]
HELD_OUT, PROBED_STEPS, VALIDATIONS = 48, 8, 8
Row = dict[str, float]
"""step, seconds since the start, and whatever the step or a validation before it gave."""


def start_recipe(config: str, clips: str | None, *overrides: str) -> tuple[TokenizerTraining, Iterator[Any]]:
    """A recipe on a packed file of clips, or on bundled ones, with the patch discriminator and without alignment.

    The last 48 clips of the file are held out. -> the training and its batches.
    """
    train, held_out = ["bundled:train"], ["bundled:heldout"]
    if clips:
        last = len(open_store(clips)) - HELD_OUT
        train, held_out = [f"{clips}:0-{last}"], [f"{clips}:{last}-{last + HELD_OUT}"]
    changes = [
        "run.steps=400", f"data.sources={train}", f"val_data.sources={held_out}", f"val_clips={HELD_OUT}",
        "optim.warmup_steps=50", "loss.align=0", "loss.gan=0.3", "discriminator.net=patch",
    ]  # fmt: skip
    training = TokenizerTraining(load_config(TokenizerTrainConfig, str(ROOT / config), [*changes, *overrides]))
    training.state.train_mode(True)
    return training, training.batches(0)


def train_for(training: TokenizerTraining, source: Iterator[Any], seconds: float) -> list[Row]:
    """Train for a time; a few steps are timed, and the schedule then ends when the time does. -> the curve."""
    rows: list[Row] = []
    begin = timed_from = due = time.monotonic()
    ends = begin + seconds
    while (now := time.monotonic()) < ends or training.state.step <= PROBED_STEPS:
        step = training.state.step
        if step == PROBED_STEPS // 2:
            timed_from = now  # kernels are compiled by now
        if step == PROBED_STEPS:
            a_step = (now - timed_from) / (step - PROBED_STEPS // 2)
            training.config.run.steps = step + max(1, int(0.95 * (ends - now) / a_step))  # the rest validates
        rows.append(_step(training, next(source), now - begin, validates=now >= due))
        due += seconds / VALIDATIONS if now >= due else 0
    rows.append(_step(training, next(source), time.monotonic() - begin, validates=True))
    return rows


def _step(training: TokenizerTraining, batch: Any, seconds: float, validates: bool) -> Row:
    """One step of the recipe, and before it a validation of the raw weights."""
    values: dict[str, Any] = {}
    if validates:
        training.state.train_mode(False)
        with torch.no_grad():
            values |= training.validate(training.state.step)
        training.state.train_mode(True)
    row = {"step": float(training.state.step), "seconds": round(seconds, 2)}
    values |= training.train_step(batch)
    return row | {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
