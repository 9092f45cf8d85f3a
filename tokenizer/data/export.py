"""Clips of data sources as video files, to look at them or to give them to a command that takes a folder of videos.

    python -m tokenizer.data.export OUT --sources classed:heldout:10 [--size 64] [--lossless]

Writes OUT/<number>_<class or name>.mp4, the same clips that a config with these sources and `augment: false` reads. One
that cannot be read is named and left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizer.common.cli import Parser, answer_help, at_least, frame_rate
from tokenizer.common.clip_shape import size_argument


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Write the clips of data sources as video files.")
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder for the videos")
    parser.add_argument("--sources", nargs="+", required=True, help="data.sources of a config, see scripts/README.md")
    parser.add_argument("--size", type=size_argument, default=64, help="side, or 96x160: height x width (default: 64)")
    parser.add_argument("--num-frames", type=at_least(1), default=16, help="frames of a clip (default: 16)")
    parser.add_argument("--rate", type=frame_rate, default=8.0, help="frames a second when played (default: 8)")
    parser.add_argument("--lossless", action="store_true", help="every pixel as it is; few players show such files")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_args)  # before torch is imported


from tqdm import tqdm

from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.clips import ClipDataset, DataConfig, build_dataset
from tokenizer.data.video_io import file_slug, to_uint8, write_video


def export_clips(clips: ClipDataset, folder: Path, rate: float, lossless: bool = False) -> int:
    """Write every clip into `folder`, `rate` frames a second; how many there are. UserError when none can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for number, clip in clips.readable(tqdm(range(len(clips)), desc="writing clips", unit="clip")):
        name = f"{number:05d}_{file_slug(clip.label or Path(clip.name).stem)}.mp4"
        write_video(folder / name, to_uint8(clip.video_CTHW), rate, lossless)
        written += 1
    if not written:
        raise UserError(f"{', '.join(clips.cfg.sources)}: not one of {len(clips)} clips can be read")
    return written


def main() -> None:
    args = parse_args()
    config = DataConfig(args.sources, num_frames=args.num_frames, size=args.size, augment=False)
    clips = build_dataset(config)
    written = export_clips(clips, args.folder, args.rate, args.lossless)
    print(f"{args.folder}: {written} videos; {len(clips) - written} clips skipped")


if __name__ == "__main__":
    run_cli(main)
