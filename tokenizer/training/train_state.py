"""All that a run must remember: the players with their optimisers, the averaged weights, the step, the skipped steps.

A player is what one optimiser trains. The first is the learner: the model and, where a loss needs one, a companion
beside it (say the head of an alignment loss). The second, where the loss is a game, is the adversary.

The settings of every run: how long, where, how often it speaks, on how many processes it may be cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from tokenizer.common import distributed
from tokenizer.common.checkpoint import CheckpointStore, load_strict
from tokenizer.common.compiled import compile_layers
from tokenizer.common.device import pick_device, pick_dtype
from tokenizer.common.errors import UserError
from tokenizer.training.optim import Ema, OptimConfig, build_optimizer, load_optimizer_tensors, optimizer_tensors

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


class Adversary(Protocol):
    """The second player of an adversarial loss: what it trains, how, and what it minimises."""

    module: nn.Module
    optim: OptimConfig
    period: int  # its turns come again after so many steps

    def loss(self, batch: Any, step: int) -> tuple[Any, Mapping[str, Tensor | float]] | None:
        """As a stage's own loss function; None: it rests this step, which depends on `step` alone.

        It is called for each part of the batch right after the learner's loss of that part and its gradients, so what
        the learner made of the part may be kept (detached) from there. Both players update at the end of the step.
        """


class Saver(Protocol):
    """Where a state can be put: the store itself, or a writer in the background."""

    def save(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> object: ...


class _Gate(nn.Module):
    """Holds a player's weights for DistributedDataParallel and lets a finished loss through.

    DDP hooks the weights, not the forward: a loss that was computed with the bare modules, in as many calls as it
    likes, has its gradients averaged over the processes as long as it passes the gate before `backward`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class Player:
    """One side: its module, its optimiser, its loss scaler, and its gate to the other processes."""

    def __init__(
        self, module: nn.Module, optim: OptimConfig, run: RunConfig, device: torch.device, idle_parts: bool = False
    ) -> None:
        """idle_parts: some weights may take no part in some steps (before a loss term starts, say)."""
        self.module = module
        self.optimizer = build_optimizer(module, optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
        self._gate: nn.Module = _Gate(module)
        self._accelerator: Accelerator | None = None
        if distributed.num_ranks() > 1:
            # buffers are handed out at the end of a step: a broadcast here would change what `backward` still needs
            ddp = DistributedDataParallelKwargs(find_unused_parameters=idle_parts, broadcast_buffers=False)
            self._accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[ddp])
            with warnings.catch_warnings():  # accelerate has no word yet for torch's new name of broadcast_buffers
                warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
                self._gate = self._accelerator.prepare_model(self._gate, device_placement=False)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`; only with the `last` part of a batch are they averaged over the processes."""
        alone = nullcontext() if last or self._accelerator is None else self._accelerator.no_sync(self._gate)
        with alone:
            self.scaler.scale(self._gate(loss)).backward()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the `with`, no gradient reaches this player's weights."""
        thawed = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter in thawed:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in thawed:
                parameter.requires_grad_(True)

    def load(self, tensors: Mapping[str, Tensor], scaler: Mapping[str, Any], origin: str) -> None:
        """Take up the optimiser's tensors and the scaler's numbers."""
        load_optimizer_tensors(self.optimizer, self.module, tensors, origin)
        if scaler:
            self.scaler.load_state_dict(dict(scaler))


@dataclass
class TrainState:
    """All that a run must remember. `step` counts finished steps, the skipped ones among them."""

    model: nn.Module
    ema: Ema
    learner: Player  # trains the model, and the companion where there is one
    step: int = 0
    kind: str = "model"  # what the weights are (tokenizer, router, ..), for the cards of the files
    companion: nn.Module | None = None
    adversary: Adversary | None = None
    opponent: Player | None = None  # trains adversary.module
    skipped: int = 0  # steps without an update because a number was not finite
    skipped_in_a_row: int = 0
    untold: dict[str, Any] = field(default_factory=dict)  # the adversary's last figures, until a log line holds them

    @classmethod
    def start(
        cls,
        model: nn.Module,
        run: RunConfig,
        optim: OptimConfig,
        kind: str = "model",
        adversary: Adversary | None = None,
        companion: nn.Module | None = None,
    ) -> TrainState:
        """The state before the first update, with everything moved to the run's device and equal on all processes.

        companion: modules that the learner's optimiser trains beside the model; they live in the checkpoints' group
        `companion`, not in `final/`. adversary: see `Adversary`; groups `adversary` and `adversary_optimizer`.
        """
        device = pick_device(run.device)
        model = model.to(device)
        if run.compile:
            for module in [model] if adversary is None else [model, adversary.module]:
                compile_layers(module, device, "run.compile=true", "train without it")
        trained = model if companion is None else nn.ModuleDict({"model": model, "companion": companion.to(device)})
        # with several processes this makes all weights those of rank 0
        learner = Player(trained, optim, run, device, idle_parts=companion is not None)
        opponent = None if adversary is None else Player(adversary.module.to(device), adversary.optim, run, device)
        ema = Ema(model, run.ema_decay)
        return cls(model, ema, learner, 0, kind, companion, adversary, opponent)

    @property
    def device(self) -> torch.device:
        """Where the model lives; loss functions put their batches there."""
        return next(self.model.parameters()).device

    @property
    def period(self) -> int:
        """After how many steps the same kinds of step come again."""
        return 1 if self.adversary is None else self.adversary.period

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The learner's."""
        return self.learner.optimizer

    def train_mode(self, on: bool) -> None:
        """Training mode for both players, or evaluation mode."""
        self.learner.module.train(on)
        if self.opponent is not None:
            self.opponent.module.train(on)

    def save(self, store: Saver, config: Mapping[str, Any]) -> None:
        """Write everything, atomically."""
        groups = {
            "model": self.model.state_dict(),
            "ema": self.ema.tensors(),
            "optimizer": optimizer_tensors(self.learner.optimizer, self.learner.module),
        }
        state: dict[str, Any] = {"scaler": self.learner.scaler.state_dict(), "card": {"kind": self.kind}}
        state |= {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "untold": dict(self.untold)}
        if self.companion is not None:
            groups["companion"] = self.companion.state_dict()
        if self.opponent is not None:
            groups["adversary"] = self.opponent.module.state_dict()
            groups["adversary_optimizer"] = optimizer_tensors(self.opponent.optimizer, self.opponent.module)
            state["adversary_scaler"] = self.opponent.scaler.state_dict()
        store.save(self.step, groups, state, config)

    def load(self, store: CheckpointStore) -> bool:
        """Take up the newest good checkpoint, on all processes the one that rank 0 finds; False when there is none."""
        folder: Path | None = distributed.from_main(store.newest_good() if distributed.is_main() else None)
        if folder is None:
            return False
        saved = store.read(folder)
        beside = {"companion": self.companion, "adversary": self.adversary}
        for name in ("model", "ema", "optimizer", *(name for name, there in beside.items() if there is not None)):
            if name not in saved.groups:
                raise UserError(f"{folder}: holds no {name}; use the config it came with, or choose run.dir=OTHER")
        load_strict(self.model, saved.groups["model"], f"{store.folder} (model)")
        self.ema.load(saved.groups["ema"], f"{store.folder} (ema)")
        if self.companion is not None:
            load_strict(self.companion, saved.groups["companion"], f"{store.folder} (companion)")
        self.learner.load(saved.groups["optimizer"], saved.state["scaler"], f"{store.folder} (optimizer)")
        if self.opponent is not None:
            load_strict(self.opponent.module, saved.groups["adversary"], f"{store.folder} (adversary)")
            moments, scaler = saved.groups.get("adversary_optimizer", {}), saved.state.get("adversary_scaler", {})
            self.opponent.load(moments, scaler, f"{store.folder} (adversary_optimizer)")
        self.step = saved.step
        self.skipped = saved.state.get("skipped", 0)  # checkpoints from before steps could be skipped have none
        self.skipped_in_a_row = saved.state.get("skipped_in_a_row", 0)
        self.untold = saved.state.get("untold", {})
        return True
