"""A run that dies between two checkpoints, and what it must equal once it has gone on, for tests of several stages."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tokenizer.common.checkpoint import read_model


def fit_and_die(training: Any, moment: int) -> None:
    """Train until the update of `moment`, which is not made any more."""
    loss = training.loss

    def dies(batch: Any, step: int) -> Any:
        if step == moment:
            raise KeyboardInterrupt
        return loss(batch, step)

    training.loss = dies
    with pytest.raises(KeyboardInterrupt):
        training.fit()


def assert_same_weights(folder: Path, other: Path) -> None:
    """The final weights of two runs, averaged and raw, bit for bit."""
    for name in ("model.safetensors", "model.raw.safetensors"):
        ours, wanted = (read_model(run / "final" / name).tensors for run in (folder, other))
        assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
