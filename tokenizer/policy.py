"""Where the lengths come from while a tokenizer trains: fixed, random (stage 1) or a frozen router (stage 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tokenizer.assignment import AssignmentSpace
from tokenizer.common.errors import UserError
from tokenizer.common.sharing import Places
from tokenizer.model import TokenizerConfig
from tokenizer.router.predict import check_router_fits, load_router


class Policy(Protocol):
    """Clips -> their lengths, int64 [B, N] on the CPU. Draws only from the generator.

    places: where the clips stand in the global batch; left out where they are all of it.
    """

    def __call__(self, video_BCTHW: Tensor, generator: torch.Generator, places: Places | None = None) -> Tensor: ...


_OF_ROUTER = ("router_ckpt", "router_config", "router_sha256")


@dataclass
class PolicyConfig:
    kind: str = "random"  # "random": uniform over all rows, per clip; "fixed": `lengths`; "router": its argmax
    lengths: list[int] = field(default_factory=list)  # for kind "fixed": tokens of each block
    router_config: str = ""  # for kind "router": its YAML, checked against the weights (may be empty)
    router_ckpt: str = ""  # for kind "router": .safetensors file or run folder of stage 3
    router_sha256: str = ""  # of its weights; a run fills it in, so that it never resumes with another router

    def __post_init__(self) -> None:
        if self.kind not in ("random", "fixed", "router"):
            raise UserError(f"policy.kind = {self.kind!r}: choose 'random', 'fixed' or 'router'")
        if self.kind == "fixed" and not self.lengths:
            raise UserError("policy.kind = 'fixed' needs policy.lengths, e.g. [256, 256, 256, 256]")
        if self.kind == "router" and not self.router_ckpt:
            raise UserError("policy.kind = 'router' needs policy.router_ckpt, the result of stage 3")
        for name, belongs_to in (("lengths", "fixed"), *((name, "router") for name in _OF_ROUTER)):
            if getattr(self, name) and self.kind != belongs_to:
                raise UserError(f"policy.{name} is set, but policy.kind = {self.kind!r} does not read it")


def build_policy(config: PolicyConfig, tokenizer: TokenizerConfig, device: torch.device) -> Policy:
    """The policy of a config, into which the router's sha256 is entered.

    Raises UserError where lengths or router do not fit the tokenizer, or the router is not the one that is named.
    """
    space = AssignmentSpace(tuple(tokenizer.levels), tokenizer.num_blocks)
    if config.kind == "random":
        return partial(_random, space)
    if config.kind == "fixed":
        length_N = torch.tensor(config.lengths)
        space.rows_of(length_N)
        return lambda video_BCTHW, generator, places=None: length_N.expand(len(video_BCTHW), -1)
    router = load_router(config.router_ckpt, device, config.router_config or None)
    check_router_fits(router, tokenizer)
    if config.router_sha256 not in ("", router.sha256):
        raise UserError(
            f"policy.router_sha256={config.router_sha256} is not that of {config.router_ckpt}, {router.sha256}"
        )
    config.router_sha256 = router.sha256
    return lambda video_BCTHW, generator, places=None: router.assign(video_BCTHW)


def _random(
    space: AssignmentSpace, video_BCTHW: Tensor, generator: torch.Generator, places: Places | None = None
) -> Tensor:
    """Drawn for the whole global batch, so that a clip's lengths do not depend on the number of processes."""
    if places is None:
        return space.lengths_of(space.draw_rows(len(video_BCTHW), generator))
    return space.lengths_of(places.pick(space.draw_rows(places.total, generator)))
