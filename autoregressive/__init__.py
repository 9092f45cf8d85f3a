"""The names with which clips are sampled in Python; each is imported when it is first used, torch with it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoregressive.presets import load_gpt
    from autoregressive.sample_grid import sample_grid, tokens_of
    from autoregressive.sampler import Request, Sampler, SamplingConfig

__all__ = ["Request", "Sampler", "SamplingConfig", "load_gpt", "sample_grid", "tokens_of"]

_HOMES = {
    "Request": "autoregressive.sampler",
    "Sampler": "autoregressive.sampler",
    "SamplingConfig": "autoregressive.sampler",
    "load_gpt": "autoregressive.presets",
    "sample_grid": "autoregressive.sample_grid",
    "tokens_of": "autoregressive.sample_grid",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autoregressive' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
