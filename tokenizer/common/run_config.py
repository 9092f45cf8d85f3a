"""The settings of every run: how long, where, how often it speaks, on how many processes it may be cut."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizer.common.errors import UserError
from tokenizer.common.runtime import pick_dtype

# what may change between two starts of one run: none of it changes what a step computes (steps: the user's choice)
FREE_TO_CHANGE = {
    f"run.{name}"
    for name in (
        *("dir", "steps", "device", "compile", "num_workers", "num_threads", "keep_last", "keep_every", "accumulate"),
        *("log_every", "validate_every", "checkpoint_every", "max_skipped", "trackers", "reference", "allow_changes"),
    )
} | {"val_clips", "samples"}
NEVER_TO_CHANGE = ("model", "tokens")  # sections: the weights, and the ids that they have learned
TRACKERS = ("tensorboard", "wandb")


@dataclass
class RunConfig:
    """How long a run lasts, where it lives and how often it speaks."""

    dir: str = ""  # the results folder; the entry points fill in results/<stage>/<config name>
    steps: int = 1000
    seed: int = 0
    batch_size: int = 8  # GLOBAL: clips of one update, over all processes and accumulated parts together
    accumulate: int = 1  # parts that each process cuts its share into, one after the other: less memory, same update
    log_every: int = 10
    validate_every: int = 500
    checkpoint_every: int = 200
    keep_last: int = 2  # checkpoints kept
    keep_every: int = 0  # checkpoints at multiples of so many steps are kept for good; 0 keeps none
    device: str = "auto"  # auto | cpu | cuda | cuda:N; with several processes each takes the GPU of its local rank
    precision: str = "none"  # none (fp32) | bf16 | fp16
    compile: bool = False  # torch.compile the layers: a minute more at the start, a good deal less for each step
    num_workers: int = 0  # processes that load data, for each training process
    num_threads: int | None = None  # threads of torch; None leaves torch's own choice
    ema_decay: float = 0.9999
    max_skipped: int = 0  # updates in a row that may be skipped because a number is not finite; 0 stops at the first
    allow_changes: bool = False  # go on in a run folder with other settings than those it was begun with
    overfit_one_batch: bool = False  # train on the first batch again and again: can the model learn at all?
    trackers: list[str] = field(default_factory=list)  # tensorboard | wandb, beside metrics.jsonl; none by default
    reference: str = ""  # a metrics.jsonl to compare with while training: a warning where this run drifts from it

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every", "validate_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"run.{name}={getattr(self, name)}: must be at least 1")
        for name in ("steps", "num_workers", "keep_every", "max_skipped"):
            if getattr(self, name) < 0:
                raise UserError(f"run.{name}={getattr(self, name)}: must be at least 0")
        if (self.num_threads or 1) < 1:
            raise UserError(f"run.num_threads={self.num_threads}: must be at least 1, or null for torch's own choice")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"run.ema_decay={self.ema_decay}: must lie in [0, 1)")
        for name in self.trackers:
            if name not in TRACKERS:
                raise UserError(f"run.trackers={self.trackers}: choose from {', '.join(TRACKERS)}")
        pick_dtype(self.precision)
