"""Frame prediction: the first frames of real clips are given, the GPT writes the whole clip.

    bash scripts/test/frame_pred_visualization.sh --tok-config T.yaml --vq-ckpt T --gpt-model GPT-LP --gpt-ckpt G \\
        --dataset k600_val --sample-dir OUT --orig-aspect-ratio --check-special-token-mask --sample-num 20 \\
        --fixed-prefix "512,128" --condition-mode padding

`--vid_path DIR` instead of `--dataset` takes any folder of videos, or one file. The given frames are encoded as the
first temporal blocks (padded with copies of the last one up to the end of their block), and the GPT generates them
again, so all frames of a sample are its own. Each clip is the first of its file. Files written: see sample_c2v.py.

Letters: B clips, C T H W, K tokens of a block.
"""

from __future__ import annotations

import argparse

from autoregressive.flags import REQUIRED, add_common_flags, parse, parse_lengths
from tokenizer.common.cli import Parser, answer_help, at_least, frame_rate


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Continue real clips from their first frames with a GPT, and decode them with its tokenizer.")
    add_common_flags(parser)
    add = parser.add_argument
    add("--dataset", choices=("k600_val",), help="the videos of K600_VAL_FILE below K600_ROOT")
    add("--vid_path", help="a folder of videos (searched recursively) or one file, instead of --dataset")
    add("--sample-num", type=at_least(1), default=20, metavar="N", help="the first N videos (default: 20)")
    add("--orig-aspect-ratio", action="store_true", help="scale the short side and crop the middle; else squeeze")
    add("--fixed-prefix", metavar="K,K,..", help="tokens of each block of given frames (default: the model's)")
    add("--condition-mode", choices=("padding",), default="padding", help="repeat the last given frame in its block")
    add("--condition-frames", type=at_least(1), metavar="N", help="frames given (default: 1 into the last block: 5)")
    add("--fps", type=frame_rate, help="frame rate to read at (default: each file's own)")
    add("--num-workers", type=at_least(0), default=1, metavar="N", help="processes that decode ahead (default: 1)")
    return parse(parser, REQUIRED)


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from autoregressive.condition import encode_condition
from autoregressive.sample_job import SampleJob, Wanted
from autoregressive.sampler import Request
from tokenizer.common.clip_shape import sides
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.clip_stream import ClipRule, Rest, Skipped, SourceClip, VideoSource, find_sources, stream_clips
from tokenizer.data.datasets import find_kinetics
from tokenizer.data.files import path_in_environment
from tokenizer.data.video_io import display_name, resize, resize_center_crop, to_model_range

INSTEAD = "give --vid_path DIR for any folder of videos instead"


def main() -> None:
    args = parse_arguments()
    sources = sources_of(args)[: args.sample_num]
    job = SampleJob(args)
    check_prefix(job, args)
    given = Given(job, args.condition_frames, args.orig_aspect_ratio)
    job.start(
        task="frame prediction", given_frames=given.num_frames, orig_aspect_ratio=args.orig_aspect_ratio, fps=args.fps
    )
    own = sources[job.process.rank :: job.process.world]
    to_come = sum(job.folder.record(name_of(source)) is None for source in own)
    rule = ClipRule(job.tokenizer.config.num_frames, size=None, fps=args.fps)
    job.make(wanted_clips(job, given, stream_clips(own, rule, args.num_workers, job.folder.is_done)), to_come)
    job.finish({"frame_prediction": [name_of(source) for source in sources]}, args.fps or 25.0)


def wanted_clips(job: SampleJob, given: Given, clips: Iterator[SourceClip | Skipped | Rest]) -> Iterator[Wanted]:
    """The first clip of every video that is long enough; the others are printed and recorded as skipped."""
    for item in clips:
        if isinstance(item, Rest):  # of the first clip alone nothing is asked that could leave one
            continue
        reason = item.reason if isinstance(item, Skipped) else given.missing(item)
        if reason:
            tqdm.write(f"skipped {item.source.file}: {reason}", file=sys.stderr)
            job.folder.add_skipped(name_of(item.source), item.source.file, reason)
        elif isinstance(item, SourceClip) and item.decoded:
            frames_THWC, condition_L = given.read(item.decoded.frames_THWC)
            request = Request(("clip", item.name), condition_L=condition_L, rule=job.rule)
            record = {"class": None, "file": item.source.file, "start": item.start, "fingerprint": item.fingerprint}
            yield Wanted(item.name, request, record, item.decoded.fps, frames_THWC, given.num_frames)


