"""The clips of a quality-cost curve, from a named protocol or from the flags.

Letters: C T H W of a clip.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from evaluations.clip_list import fingerprint, list_clips
from evaluations.protocols import Protocol, find_protocol
from evaluations.quality_cost.flags import FREE
from tokenizer.common.clip_shape import check_same_shape
from tokenizer.common.errors import UserError
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.video_io import VideoError, to_model_range
from tokenizer.model import TokenizerConfig
from tokenizer.router.reward import QualityTable

_FIXED = ("sources", "fps", "max_clips", "seed")  # flags about which a protocol has decided
_OF_A_PROTOCOL = ("data", "count")  # flags that mean nothing without one


@dataclass(frozen=True)
class CurveClips:
    """Clips in a fixed order. `read(i)`: video_CTHW of this very clip, UserError if it cannot be read.

    contents: the fingerprint of each clip's file, "" for a clip of ours. facts: where they come from. notes: what
    differs from the official list.
    """

    names: list[str]
    contents: list[str]
    read: Callable[[int], Tensor]
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


def settle_protocol(args: argparse.Namespace) -> Protocol | None:
    """The named protocol with the changes of the flags; what it decides is entered into `args`, else the defaults.

    UserError for flags that do not go together.
    """
    if args.protocol is None:
        for name in _OF_A_PROTOCOL:
            if getattr(args, name) is not None:
                raise UserError(f"--{name} goes with --protocol NAME; without one give --sources and --max-clips")
        decided, protocol = FREE, None
    else:
        for name in _FIXED:
            if getattr(args, name) is not None:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: protocol {args.protocol} has decided that; leave out one of the two flags")
        changes = {name: getattr(args, name) for name in ("extractor", "perceptual", "count", "draws")}
        protocol = find_protocol(args.protocol, "reconstruction").change(**changes)
        decided = {name: getattr(protocol, name) for name in FREE}
    for name, value in decided.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return protocol


def clips_of_protocol(protocol: Protocol, data: str | None) -> CurveClips:
    """Those that the evaluation of reconstruction scores, in its order."""
    listed = list_clips(protocol, data)

    facts = {"protocol_hash": protocol.hash, "list": listed.facts()}
    names = [clip.name for clip in listed.clips]
    read = _or_stop(names, lambda index: to_model_range(listed.clips[index].read().frames_THWC))
    contents = [clip.content() for clip in listed.clips]
    return CurveClips(names, contents, read, facts, [*protocol.notes, *listed.notes])


def clips_of_flags(args: argparse.Namespace, config: TokenizerConfig, stored: QualityTable | None) -> CurveClips:
    """Those of --sources, else those that the stored table names."""
    if args.sources:
        data = DataConfig(list(args.sources), config.num_frames, config.size, args.fps, augment=False)
    elif stored and "data" in stored.meta:
        data = DataConfig(**stored.meta["data"])
    else:
        raise UserError("no clips: give --protocol, --sources, or a --table that names its clips")
    check_same_shape(data, "the table", config, "the tokenizer", "give --sources and --table fresh")
    dataset = build_dataset(data)
    dataset = dataset if args.max_clips is None else dataset.first(args.max_clips)
    read = _or_stop(list(dataset.names), lambda index: dataset.get_this(index).video_CTHW)
    files = (dataset.file(i) for i in range(len(dataset)))
    contents = ["" if file is None else fingerprint(*file) for file in files]
    return CurveClips(list(dataset.names), contents, read, {"data": dataset.cfg})


def _or_stop(names: Sequence[str], read: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """A curve compares equal clips, so one that cannot be read ends it."""

    def checked(index: int) -> Tensor:
        try:
            return read(index)
        except VideoError as error:
            way_out = "a curve compares equal clips, so leave it out of them"
            raise UserError(f"{names[index]}: cannot be read ({error.reason}); {way_out}") from error

    return checked
