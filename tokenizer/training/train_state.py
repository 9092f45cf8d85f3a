"""Settings of a run, and everything it must remember: networks, optimisers, averaged weights, step, skipped updates.

A `Trainable` is what one optimiser trains: the model with the head of its alignment loss, or the discriminator.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenizer.common import distributed
from tokenizer.common.checkpoint import Checkpoint, CheckpointStore, load_strict
from tokenizer.common.device import compile_layers, float32_mode, pick_device, pick_dtype
from tokenizer.common.errors import UserError
from tokenizer.training.optim import (
    Ema,
    OptimConfig,
    Rewarm,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)

# what may change between two starts of one run: none of it changes what a step computes (steps: the user's choice)
FREE_TO_CHANGE = {
    f"run.{name}"
    for name in (
        *("dir", "steps", "device", "compile", "num_workers", "num_threads", "keep_last", "keep_every", "accumulate"),
        *("log_every", "validate_every", "checkpoint_every", "max_skipped", "trackers", "reference", "rewarm"),
        "allow_changes",
    )
} | {"val_clips", "samples"}
NEVER_TO_CHANGE = ("model", "tokens")  # sections: the weights, and the ids that they have learned
TRACKERS = ("tensorboard", "wandb")
SKIP_WINDOW = 100  # updates of a network, see max_skipped


@dataclass
class RunConfig:
    """How long a run lasts, where it is stored, how often it logs."""

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
    max_skipped: int = 0  # of the last 100 updates of a network, how many may be skipped as not finite; 0 stops at once
    rewarm: int = 0  # steps over which the learning rate moves to a new schedule if run.steps was changed on a resume
    allow_changes: bool = False  # go on in a run folder with other settings than those it was begun with
    overfit_one_batch: bool = False  # train on the first batch again and again: can the model learn at all?
    trackers: list[str] = field(default_factory=list)  # tensorboard | wandb, beside metrics.jsonl; none by default
    reference: str = ""  # a metrics.jsonl to compare with while training: a warning if this run drifts from it

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every", "validate_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"run.{name}={getattr(self, name)}: must be at least 1")
        for name in ("steps", "num_workers", "keep_every", "max_skipped", "rewarm"):
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


class _Gate(nn.Module):
    """Holds the weights for DistributedDataParallel and returns a finished loss unchanged.

    DDP hooks the weights, not the forward: gradients of a loss that was computed with the bare modules, in any number
    of calls, are averaged over the processes if the loss passes the gate before `backward`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class Trainable:
    """A module with its optimiser, its gradient scaler (fp16) and its DDP wrapper."""

    def __init__(
        self, name: str, module: nn.Module, optim: OptimConfig, run: RunConfig, device: torch.device, every: int = 1
    ) -> None:
        """name: "model" or "discriminator". every: steps from one update to the next."""
        self.name, self.module, self.optim, self.every = name, module.to(device), optim, every
        if run.compile:
            compile_layers(module, device, "run.compile=true", "train without it")
        self.optimizer = build_optimizer(module, optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        self.skipped = 0  # updates that were not made because a number was not finite
        self.skipped_at: list[int] = []  # the steps of those among the last SKIP_WINDOW updates
        self.overflows = 0  # updates that the gradient scaler left out (fp16)
        saved = module.state_dict().keys()  # without constants, e.g. tables of positions
        self.buffers = [buffer for name, buffer in module.named_buffers() if name in saved]
        self._gate: nn.Module = _Gate(module)
        if distributed.num_ranks() > 1:  # this also makes all weights those of rank 0
            # each process names its own GPU: SLURM may show it one alone, or all of the machine
            ids = [device.index] if device.type == "cuda" else None
            # buffers are copied after the update: a broadcast in forward would change what `backward` still needs
            with warnings.catch_warnings():  # its new name, forward_sync_buffers, is not in every torch that we support
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
                self._gate = DistributedDataParallel(self._gate, device_ids=ids, broadcast_buffers=False)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`; they are averaged over the processes with the `last` part of a batch."""
        gate = self._gate
        with gate.no_sync() if isinstance(gate, DistributedDataParallel) and not last else nullcontext():
            self.scaler.scale(gate(loss)).backward()

    def counts(self) -> dict[str, Any]:
        """The scaler's numbers and the skipped updates, for a checkpoint."""
        skips = {"skipped": self.skipped, "skipped_at": self.skipped_at, "overflows": self.overflows}
        return {"scaler": self.scaler.state_dict(), **skips}

    def load(self, moments: Mapping[str, Tensor], counts: Mapping[str, Any], origin: str) -> None:
        """Take up the optimiser's tensors and `counts`."""
        load_optimizer_tensors(self.optimizer, self.module, moments, origin)
        if counts.get("scaler"):
            self.scaler.load_state_dict(dict(counts["scaler"]))
        self.skipped, self.skipped_at = counts.get("skipped", 0), list(counts.get("skipped_at", []))
        self.overflows = counts.get("overflows", 0)


@dataclass
class TrainState:
    """All that a run must remember. `step` counts finished steps, including those whose updates were skipped."""

    model: nn.Module
    ema: Ema
    main: Trainable  # the model, and the head if there is one
    step: int = 0
    kind: str = "model"  # what the weights are (tokenizer, router, ..), for the cards of the files
    head: nn.Module | None = None
    discriminator: Trainable | None = None
    rewarm: Rewarm | None = None  # after a change of run.steps; in the run folder's schedule.json, see follow_schedule
    unlogged: dict[str, Any] = field(default_factory=dict)  # the discriminator's last figures, until a line has them
    late: bool = False  # whether a step's verdict is read in the next one: on a GPU, but for fp16
    unsettled: Mapping[str, Any] | None = None  # then, the values of the last step, until they are read

    @classmethod
    def start(
        cls,
        model: nn.Module,
        run: RunConfig,
        optim: OptimConfig,
        kind: str = "model",
        head: nn.Module | None = None,
        discriminator: Trainable | None = None,
    ) -> TrainState:
        """The state before the first update, with everything on the run's device and equal on all processes.

        head: modules that the model's optimiser trains too, but that are not part of `final/`.
        """
        device = pick_device(run.device)
        trained = model if head is None else nn.ModuleDict({"model": model, "head": head})
        main = Trainable("model", trained, optim, run, device)
        state = cls(model, Ema(model, run.ema_decay), main, 0, kind, head, discriminator)
        state.late = device.type == "cuda" and run.precision != "fp16"
        return state

    @property
    def device(self) -> torch.device:
        """Where the model is; loss functions put their batches there."""
        return next(self.model.parameters()).device

    @property
    def period(self) -> int:
        """Steps after which the same kinds of step come again."""
        return 1 if self.discriminator is None else self.discriminator.every

    @property
    def trainables(self) -> list[Trainable]:
        """The model's, then the discriminator's if there is one."""
        return [self.main] if self.discriminator is None else [self.main, self.discriminator]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.main.optimizer

    def settle(self) -> None:
        """Read what the last step found, if nobody has: before a look at the averaged weights or at what was skipped.

        Raises as `tokenizer.training.train_step.commit` does.
        """
        if self.unsettled is not None:
            len(self.unsettled)

    def train_mode(self, on: bool) -> None:
        """Training mode for everything, or evaluation mode."""
        for trainable in self.trainables:
            trainable.module.train(on)

    @property
    def card(self) -> dict[str, str]:
        """What every weights file of this run tells of itself."""
        return {"kind": self.kind, "float32": float32_mode()}

    def snapshot(self, config: Mapping[str, Any]) -> Checkpoint:
        """Everything, for a checkpoint; the tensors are those of the run, not copies."""
        groups = {
            "model": self.model.state_dict(),
            "ema": self.ema.tensors(),
            "optimizer": optimizer_tensors(self.main.optimizer, self.main.module),
        }
        if self.head is not None:
            groups["head"] = self.head.state_dict()
        if self.discriminator is not None:
            groups["discriminator"] = self.discriminator.module.state_dict()
            moments = optimizer_tensors(self.discriminator.optimizer, self.discriminator.module)
            groups["discriminator_optimizer"] = moments
        state: dict[str, Any] = {"card": self.card, "unlogged": dict(self.unlogged)}
        state |= {trainable.name: trainable.counts() for trainable in self.trainables}
        return Checkpoint(self.step, groups, state, config)

    def load(self, store: CheckpointStore) -> bool:
        """Take up the newest good checkpoint, on all processes the one that rank 0 finds; False if there is none."""
        folder: Path | None = distributed.from_main(store.newest_good() if distributed.is_main() else None)
        if folder is None:
            return False
        saved = store.read(folder) if distributed.is_main() else None  # once, not once a process
        facts: Any = distributed.from_main((saved.step, list(saved.groups), saved.state) if saved else None)
        step, kinds, state = facts
        groups = {name: distributed.tensors_from_main(saved.groups[name] if saved else {}) for name in kinds}
        beside = {"head": self.head, "discriminator": self.discriminator}
        for name in ("model", "ema", "optimizer", *(name for name, there in beside.items() if there is not None)):
            if name not in groups:
                raise UserError(f"{folder}: holds no {name}; use the config it came with, or choose run.dir=OTHER")
        load_strict(self.model, groups["model"], f"{store.folder} (model)")
        self.ema.load(groups["ema"], f"{store.folder} (ema)")
        if self.head is not None:
            load_strict(self.head, groups["head"], f"{store.folder} (head)")
        if self.discriminator is not None:
            load_strict(self.discriminator.module, groups["discriminator"], f"{store.folder} (discriminator)")
        for trainable, name in zip(self.trainables, ("optimizer", "discriminator_optimizer"), strict=False):
            trainable.load(groups.get(name, {}), state.get(trainable.name, {}), f"{store.folder} ({name})")
        self.step, self.unlogged = step, state.get("unlogged", {})
        return True
