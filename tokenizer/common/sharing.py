"""How the clips of one update are shared out: equal counts for every process and part, and work as equal as can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tokenizer.common.errors import UserError


class Places(NamedTuple):
    """Where the clips of a batch stand in the global batch of their step.

    What is drawn at random for a clip is drawn for the whole global batch and then picked: `places.pick(drawn_B)`. So
    it does not depend on the number of processes.
    """

    own: list[int]
    total: int

    def pick(self, drawn: Tensor) -> Tensor:
        """The rows of this batch out of those of the global batch [total, ..]."""
        return drawn[self.own]


def shares(num_clips: int, num_parts: int, costs: Sequence[float] | None = None) -> list[list[int]]:
    """Places 0 .. num_clips-1 for each of `num_parts`, equally many each.

    Without costs they are consecutive. With costs (say the squared length of each clip) the dearest is given away
    first, each time to the cheapest part that still has room. UserError where the clips cannot be shared equally.
    """
    if num_clips % num_parts:
        near = max(num_parts, round(num_clips / num_parts) * num_parts)
        raise UserError(
            f"run.batch_size={num_clips} is the global batch: it must be a multiple of processes x run.accumulate = "
            f"{num_parts}; the nearest is {near}"
        )
    room = num_clips // num_parts
    if costs is None or num_parts == 1:
        return [list(range(part * room, (part + 1) * room)) for part in range(num_parts)]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    spent = [0.0] * num_parts
    for place in sorted(range(num_clips), key=lambda place: -costs[place]):
        part = min((p for p in range(num_parts) if len(parts[p]) < room), key=lambda p: spent[p])
        parts[part].append(place)
        spent[part] += costs[place]
    return [sorted(part) for part in parts]
