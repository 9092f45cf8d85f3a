"""Fetch the weights of the frozen encoders once, for machines without internet.

python -m tokenizer.frozen.download                        # both published encoders, into the library's cache
python -m tokenizer.frozen.download vjepa2 --to DIR        # one, as a folder that can be copied: weights=DIR/vjepa2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizer.common.cli import Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Fetch the weights of the frozen encoders once.")
    parser.add_argument("encoder", nargs="?", choices=("vjepa2", "videomae"), help="which; default: all of them")
    parser.add_argument("--name", help="another model of the hub instead of the published one; takes one encoder")
    parser.add_argument("--to", type=Path, metavar="DIR", help="also copy into DIR/ENCODER; default: only the cache")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import shutil

from tokenizer.common.checkpoint import file_sha256
from tokenizer.common.errors import UserError, run_cli
from tokenizer.frozen.encoders import CONFIG_FILE, VIDEOMAE, VJEPA2, WEIGHTS_FILE, Family, fetch

FAMILIES = {family.key: family for family in (VJEPA2, VIDEOMAE)}


def download(family: Family, name: str, target: Path | None) -> Path:
    """Fetch `name`, copy it to `target` if given; returns the folder. UserError if it cannot be had."""
    try:
        folder = fetch(family, name, local_files_only=False)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name!r} cannot be fetched: {first}; this command needs internet, or the name is wrong"
        ) from error
    if target is None:
        return folder
    target.mkdir(parents=True, exist_ok=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(folder / file, target / file)
    return target


def main() -> None:
    args = parse_arguments()
    if args.name and not args.encoder:
        raise UserError("--name goes with one encoder, e.g. `vjepa2 --name facebook/vjepa2-vith-fpc64-256`")
    for key in [args.encoder] if args.encoder else FAMILIES:
        family = FAMILIES[key]
        target = args.to / key if args.to else None
        folder = download(family, args.name or family.hub_name, target)
        print(f"{family.name}: {folder}  sha256 {file_sha256(folder / WEIGHTS_FILE)}")


if __name__ == "__main__":
    run_cli(main)
