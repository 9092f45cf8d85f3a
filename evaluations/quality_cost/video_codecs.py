"""H.264, H.265 and AV1 at the size of the tokens: same clips, same metrics, equal bytes.

What counts as size is the elementary stream of a clip, and exactly these bytes are decoded again: parameter sets in,
container out, and without the text in which x264 and x265 describe themselves (700 bytes, more than a clip of tokens).
One key frame a clip, pixels in 4:2:0, the slow presets of the table below, one thread.

The encoders are those that the `av` package brings; `find_codecs` lists the missing ones. Letters: T H W C of a clip.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, cast

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from tokenizer.common.errors import UserError
from tokenizer.data.video_io import exact_rate

_STEPS_PER_UNIT = 4  # quality goes in quarters
_INFORMATION_UNIT = 6  # NAL type of H.264's SEI; x265 is told not to write any
_START = re.compile(rb"(?=\x00\x00\x01)")


@dataclass(frozen=True)
class Codec:
    """An encoder and its settings. `finest` and `coarsest` are the ends of its rate factor: most bytes and fewest."""

    name: str
    encoder: str
    decoders: tuple[str, ...]  # in order of preference
    options: dict[str, str]  # {crf}, {ctu} and {mbtree} are filled in
    finest: float
    coarsest: float

    def options_at(self, quality: float, side: int) -> dict[str, str]:
        """The encoder's options for one rate factor and frames whose smaller side has so many pixels.

        On frames below 128 pixels x264's macroblock tree and x265's coding units as large as the frame gave other bytes
        in every run; smaller units and no tree give the same.
        """
        ctu = 64 if side >= 128 else 32 if side >= 64 else 16
        filled = {"crf": f"{quality:g}", "ctu": str(ctu), "mbtree": str(int(side >= 128))}
        return {key: value.format(**filled) for key, value in self.options.items()}


_X264 = {"preset": "veryslow", "crf": "{crf}", "x264-params": "mbtree={mbtree}"}
_X265 = {
    "preset": "veryslow",
    "crf": "{crf}",
    "x265-params": "log-level=none:info=0:pools=none:frame-threads=1:ctu={ctu}",
}
_SVT = {"preset": "2", "svtav1-params": "lp=1:crf={crf}"}  # the option crf ends at 63, this one goes on to 70
CODECS = {
    "h264": Codec("h264", "libx264", ("h264",), _X264, 0, 51),
    "h265": Codec("h265", "libx265", ("hevc",), _X265, 0, 51),
    "av1": Codec("av1", "libsvtav1", ("libdav1d", "av1"), _SVT, 1, 70),
}


@cache
def find_codecs() -> tuple[tuple[Codec, ...], tuple[str, ...]]:
    """The codecs that can be used here, and the missing part of each of the others."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only; its banner is a page for each clip
    there, missing = [], []
    for codec in CODECS.values():
        has_encoder, has_decoder = _exists(codec.encoder, "w"), any(_exists(name, "r") for name in codec.decoders)
        lacks = [what for what, there_is in (("encoder", has_encoder), ("decoder", has_decoder)) if not there_is]
        if lacks:
            missing.append(f"{codec.name}: no {' and no '.join(lacks)} in av {av.__version__} (wants {codec.encoder})")
        else:
            there.append(codec)
    return tuple(there), tuple(missing)


def pick_codecs(names: Sequence[str]) -> tuple[Codec, ...]:
    """Codecs by name; `all` are those that are there. UserError for one that does not exist or is missing here."""
    there, missing = find_codecs()
    if list(names) == ["all"]:
        return there
    by_name = {codec.name: codec for codec in there}
    for name in names:
        if name not in CODECS:
            raise UserError(f"codec {name!r} is none of {', '.join(CODECS)}, all")
        if name not in by_name:
            raise UserError(next(line for line in missing if line.startswith(f"{name}:")))
    return tuple(by_name[name] for name in dict.fromkeys(names))


def _exists(name: str, mode: Literal["r", "w"]) -> bool:
    try:
        av.Codec(name, mode)
    except (ValueError, av.FFmpegError):  # av's UnknownCodecError is a ValueError
        return False
    return True


