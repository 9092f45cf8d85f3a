"""The names with which clips are scored in Python; each is imported when it is first used, torch with it."""

from typing import TYPE_CHECKING

from tokenizer.common.lazy import lazy_names

if TYPE_CHECKING:
    from evaluations.metrics.clip_scores import score_clip
    from evaluations.metrics.extractors import load_extractor
    from evaluations.metrics.frechet import frechet_of_features
    from evaluations.protocols import find_protocol
    from evaluations.shards import read_result

__all__ = ["find_protocol", "frechet_of_features", "load_extractor", "read_result", "score_clip"]

__getattr__ = lazy_names(
    __name__,
    {
        "find_protocol": "evaluations.protocols",
        "frechet_of_features": "evaluations.metrics.frechet",
        "load_extractor": "evaluations.metrics.extractors",
        "read_result": "evaluations.shards",
        "score_clip": "evaluations.metrics.clip_scores",
    },
)
