"""The names with which clips are sampled in Python; each is imported when it is first used, torch with it."""

import os
from typing import TYPE_CHECKING

from tokenizer.common.lazy import lazy_names

# OpenMP's threads would spin while they wait: beside one busy process that stops everything. Read when torch is loaded.
if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") == "PASSIVE":
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # a short spin: 1.5 times faster on idle cores than none

if TYPE_CHECKING:
    from autoregressive.presets import load_gpt
    from autoregressive.sample_grid import sample_grid, tokens_of
    from autoregressive.sampler import Request, Sampler, SamplingConfig

__all__ = ["Request", "Sampler", "SamplingConfig", "load_gpt", "sample_grid", "tokens_of"]

__getattr__ = lazy_names(
    __name__,
    {
        "Request": "autoregressive.sampler",
        "Sampler": "autoregressive.sampler",
        "SamplingConfig": "autoregressive.sampler",
        "load_gpt": "autoregressive.presets",
        "sample_grid": "autoregressive.sample_grid",
        "tokens_of": "autoregressive.sample_grid",
    },
)
