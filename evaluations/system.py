"""The interface of a system under evaluation: clips in, frames out, in one stream.

    Source   a clip of the list, read ahead
    Draft    the same before its frames are decoded, for example sampled tokens; in any order
    Made     its frames, or why there are none

`stream` runs in the main thread and keeps the sampler's slots full; `finish` runs beside it in another thread, on
batches whose members are fixed by the list, so that no number depends on how the work is shared.

Letters: T frames, H W rows and columns, C colours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from evaluations import shards
from evaluations.clip_list import ListedClip
from tokenizer.data.video_io import DecodedClip


@dataclass(frozen=True)
class Source:
    """`real`: the clip itself, None if nobody needs it; `error`: why it cannot be read."""

    clip: ListedClip
    real: DecodedClip | None = None
    error: str | None = None


@dataclass(frozen=True)
class Draft:
    """A clip on its way. `made`: what the system keeps for `finish`. `skipped`: why there will be no frames."""

    source: Source
    made: Any = None
    skipped: str | None = None


@dataclass(frozen=True)
class Made:
    """The output for one clip: uint8 frames and fields of its record, or why there is none."""

    source: Source
    ours_THWC: np.ndarray | None
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None


class System(Protocol):
    """A system under evaluation."""

    def facts(self) -> dict[str, Any]:
        """Weights by sha256 and every setting that affects the clips."""
        ...

    def stream(self, sources: Iterable[Source]) -> Iterator[Draft]:
        """One for each source, in any order; sources are drawn as they are needed."""
        ...

    def finish(self, drafts: Sequence[Draft]) -> list[Made]:
        """One for each draft of a batch, none of them skipped, in order."""
        ...


def in_batches(drafts: Iterable[Draft], size: int, num_clips: int) -> Iterator[list[Draft]]:
    """Batches of `size` neighbours of the list, each handed on when its last member is there.

    A batch never reaches beyond its shard, so its members do not depend on who scores what; the last one of a shard may
    be smaller.
    """
    waiting: dict[int, list[Draft]] = defaultdict(list)
    for draft in drafts:
        index = draft.source.clip.index
        shard = index - index % shards.SHARD
        start = shard + (index - shard) // size * size
        waiting[start].append(draft)
        if len(waiting[start]) == min(start + size, shard + shards.SHARD, num_clips) - start:
            yield sorted(waiting.pop(start), key=lambda each: each.source.clip.index)
    for _, rest in sorted(waiting.items()):
        yield sorted(rest, key=lambda each: each.source.clip.index)
