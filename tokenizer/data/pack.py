"""Render or decode the clips of data sources once, into one file that a config reads in their stead.

    python -m tokenizer.data.pack OUT.safetensors --sources doom:train:8000 --size 72 [--crf 21]

data.sources: [OUT.safetensors] then gives the same clips under the same names and labels, at --size without the random
start that `augment: true` takes, and without their cost; OUT.safetensors:0-6000 gives the first 6000. Pack somewhat
larger than data.size, and crops of a config with crop_scale below 1 have room: a stored clip is never scaled up.
Without --crf every pixel is kept and a read is a copy; with it a clip takes about 5 KB and some milliseconds to decode.
A packed file may be packed anew, compressed or not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizer.common.cli import Parser, answer_help, at_least
from tokenizer.common.clip_shape import size_argument


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Pack the clips of data sources into one file.")
    parser.add_argument("file", type=Path, metavar="OUT.safetensors", help="what to write")
    parser.add_argument("--sources", nargs="+", required=True, help="data.sources of a config, see scripts/README.md")
    parser.add_argument("--size", type=size_argument, default=72, help="side, or 96x160: height x width (default: 72)")
    parser.add_argument("--num-frames", type=at_least(1), default=16, help="frames of a clip (default: 16)")
    parser.add_argument("--crf", type=at_least(0), help="compress: 18 fine, 24 coarse (default: keep every pixel)")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_args)  # before torch is imported

import os
import tempfile

import numpy as np
from tqdm import tqdm

from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.clip_store import StoredClip, compress, write_compressed, write_raw
from tokenizer.data.clips import ClipDataset, DataConfig, build_dataset
from tokenizer.data.sources import SCENES
from tokenizer.data.video_io import to_uint8


def pack_clips(clips: ClipDataset, path: Path, crf: int | None = None) -> int:
    """Write every clip that can be read; how many. UserError if none can."""
    known: list[StoredClip] = []
    encoded: list[tuple[bytes, list[int]]] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as raw:  # without a name: a killed run leaves nothing
        for number, clip in clips.readable(tqdm(range(len(clips)), desc="packing clips", unit="clip")):
            frames_THWC = to_uint8(clip.video_CTHW)
            if crf is None:
                raw.write(frames_THWC.tobytes())  # a full disk would kill who writes to a memory map
            else:
                encoded.append(compress(frames_THWC, crf))
            known.append(StoredClip(clips.names[number], clip.label, clip.kind))
        if not known:
            raise UserError(f"{', '.join(clips.cfg.sources)}: not one of {len(clips)} clips can be read")
        facts = {"sources": clips.cfg.sources, "versions": {"scenes": SCENES, "crf": crf}}
        if crf is None:
            raw.flush()
            write_raw(path, np.memmap(raw, np.uint8, "c", shape=(len(known), *frames_THWC.shape)), known, facts)
        else:
            write_compressed(path, encoded, known, facts)
    return len(known)


def main() -> None:
    args = parse_args()
    if args.file.suffix != ".safetensors":
        raise UserError(f"{args.file}: must end in .safetensors, so that a config knows it for a packed file")
    config = DataConfig(args.sources, num_frames=args.num_frames, size=args.size, augment=False)
    clips = build_dataset(config)
    packed = pack_clips(clips, args.file, args.crf)
    size = os.path.getsize(args.file) / 2**20
    print(f"{args.file}: {packed} clips, {size:.1f} MiB; {len(clips) - packed} clips skipped")


if __name__ == "__main__":
    run_cli(main)
