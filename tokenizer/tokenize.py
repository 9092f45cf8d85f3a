"""Videos of any length -> one file of tokens each, in constant memory.

    python -m tokenizer.tokenize VIDEO... --out DIR --vq_ckpt T.safetensors --router_ckpt R.safetensors

VIDEO is a file or a folder. OUT/<name>-<digest>.safetensors holds the tokens of all clips with the time of every frame
(tokenizer.token_file); the digest is that of the video. Rerun the same command to resume, or start it several times to
share the videos among processes. `python -m tokenizer.detokenize` is the way back.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizer.common.cli import BUDGET_FORMS, TRADE_OFF_HELP, Parser, add_tokenizing_flags, answer_help, at_least


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Tokenize whole videos of any length: one file of tokens each.")
    add = parser.add_argument
    add("videos", nargs="+", metavar="VIDEO", help="a video file, or a folder of videos (searched recursively)")
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the token files")
    add_tokenizing_flags(parser)
    add("--budget", type=str.strip, default="router", help=f"{BUDGET_FORMS} (default: router; not average:N)")
    add("--trade-off", type=float, metavar="W_Q", help=TRADE_OFF_HELP)
    add("--h264-crf", type=at_least(0), default=23, metavar="Q", help="CRF of the H.264 to compare with (default: 23)")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import contextlib
import fcntl
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import av
import numpy as np
import torch
from av.video.codeccontext import VideoCodecContext

from tokenizer.budget import choose_rows, keeps_quality, parse_budget
from tokenizer.common.clip_shape import sides
from tokenizer.common.device import pick_device
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.work_units import lock, map_ahead, progress_bar
from tokenizer.data.clip_stream import VideoSource, find_sources
from tokenizer.data.safe_decode import decode_video
from tokenizer.data.video_io import (
    DecodedClip,
    VideoError,
    exact_rate,
    file_slug,
    probe,
    to_model_range,
    with_even_sides,
)
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import router_of_flags
from tokenizer.token_file import TokenFile, TokenWriter, VideoFacts


def main() -> int:
    args = parse_arguments()
    sources = [source for video in args.videos for source in find_sources(video, lambda path: False)]
    job = Job(load_tokenizer(args.vq_ckpt, pick_device(args.device), args.tok_config), args)
    args.out.mkdir(parents=True, exist_ok=True)
    done, failed, elsewhere = 0, 0, 0
    for source in sources:
        try:
            target = args.out / f"{file_slug(source.path.stem)}-{_digest(source)}.safetensors"
            with lock(target.with_name(f".{target.name}.lock"), fcntl.LOCK_NB) as free:
                if not free:
                    elsewhere += 1
                    continue
                print(job.found(source, target) if target.exists() else job.tokenize(source, target), flush=True)
                done += 1
        except VideoError as error:
            failed += 1
            print(f"skipped {source.file}: {error.reason}", file=sys.stderr)
    if elsewhere:
        print(f"{elsewhere} video(s) left to the other processes")
    return 2 if failed and not done and not elsewhere else 0


@dataclass
class Job:
    """The models and the budget; one video at a time."""

    model: VideoTokenizer
    args: argparse.Namespace

    def __post_init__(self) -> None:
        """Raises UserError if models and budget do not fit each other."""
        self.budget = parse_budget(self.args.budget, self.model.space, self.args.trade_off)
        if self.budget.average_tokens is not None:
            raise UserError(f"--budget {self.budget.text} needs all clips before the first; use tokens:N or price:P")
        self.router = router_of_flags(self.args, self.model.config, self.model.device, self.budget)

    def facts(self, source: VideoSource, fps: float) -> VideoFacts:
        c = self.model.config
        return VideoFacts(
            num_frames=c.num_frames,
            size=c.size,
            codebook_size=c.codebook_size,
            num_blocks=c.num_blocks,
            tokenizer_sha256=self.model.sha256,
            router_sha256=self.router.sha256 if self.router else None,
            budget=self.args.budget,
            fps=fps,
            read_at=self.args.fps,
            source=source.fingerprint(),
            backend=self.args.backend,
            trade_off=self.router.trade_off(self.budget) if self.router else None,
        )

    def found(self, source: VideoSource, target: Path) -> str:
        """The line to print for a finished file. Raises UserError if it was made by other weights or settings."""
        there = TokenFile(target).facts
        if there != self.facts(source, there.fps):
            raise UserError(
                f"{target} was made by other weights, budget or fps, or at another --trade-off; choose another --out "
                "or remove it"
            )
        return f"{source.file}: done before, {target}"

    @torch.inference_mode()
    def tokenize(self, source: VideoSource, target: Path) -> str:
        """Write the tokens of one video; resumes a stopped run. Returns the line to print."""
        args, c = self.args, self.model.config
        fps = args.fps or probe(source.path, args.backend).fps
        writer = TokenWriter(target, self.facts(source, fps))
        resumed, began = writer.num_clips, math.nan
        meter = H264Meter(args.h264_crf, fps)
        new_frames, missed, batch = 0, 0, list[DecodedClip]()
        clips = decode_video(source.path, c.num_frames, c.size, args.fps, args.backend, skip=resumed)
        # One thread decodes the next clips in its process while these go through the models.
        batches = map_ahead(lambda _: list(itertools.islice(clips, args.batch_size)), itertools.count(), 1)
        with (
            contextlib.closing(clips),
            contextlib.closing(batches),
            progress_bar(desc=source.file, unit="frame") as bar,
        ):
            for batch in itertools.takewhile(bool, batches):
                bar.update(sum(len(clip.seconds) for clip in batch))
                if not new_frames:
                    began = time.perf_counter()  # the decoder has started
                video_BCTHW = torch.stack([to_model_range(clip.frames_THWC) for clip in batch])
                rated_BA = None
                if self.router and self.budget.needs_router:
                    rated_BA = self.router.rate(video_BCTHW, self.budget)  # [B, A]
                search = self.router.search if self.router else None
                row_B = choose_rows(self.budget, rated_BA, self.model.space, None, len(batch), search)
                if rated_BA is not None:
                    missed += int((~keeps_quality(self.budget, rated_BA, row_B)).sum())
                tokens = self.model.encode(video_BCTHW, self.model.space.lengths_of(row_B))
                writer.append(tokens, [clip.seconds for clip in batch])
                for clip in batch:
                    meter.add(clip.frames_THWC[: len(clip.seconds)])
                    new_frames += len(clip.seconds)
        took = time.perf_counter() - began
        for note in dict.fromkeys(batch[-1].notes if batch else ()):
            print(f"note: {source.file}: {note}", file=sys.stderr)
        if missed:
            print(
                f"note: {source.file}: no assignment is predicted to keep {self.budget.text} for {missed} clips of "
                "this run; they have the best predicted one",
                file=sys.stderr,
            )
        file = TokenFile(writer.finish())
        return f"{source.file}: {_report(file, new_frames, took, meter, resumed)}; {target}"


def _report(file: TokenFile, new_frames: int, took: float, meter: H264Meter, resumed: int) -> str:
    facts, (height, width) = file.facts, sides(file.facts.size)
    bits = file.num_tokens * math.log2(facts.codebook_size) / file.duration
    line = (
        f"{len(file.second_F)} frames, {len(file)} clips, {file.num_tokens} tokens: "
        f"{bits / 1000:.2f} kbit/s ({math.log2(facts.codebook_size):g} bits a token)"
    )
    if new_frames:
        line += f", H.264 at {height}x{width} and crf {meter.crf}: {meter.bits_per_second() / 1000:.2f} kbit/s"
        if resumed:
            line += f" (of the {new_frames} frames of this run)"
        reached = new_frames / took
        line += f"; {reached:.1f} frames/s"
        if reached < facts.fps:
            line += f", below the video's {facts.fps:g}: live input must be read at --fps {reached:.1f} or less"
    return line


@dataclass
class H264Meter:
    """Counts the bytes that x264 needs for the same pictures, in one stream; keeps none of them."""

    crf: int
    fps: float
    num_bytes: int = 0
    num_frames: int = 0
    _encoder: VideoCodecContext | None = field(default=None, repr=False)

    def add(self, frames_THWC: np.ndarray) -> None:
        """uint8 RGB frames."""
        frames_THWC = with_even_sides(frames_THWC)
        if self._encoder is None:
            self._encoder = av.CodecContext.create("libx264", "w")
            self._encoder.height, self._encoder.width = frames_THWC.shape[1:3]
            self._encoder.pix_fmt = "yuv420p"
            self._encoder.framerate = exact_rate(self.fps)
            self._encoder.time_base = 1 / self._encoder.framerate
            self._encoder.thread_count = 1
            self._encoder.options = {"preset": "medium", "crf": str(self.crf)}
        for frame_HWC in frames_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame.pts = self.num_frames
            self._count(self._encoder.encode(frame.reformat(format="yuv420p")))
            self.num_frames += 1

    def bits_per_second(self) -> float:
        """Over all frames added so far; ends the stream."""
        if self._encoder is not None:
            self._count(self._encoder.encode(None))
            self._encoder = None
        return 8 * self.num_bytes * self.fps / max(1, self.num_frames)

    def _count(self, packets: Sequence[av.Packet]) -> None:
        self.num_bytes += sum(packet.size for packet in packets)


def _digest(source: VideoSource) -> str:
    return hashlib.sha256(source.fingerprint().encode()).hexdigest()[:8]


if __name__ == "__main__":
    run_cli(main)
