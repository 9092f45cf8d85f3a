"""The names with which clips are sampled in Python; each is imported when it is first used, torch with it."""

from typing import TYPE_CHECKING

from tokenizer.common.lazy import lazy_names

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
