"""Flags of the quality-cost evaluation. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import argparse
from pathlib import Path

from autoregressive.flags import GPT_SIZES
from evaluations.flags import MIN_CLIPS
from tokenizer.common.cli import EXTRACTORS, Parser, at_least, frame_rate

TABLE_STRATEGIES = ("threshold", "max-reward")
BUDGET_STRATEGIES = ("tokens", "average", "price", "quality")
STRATEGIES = ("uniform", *TABLE_STRATEGIES, "router", *BUDGET_STRATEGIES)
QUALITY_WEIGHTS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)  # the paper's sweep
FREE = {"extractor": "none", "perceptual": "auto", "draws": 1000, "seed": 0}  # without a protocol
CODEC_NAMES = ("h264", "h265", "av1")  # of evaluations.quality_cost.video_codecs


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Quality-cost curves of strategies and codecs on the same clips.")
    _add_inputs(parser)
    _add_points(parser)
    add = parser.add_argument
    networks = "lpips_vgg | lpips_alex | stlpips_vgg | stlpips_alex | auto (lpips_vgg or stlpips_alex; default)"
    add("--perceptual", metavar="NAME", help=f"{networks}; of a protocol: marked as changed")
    add("--extractor", choices=(*EXTRACTORS, "none"), help="also a Frechet distance (default: none, or the protocol's)")
    add("--extractor-weights", metavar="PATH", help="i3d: TorchScript file or address; videomae: folder")
    add("--extractor-sha256", metavar="HEX", help="its expected hash; required for an address")
    add("--force", action="store_true", help=f"allow a Frechet distance on fewer than {MIN_CLIPS} clips")
    add("--draws", type=at_least(1), metavar="N", help=f"draws of the bootstrap (default: {FREE['draws']})")
    add("--seed", type=int, help=f"seed of the bootstrap (default: {FREE['seed']}, or the protocol's)")
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="assignments decoded together (default: 8)")
    threads = "threads of each process; the last digits depend on it, more processes are faster (default: 1)"
    add("--num-threads", type=at_least(1), default=1, metavar="N", help=threads)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--out", type=Path, default=Path("results/quality_cost"), help="results folder (default: results/quality_cost)")
    return parser.parse_args()


def _add_inputs(parser: Parser) -> None:
    add = parser.add_argument
    add("--tok-config", metavar="T.yaml", help="YAML of the tokenizer, checked against its weights")
    add("--vq-ckpt", metavar="T", help="weights of the tokenizer whose reconstructions are measured")
    add("--router-ckpt", metavar="R", action="append", default=[], help="weights of a router; repeat for other w_q")
    again = "YAML of the router, checked against its weights; one for each --router-ckpt, in the same order"
    add("--router-config", metavar="R.yaml", action="append", default=[], help=again)
    add("--gpt-model", metavar="SIZE", help=f"check that G has this size: {' | '.join(GPT_SIZES)} (default: any)")
    add("--gpt-ckpt", metavar="G", help="class-to-video GPT; adds the size of the tokens entropy-coded by it")
    add("--table", help="quality table of a proxy on these clips, or 'fresh': made now with --vq-ckpt itself")
    add("--protocol", metavar="NAME", help="take clips and networks from this reconstruction protocol, add its card")
    add("--data", metavar="PATH", help="with --protocol: manifest .csv or folder of videos (default: UCF_ROOT)")
    add("--count", type=at_least(1), metavar="N", help="with --protocol: another number of clips, marked as changed")
    sources = "clips without a protocol: folders, files, manifests, bundled:heldout (default: those of --table)"
    add("--sources", nargs="+", metavar="SOURCE", help=sources)
    add("--fps", type=frame_rate, help="frame rate to read --sources at (default: each file's own)")
    add("--max-clips", type=at_least(1), metavar="N", help="the first N clips of --sources only")


def _add_points(parser: Parser) -> None:
    add = parser.add_argument
    names = f"comma-separated: {', '.join(STRATEGIES[:-1])} (default: all that the inputs allow)"
    add("--strategies", default="all", help=names)
    sweep = "w_q of max-reward (default: 0.4 to 2.0)"
    add("--weights", type=numbers, default=QUALITY_WEIGHTS, metavar="W,W", help=sweep)
    thresholds = "distances of the threshold rule (default: deciles of the table)"
    add("--thresholds", type=numbers, default=(), metavar="D,D", help=thresholds)
    budgets = "budgets of the first router (default: tokens and average at the uniform totals)"
    add("--budgets", nargs="+", metavar="FORM:N", help=budgets)
    codecs = f"comma-separated: {', '.join(CODEC_NAMES)}; all | none (default: all that FFmpeg has here)"
    add("--codecs", default="all", help=codecs)


def numbers(text: str) -> tuple[float, ...]:
    """An argparse type: numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers separated by commas") from None