class Given:
    """What the model is given of a clip: how many frames, and their codes."""

    def __init__(self, job: SampleJob, num_frames: int | None, keep_aspect_ratio: bool) -> None:
        """Raises UserError unless the frames end in the last block of the model's prefix."""
        self.tokenizer, self.lengths = job.tokenizer, job.layout.condition_lengths
        block = self.tokenizer.config.patch_frames
        least, most = (len(self.lengths) - 1) * block + 1, len(self.lengths) * block
        self.num_frames = num_frames or least
        self.keep_aspect_ratio = keep_aspect_ratio
        if not least <= self.num_frames <= most:
            raise UserError(
                f"--condition-frames {num_frames}: a prefix of {len(self.lengths)} block(s) of {block} frames "
                f"takes {least} to {most}"
            )

    def missing(self, clip: SourceClip) -> str | None:
        """Why a clip is too short; None if it is not."""
        if clip.decoded is None:
            return None
        num_real = len(clip.decoded.frames_THWC) - clip.decoded.num_padded
        return (
            f"has {num_real} frame(s), and the condition needs {self.num_frames}"
            if num_real < self.num_frames
            else None
        )

    def read(self, frames_THWC: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Decoded frames -> frames of the tokenizer's size, and the codes of the given ones, int64 [L] on the CPU.

        The last given frame is repeated up to the end of its block; later frames are never read.
        """
        size = sides(self.tokenizer.config.size)
        frames_THWC = resize_center_crop(frames_THWC, size) if self.keep_aspect_ratio else resize(frames_THWC, *size)
        video_1CTHW = to_model_range(frames_THWC)[None]
        return frames_THWC, encode_condition(self.tokenizer, video_1CTHW, self.num_frames, self.lengths)[0]


def check_prefix(job: SampleJob, args: argparse.Namespace) -> None:
    """Raises UserError for a model without a prefix, and if --fixed-prefix is not the one it was trained with."""
    trained = job.layout.condition_lengths
    if not trained:
        raise UserError(f"{args.gpt_ckpt}: is a class-to-video model; use scripts/test/sample_c2v_visualization.sh")
    if args.fixed_prefix is None:
        return
    prefix = parse_lengths("--fixed-prefix", args.fixed_prefix)
    for length in prefix:
        if length not in job.layout.levels:
            raise UserError(
                f"--fixed-prefix {args.fixed_prefix}: {length} is none of the levels {list(job.layout.levels)}"
            )
    if len(prefix) > job.layout.num_blocks:
        raise UserError(f"--fixed-prefix {args.fixed_prefix}: longer than the {job.layout.num_blocks} blocks of a clip")
    if prefix != trained:
        raise UserError(
            f"--fixed-prefix {args.fixed_prefix}: {args.gpt_ckpt} was trained with {','.join(map(str, trained))}"
        )


def sources_of(args: argparse.Namespace) -> list[VideoSource]:
    """The videos to continue. Raises UserError if none is named, or K600 is not found."""
    if (args.dataset is None) == (args.vid_path is None):
        raise UserError("give either --dataset k600_val or --vid_path DIR")
    if args.vid_path is not None:
        own_results = os.path.realpath(args.sample_dir)
        return find_sources(args.vid_path, lambda path: Path(os.path.realpath(path)).is_relative_to(own_results))
    root, list_file = (path_in_environment(name, INSTEAD) for name in ("K600_ROOT", "K600_VAL_FILE"))
    listed = list(find_kinetics(root, list_file))
    found = [
        VideoSource(path, display_name(path.relative_to(root)), Path(name).name) for name, path, _ in listed if path
    ]
    if not found:
        raise UserError(f"K600_ROOT={root}: holds none of the {len(listed)} videos of {list_file}; {INSTEAD}")
    if len(found) < len(listed):
        print(f"{len(listed) - len(found)} of the {len(listed)} videos in {list_file.name} are not below {root}")
    return found


def name_of(source: VideoSource) -> str:
    """Of the sample that continues a video."""
    return SourceClip(source, 0, "", None).name


if __name__ == "__main__":
    run_cli(main)
