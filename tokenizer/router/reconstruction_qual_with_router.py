"""The main job: reconstruct videos with as many tokens per temporal block as the router gives them, and report.

    python tokenizer/router/reconstruction_qual_with_router.py --vid_path DIR --save_dir OUT \\
        --router_config R.yaml --router_ckpt R.safetensors --tok_config T.yaml --vq_ckpt T.safetensors

Writes OUT/clips/<clip>/ (original, reconstruction, both side by side with the tokens of each block, the tokens
themselves), OUT/metrics.json, OUT/skipped.json and OUT/report.html. Rerun the same command to resume.

This file is the command line; the job is reconstruct.py.
"""

from __future__ import annotations

import argparse
import os

from tokenizer.common.cli import BUDGET_FORMS, TRADE_OFF_HELP, Parser, add_tokenizing_flags, answer_help, at_least


def parse_arguments() -> argparse.Namespace:
    about = "Reconstruct videos with as many tokens per temporal block as the router, or a budget, gives them."
    parser = Parser(about)
    add = parser.add_argument
    add("--vid_path", required=True, help="a folder of videos (searched recursively) or one file")
    add("--save_dir", required=True, help="results folder; an unfinished job in it is resumed")
    add_tokenizing_flags(parser)
    add("--budget", type=str.strip, default="router", help=f"{BUDGET_FORMS} (default: router)")
    add("--trade-off", type=float, metavar="W_Q", help=TRADE_OFF_HELP)
    add("--max-clips", type=at_least(1), metavar="N", help="stop after N clips")
    add(
        "--all-clips",
        action="store_true",
        help="all clips of 16 frames of a video, not only the first; fewer than 16 left over are dropped and counted",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add(
        "--num-workers",
        type=at_least(0),
        default=cores,
        metavar="N",
        help=f"processes that decode ahead, and threads that write videos (default: as many as cores, here {cores})",
    )
    add("--no-videos", action="store_true", help="write tokens, figures and the report, but no mp4 files")
    add(
        "--compare-uniform",
        action="store_true",
        help="reconstruct each clip also at about as many tokens, the same in every block (twice the model time)",
    )
    add("--overwrite", action="store_true", help="remove the earlier results in --save_dir and start again")
    networks = "lpips_vgg | lpips_alex | stlpips_vgg | stlpips_alex | none | auto (lpips_vgg or stlpips_alex; default)"
    add("--perceptual", default="auto", metavar="NAME", help=networks)
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

from tokenizer.common.errors import run_cli
from tokenizer.router.reconstruct import reconstruct_videos


def main() -> None:
    reconstruct_videos(parse_arguments())


if __name__ == "__main__":
    run_cli(main)