@dataclass(frozen=True)
class Coded:
    """A clip as an elementary stream: one packet of bytes for each picture, in decoding order."""

    codec: Codec
    quality: float
    packets: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        """Of the elementary stream, parameter sets included."""
        return sum(map(len, self.packets))


def encode(codec: Codec, frames_THWC: np.ndarray, fps: float, quality: float) -> Coded:
    """uint8 RGB frames with even sides -> their elementary stream at one rate factor (lower is better and dearer)."""
    if frames_THWC.shape[1] % 2 or frames_THWC.shape[2] % 2:
        raise UserError(f"{codec.name} in 4:2:0 needs even sides, got {frames_THWC.shape[1]}x{frames_THWC.shape[2]}")
    context = cast(VideoCodecContext, av.CodecContext.create(codec.encoder, "w"))
    context.height, context.width = frames_THWC.shape[1:3]
    context.pix_fmt = "yuv420p"
    context.framerate = exact_rate(fps)
    context.time_base = 1 / context.framerate
    context.gop_size = len(frames_THWC)
    context.thread_count = 1
    context.options = codec.options_at(quality, min(frames_THWC.shape[1:3]))
    packets: list[bytes] = []
    with _same_priority():
        context.open()
    for frame_HWC in frames_THWC:
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
        packets += map(bytes, context.encode(frame.reformat(format="yuv420p")))
    packets += map(bytes, context.encode(None))
    if codec.encoder == "libx264":
        packets = [_without_information(packet) for packet in packets]
    return Coded(codec, quality, tuple(packets))


@contextmanager
def _same_priority() -> Iterator[None]:
    """SVT-AV1, opened by root, leaves its caller at real-time priority, which starves all else on the machine."""
    if not hasattr(os, "sched_getscheduler"):  # Linux only, as is the habit
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def decode(coded: Coded) -> np.ndarray:
    """uint8 RGB [T, H, W, 3] from the bytes that were counted, and from nothing else."""
    name = next(name for name in coded.codec.decoders if _exists(name, "r"))
    context = cast(VideoCodecContext, av.CodecContext.create(name, "r"))
    context.thread_count = 1
    frames: list[VideoFrame] = []
    for packet in coded.packets:
        frames += context.decode(av.Packet(packet))
    frames += context.decode(None)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def _without_information(packet: bytes) -> bytes:
    """An H.264 packet without its SEI units; 00 00 01 cannot occur inside of a unit."""
    units = _START.split(packet)
    return b"".join(unit for unit in units if len(unit) < 4 or unit[3] & 31 != _INFORMATION_UNIT)


@dataclass
class RateSearch:
    """The encodings of one clip by one codec, each made once, and the best of them within a number of bytes."""

    codec: Codec
    frames_THWC: np.ndarray
    fps: float
    made: dict[int, Coded] = field(default_factory=dict)

    def at_most(self, num_bytes: float) -> tuple[Coded, bool]:
        """The finest encoding of at most `num_bytes`, by bisection over the rate factor in quarters, and True.

        Sizes fall with the rate factor but for small bumps, at which the bisection may stop a step too early.
        Where even the coarsest takes more bytes, that one and False: the codec cannot go so low.
        """
        low, high = (round(_STEPS_PER_UNIT * end) for end in (self.codec.finest, self.codec.coarsest))
        if self._at(high).num_bytes > num_bytes:
            return self._at(high), False
        for step in sorted(self.made, reverse=True):  # what earlier searches found narrows this one
            if self.made[step].num_bytes > num_bytes:
                low = step + 1
                break
            high = step
        while low < high:
            middle = (low + high) // 2
            if self._at(middle).num_bytes <= num_bytes:
                high = middle
            else:
                low = middle + 1
        return self._at(high), True

    def _at(self, step: int) -> Coded:
        if step not in self.made:
            self.made[step] = encode(self.codec, self.frames_THWC, self.fps, step / _STEPS_PER_UNIT)
        return self.made[step]
