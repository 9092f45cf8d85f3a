"""Checkpoints written while training goes on: a copy in memory now, the disk in another thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenizer.common.checkpoint import CheckpointStore


class BackgroundWriter:
    """One write at a time. What went wrong in the thread is raised by the next `save` or by `join`."""

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        """Copy everything to the CPU and start writing it; waits first for the write before."""
        self.join()
        copies = {
            group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        self._thread = threading.Thread(target=self._write, args=(step, copies, dict(state), config))
        self._thread.start()

    def join(self) -> None:
        """Wait until everything is on the disk. Raises what the writing raised, an OSError of a full disk say."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, *what: Any) -> None:
        try:
            self.store.save(*what)
        except BaseException as error:  # handed on by `join`
            self._error = error
