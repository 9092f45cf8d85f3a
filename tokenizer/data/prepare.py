"""One-off transcode for fast training: small frames and a keyframe every 8, so that a random clip is cheap to reach.

    python -m tokenizer.data.prepare M.csv --out DIR [--short-side 128] [--fps 3] [--workers 2]

Writes DIR/videos/*.mp4 and DIR/manifest.csv, which takes the place of M.csv in a config. H.264 loses a little, so
prepared videos are for training; measure on the originals. Without --fps a copy keeps the time of every picture, also
of a variable frame rate. Rerun the same command to resume; a source whose content changed is prepared again. A video
that cannot be read is named in DIR/skipped.json and left out; unsupported features are named in DIR/notes.json.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tokenizer.common.cli import Parser, answer_help, at_least, frame_rate


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Transcode the videos of a manifest once, so that training reads them many times faster.")
    parser.add_argument("manifest", type=Path, help="the .csv of the videos")
    parser.add_argument("--out", required=True, type=Path, help="folder of the copies and their manifest.csv")
    parser.add_argument("--short-side", type=at_least(16), default=128, help="pixels; never enlarged (default: 128)")
    parser.add_argument("--fps", type=frame_rate, help="frame rate of the copies (default: each file's own)")
    parser.add_argument("--crf", type=at_least(0), default=16, help="H.264 quality, lower is better (default: 16)")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=at_least(1), default=cores, metavar="N", help=f"at once (default: {cores})")
    parser.add_argument("--backend", choices=("pyav", "decord"), default="pyav", help="video reader (default: pyav)")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import contextlib
import hashlib
import json
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from tqdm import tqdm

from tokenizer.common.checkpoint import atomic_write, written_aside
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.work_units import map_ahead
from tokenizer.data.cutting import StreamEnd, Timing
from tokenizer.data.safe_decode import decode_clips, fingerprint_of, timing_of
from tokenizer.data.video_io import DecodedClip, VideoError, display_name, exact_rate, file_slug, resize
from tokenizer.data.video_table import ManifestRow, read_rows, write_rows

KEYFRAME_EVERY = 8


@dataclass(frozen=True)
class PrepareRule:
    """short_side: videos are made this small, never larger, and not cropped. fps: None keeps each file's own."""

    short_side: int = 128
    fps: float | None = None
    crf: int = 16  # H.264 quality; lower is better and larger
    backend: str = "pyav"

    def name_of(self, source: Path, content: str) -> str:
        """File name of the copy: another one for every source, content (a fingerprint) and rule."""
        facts = repr((os.fsencode(source), content, self.short_side, self.fps, self.crf))
        return f"{file_slug(source.stem)}-{hashlib.sha256(facts.encode()).hexdigest()[:10]}.mp4"


def prepare_video(source: Path, target: Path, rule: PrepareRule) -> list[str]:
    """One video -> `target`, which appears complete or not at all. Returns the unsupported features of the video.

    The decoding is done in another process. Raises VideoError if the source cannot be read to its end, OSError on a
    full disk.
    """
    # Frame by frame: memory does not grow with the video, and none of its end is lost to a whole number of clips.
    frames = decode_clips(source, 1, None, rule.fps, all_clips=True, backend=rule.backend)
    timing = timing_of(source) if rule.fps is None else None
    with contextlib.closing(frames), written_aside(target, f".writing-{uuid.uuid4().hex}.mp4") as aside:
        return _encode(frames, aside, rule, None if timing is None or timing.is_constant() else timing)


def prepare(manifest: Path, out: Path, rule: PrepareRule, num_threads: int) -> tuple[int, list[dict[str, str]]]:
    """All videos of a manifest -> DIR/videos and DIR/manifest.csv. Returns their number, and the skipped files."""
    videos = out / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    for leftover in videos.glob(".writing-*"):
        leftover.unlink()
    skipped: list[dict[str, str]] = []
    noted: list[dict[str, str]] = []

    def work(row: ManifestRow) -> tuple[ManifestRow, Path | None, str | None]:
        source = row.file(manifest)
        try:
            target = videos / rule.name_of(source, fingerprint_of(source))
            if not target.exists():
                for note in prepare_video(source, target, rule):
                    noted.append({"path": display_name(row.path), "note": note})
        except VideoError as error:
            return row, None, error.reason
        return row, target, None

    def rows() -> Iterator[ManifestRow]:
        for row, target, reason in tqdm(map_ahead(work, read_rows(manifest), num_threads), unit="video", disable=None):
            if target is not None:
                yield ManifestRow(str(target.relative_to(out)), row.label)
            else:
                skipped.append({"path": display_name(row.path), "reason": reason or ""})

    num_done = write_rows(out / "manifest.csv", rows())
    atomic_write(out / "skipped.json", json.dumps(skipped, indent=1).encode())
    if noted:
        atomic_write(out / "notes.json", json.dumps(noted, indent=1).encode())
    return num_done, skipped


def _encode(
    frames: Generator[DecodedClip, None, StreamEnd], path: Path, rule: PrepareRule, timing: Timing | None
) -> list[str]:
    """timing: of a source with a variable frame rate, whose pictures keep their times."""
    first = next(frames)
    notes = dict.fromkeys(first.notes)
    height, width = _even_size(first.frames_THWC, rule.short_side)
    # fastdecode leaves out the parts that are slow to decode: deblocking, CABAC, weighted prediction
    options = {"crf": str(rule.crf), "preset": "medium", "tune": "fastdecode", "g": str(KEYFRAME_EVERY), "bf": "0"}
    with av.open(str(path.absolute()), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=exact_rate(first.fps), options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1
        tick = None if timing is None else Fraction(*timing.tick)
        if tick is not None:
            stream.codec_context.time_base = tick
        clip: DecodedClip | None = first
        number = 0
        while clip is not None:
            if clip.frames_THWC.shape[1:3] != first.frames_THWC.shape[1:3]:
                notes[f"size: changes after {number} pictures; the rest is left out"] = None
                break
            image_HWC = resize(clip.frames_THWC, height, width)[0]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
            if timing is not None and tick is not None:
                if number >= len(timing.pts):
                    raise VideoError(path, f"has more than the {len(timing.pts)} pictures that it lists times for")
                frame.pts, frame.time_base = timing.pts[number], tick
            container.mux(stream.encode(frame))
            number += 1
            try:
                clip = next(frames)
            except StopIteration as end:
                clip = None
                notes |= dict.fromkeys(end.value.notes)
        container.mux(stream.encode())
    return list(notes)


def _even_size(frames_THWC: np.ndarray, short_side: int) -> tuple[int, int]:
    """The size of the copy: short side as asked or as it is, both sides even, which H.264 wants."""
    height, width = frames_THWC.shape[1:3]
    scale = min(1.0, short_side / min(height, width))
    return max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2))


def main() -> None:
    args = parse_arguments()
    rule = PrepareRule(args.short_side, args.fps, args.crf, args.backend)
    num_done, skipped = prepare(args.manifest, args.out, rule, args.workers)
    if not num_done:
        raise UserError(f"none of the {len(skipped)} videos could be read, see {args.out / 'skipped.json'}")
    print(f"{args.out / 'manifest.csv'}: {num_done} videos; {len(skipped)} skipped")


if __name__ == "__main__":
    run_cli(main)
