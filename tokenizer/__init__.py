"""The three names that turn a video into tokens and back; each is imported when it is first used, torch with it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.presets import load_tokenizer
    from tokenizer.router.predict import load_router
    from tokenizer.tokens import VideoTokens

__all__ = ["VideoTokens", "load_router", "load_tokenizer"]

_HOMES = {
    "VideoTokens": "tokenizer.tokens",
    "load_router": "tokenizer.router.predict",
    "load_tokenizer": "tokenizer.presets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenizer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
