"""The three names that turn a video into tokens and back; each is imported when it is first used, torch with it."""

import os
from typing import TYPE_CHECKING

from tokenizer.common.lazy import lazy_names

# OpenMP's threads would spin while they wait: beside one busy process that stops everything. Read when torch is loaded.
if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") == "PASSIVE":
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # a short spin: 1.5 times faster on idle cores than none

if TYPE_CHECKING:
    from tokenizer.presets import load_tokenizer
    from tokenizer.router.predict import load_router
    from tokenizer.tokens import VideoTokens

__all__ = ["VideoTokens", "load_router", "load_tokenizer"]

__getattr__ = lazy_names(
    __name__,
    {
        "VideoTokens": "tokenizer.tokens",
        "load_router": "tokenizer.router.predict",
        "load_tokenizer": "tokenizer.presets",
    },
)
