"""An exponential moving average of the weights, kept beside the raw ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tokenizer.common.checkpoint import load_strict

_Tensors = tuple[Tensor, ...] | list[Tensor]


class Ema:
    """Averages `model`'s parameters and copies its buffers. It has no state of its own but the averaged weights.

    The decay ramps up as (1 + step) / (10 + step) to `decay`, so that a short run is not averaged with its start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._now = 0.0
        self._averaged = AveragedModel(model, multi_avg_fn=self._average).requires_grad_(False)
        self._averaged.n_averaged.fill_(1)  # AveragedModel copies instead of averaging while this is 0

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update number `step` (from 0)."""
        self._now = min(self.decay, (1 + step) / (10 + step))
        self._averaged.update_parameters(model)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights under the names of the model's own state_dict."""
        return dict(self._averaged.module.state_dict())

    def load(self, tensors: Mapping[str, Tensor], origin: str = "EMA weights") -> None:
        """Strictly; see `load_strict`."""
        load_strict(self._averaged.module, tensors, origin)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with`, `model` has the averaged weights; afterwards its own again, to the bit."""
        averaged = self._averaged.module
        owns, means = (chain(module.parameters(), module.buffers()) for module in (model, averaged))
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

    @torch.no_grad()
    def _average(self, averaged: _Tensors, current: _Tensors, _num_averaged: Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, 1 - self._now)
