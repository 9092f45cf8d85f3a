"""AdamW with two parameter groups, the two learning-rate schedules, and the optimiser's state as named tensors.

An exponential moving average of the weights, kept beside the raw ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from tokenizer.common.checkpoint import load_strict
from tokenizer.common.errors import UserError

SCHEDULES = ("cosine", "wsd")
GENTLE = 0.1  # of the learning rate, for matrices that a model names in `gentle`


@dataclass
class OptimConfig:
    """The optimizer of every stage; the defaults are the tokenizer's."""

    lr: float = 1e-4  # the peak, reached after the warm-up
    min_lr: float = 1e-6  # where the schedule ends
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 1e-4  # matrices only, see param_groups
    warmup_steps: int = 5000  # linear from lr / warmup_steps
    clip_norm: float = 1.0  # the gradient's largest global norm
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, decay with 1 - sqrt)
    decay_fraction: float = 0.2  # wsd alone: the last share of the steps, which decays

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule={self.schedule!r}: must be one of {', '.join(SCHEDULES)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas={self.betas}: must be two numbers in [0, 1)")
        if not 0 <= self.min_lr <= self.lr:
            raise UserError(f"optim.min_lr={self.min_lr}: must lie between 0 and optim.lr={self.lr}")
        if not 0 < self.decay_fraction <= 1:
            raise UserError(f"optim.decay_fraction={self.decay_fraction}: must lie in (0, 1]")
        if self.schedule != "wsd" and self.decay_fraction != OptimConfig.decay_fraction:
            raise UserError(
                f"optim.decay_fraction={self.decay_fraction} is not used by optim.schedule={self.schedule!r}: set "
                "optim.schedule=wsd, or leave it out"
            )
        if self.weight_decay < 0:
            raise UserError(f"optim.weight_decay={self.weight_decay}: must be >= 0")
        if self.clip_norm <= 0 or self.warmup_steps < 0:
            raise UserError(f"optim.clip_norm={self.clip_norm} must be > 0, warmup_steps={self.warmup_steps} >= 0")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: matrices and kernels decay; vectors (biases, norms, gains) do not.

    Matrices that the model names in `gentle` are a third group, at GENTLE of the learning rate.
    """
    names = set(getattr(model, "gentle", ()))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [(name, parameter) for name, parameter in trainable if parameter.ndim >= 2]
    gentle = [p for name, p in matrices if name in names]
    groups = [
        {"params": [p for name, p in matrices if name not in names], "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": [p for _, p in trainable if p.ndim < 2], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return [*groups, {"params": gentle, "weight_decay": weight_decay, "lr_scale": GENTLE}] if gentle else groups


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over `param_groups`; each step sets the learning rate."""
    groups = param_groups(model, config.weight_decay)
    # fused: one kernel on a GPU, and on a CPU a quarter of the time of torch's own choice
    return AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True)


class Rewarm(NamedTuple):
    """A run of `steps_before` steps that was made longer or shorter after `step` of them."""

    step: int
    steps_before: int
    over: int  # steps from the old rate to the new schedule


def learning_rate(step: int, total_steps: int, config: OptimConfig, rewarm: Rewarm | None = None) -> float:
    """The rate of update number `step` (from 0) of `total_steps`; a pure function, so resume needs no scheduler.

    Linear warm-up, then either half a cosine down to `min_lr`, or the peak held until the last `decay_fraction` of
    the steps, which fall to `min_lr` as 1 - sqrt(progress). rewarm: starts from the rate of its last step before and
    moves linearly to this schedule.
    """
    if rewarm is not None and step < rewarm.step + rewarm.over:
        old = learning_rate(rewarm.step - 1, rewarm.steps_before, config)
        new = learning_rate(step, total_steps, config)
        return old + (new - old) * (step - rewarm.step + 1) / rewarm.over
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, total_steps - round(total_steps * config.decay_fraction))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    height = 1 - math.sqrt(progress) if config.schedule == "wsd" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (config.lr - config.min_lr) * height


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as `<parameter name>/<key>` -> tensor, exact: what safetensors can hold."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor], origin: str = "optimizer state"
) -> None:
    """The inverse of `optimizer_tensors`; UserError for a name or shape that the model does not have."""
    parameters = dict(model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise UserError(f"{origin}: holds {full_name}, which the model does not have; use the config it came with")
        if tensor.ndim and tensor.shape != parameters[name].shape:
            have, want = tuple(tensor.shape), tuple(parameters[name].shape)
            raise UserError(f"{origin}: {full_name} is {have}, the model has {want}; use the config it came with")
        state.setdefault(name, {})[key] = tensor
    name_of = {parameter: name for name, parameter in parameters.items()}
    ordered = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    by_index = {index: state[name] for index, name in enumerate(ordered) if name in state}
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})


class Ema:
    """Averages `model`'s parameters and copies its buffers; its only state is the averaged weights.

    The decay ramps up as (1 + step) / (10 + step) to `decay`, so that short runs forget their initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._averaged = deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after update number `step` (from 0)."""
        now = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([*self._averaged.parameters()], [*model.parameters()], 1 - now)
        for mean, own in zip(self._averaged.buffers(), model.buffers(), strict=True):
            mean.copy_(own)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights under the names of the model's own state_dict."""
        return dict(self._averaged.state_dict())

    def load(self, tensors: Mapping[str, Tensor], origin: str = "EMA weights") -> None:
        """Strictly; see `load_strict`."""
        load_strict(self._averaged, tensors, origin)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with`, `model` has the averaged weights; afterwards its own again, to the bit."""
        owns, means = (chain(module.parameters(), module.buffers()) for module in (model, self._averaged))
        pairs = list(zip(owns, means, strict=True))
        with torch.no_grad():
            own = [tensor.clone() for tensor, _ in pairs]
            for tensor, mean in pairs:
                tensor.copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for (tensor, _), saved in zip(pairs, own, strict=True):
                    tensor.copy_(saved)
