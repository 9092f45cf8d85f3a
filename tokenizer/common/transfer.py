"""Copies between CPU and GPU for which the host does not wait.

An ordinary copy waits until the GPU has done all that was asked of it before, and then the GPU waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on `device`; a GPU fetches it out of pinned memory by itself."""
    device = torch.device(device)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.is_cpu else x.to(device)


class Fetched:
    """A tensor on its way to the CPU; `read` waits for it."""

    def __init__(self, x: Tensor) -> None:
        self._copy = x.to("cpu", non_blocking=True)  # torch pins what it copies to
        self._arrived = torch.cuda.Event() if x.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(x.device))

    def read(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
