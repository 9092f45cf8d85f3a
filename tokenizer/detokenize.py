"""A file of tokens -> a video, or a range of it, in constant memory.

    python -m tokenizer.detokenize TOKENS.safetensors --out VIDEO.mp4 --vq_ckpt T.safetensors [--from 12.5 --to 20]

`--source ORIGINAL` copies its sound; `--side-by-side` shows original | reconstruction. Frames keep their own times.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizer.common.cli import Parser, answer_help, at_least


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Turn a file of tokens back into a video.")
    add = parser.add_argument
    add("tokens", metavar="TOKENS", help="what python -m tokenizer.tokenize wrote")
    add("--out", required=True, type=Path, metavar="VIDEO", help="the video to write, .mp4 or .mkv")
    add("--vq_ckpt", required=True, help="weights of the tokenizer that made the tokens")
    add("--tok_config", help="YAML of the tokenizer, checked against its weights")
    add("--from", dest="start", type=float, default=0.0, metavar="SECONDS", help="begin here (default: 0)")
    add("--to", dest="end", type=float, metavar="SECONDS", help="end before this (default: the end)")
    add("--source", metavar="VIDEO", help="the original, whose sound is copied")
    add("--side-by-side", action="store_true", help="original | reconstruction; needs --source")
    add("--display-size", type=at_least(2), metavar="PIXELS", help="short side of a picture (default: the tokenizer's)")
    add("--lossless", action="store_true", help="RGB without loss, to be measured rather than watched")
    add("--batch-size", type=at_least(1), default=4, metavar="N", help="clips decoded together")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import contextlib
import time
from collections.abc import Generator, Iterator

import numpy as np
import torch

from tokenizer.common.clip_shape import sides
from tokenizer.common.device import pick_device
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.work_units import progress_bar
from tokenizer.data.clip_stream import find_sources
from tokenizer.data.safe_decode import decode_video
from tokenizer.data.video_io import VideoWriter, resize, resize_center_crop, to_uint8
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.token_file import TokenFile


def main() -> None:
    args = parse_arguments()
    if args.side_by_side and not args.source:
        raise UserError("--side-by-side needs the original: give --source VIDEO")
    file = TokenFile(args.tokens)
    span = (args.start, file.duration if args.end is None else args.end)
    wanted = file.frames_between(*span)
    if args.source:
        check_source(file, args.source)
    model = load_tokenizer(args.vq_ckpt, pick_device(args.device), args.tok_config)
    size = sides(file.facts.size)
    shown_size = [side * (args.display_size or min(size)) // min(size) for side in size]
    began = time.perf_counter()
    squared_error, num_numbers = 0.0, 0
    with contextlib.ExitStack() as stack:
        crf = None if args.lossless else 18
        writer = stack.enter_context(VideoWriter(args.out, file.facts.fps, crf, args.source, span))
        shown = decode_range(model, file, wanted, args.batch_size)
        originals = stack.enter_context(contextlib.closing(read_originals(file, args, wanted)))
        bar = stack.enter_context(progress_bar(total=len(wanted), unit="frame"))
        for frames_THWC, frame_T in shown:
            picture_THWC = resize(frames_THWC, *shown_size)
            if args.side_by_side:
                real_THWC = next(originals)
                small_THWC = resize_center_crop(real_THWC, file.facts.size)
                squared_error += float(((small_THWC.astype(np.float32) - frames_THWC) ** 2).sum())
                num_numbers += frames_THWC.size
                picture_THWC = np.concatenate([resize_center_crop(real_THWC, shown_size), picture_THWC], axis=2)
            writer.add(picture_THWC, file.second_F[frame_T.start : frame_T.stop].tolist())
            bar.update(len(frame_T))
    took = time.perf_counter() - began
    psnr = ""
    if num_numbers:
        psnr = f", PSNR {10 * np.log10(255**2 * num_numbers / max(squared_error, 1e-9)):.2f} dB over all frames"
    print(
        f"{len(wanted)} frames from {span[0]:g} to {span[1]:.2f} s{psnr}; {len(wanted) / took:.1f} frames/s; {args.out}"
    )


def decode_range(
    model: VideoTokenizer, file: TokenFile, wanted: range, batch_size: int
) -> Iterator[tuple[np.ndarray, range]]:
    """(uint8 frames of one clip, their numbers) for the wanted frames; equal to those of `decode` of the whole."""
    T = file.facts.num_frames
    first, last = wanted.start // T, (wanted.stop - 1) // T + 1
    for start, tokens in file.batches(first, last, batch_size):
        for b, video_CTHW in enumerate(model.decode(tokens)):
            begin = (start + b) * T
            frame_T = range(max(begin, wanted.start), min(begin + T, wanted.stop))
            yield to_uint8(video_CTHW)[frame_T.start - begin : frame_T.stop - begin], frame_T


def read_originals(file: TokenFile, args: argparse.Namespace, wanted: range) -> Generator[np.ndarray, None, None]:
    """The original's frames at their own size, clip by clip, cut to the wanted ones."""
    if not args.side_by_side:
        return
    facts = file.facts
    T, first = facts.num_frames, wanted.start // facts.num_frames
    clips = decode_video(args.source, T, None, facts.read_at, facts.backend, skip=first)
    with contextlib.closing(clips):
        for clip in clips:
            begin, num_shown = clip.start, len(clip.seconds)
            yield clip.frames_THWC[max(0, wanted.start - begin) : min(num_shown, wanted.stop - begin)]


def check_source(file: TokenFile, path: str) -> None:
    """Raises UserError if the tokens are of another video."""
    source = find_sources(path, lambda path: False)[0]
    if source.fingerprint() != file.facts.source:
        raise UserError(f"{path} is not the video that {file.path} was made from; give that one as --source")


if __name__ == "__main__":
    with torch.inference_mode():
        run_cli(main)
