"""Flags of the sampling commands, and how their values are read. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from tokenizer.common.cli import PRECISION_NAMES, Parser, at_least, positive
from tokenizer.common.errors import UserError

GPT_SIZES = ("GPT-B", "GPT-L", "GPT-LP", "GPT-mini", "GPT-debug")  # the names of autoregressive.presets
REQUIRED = ("tok_config", "vq_ckpt", "gpt_ckpt", "sample_dir")


def add_common_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--tok-config", help="YAML of the tokenizer, checked against its weights")
    add("--vq-ckpt", help="weights of the tokenizer: .safetensors or a run folder")
    add("--sample-dir", help="results folder; unfinished sampling in it is continued")
    add_sampler_flags(parser)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--overwrite", action="store_true", help="remove the earlier samples in --sample-dir and start again")


def add_sampler_flags(parser: Parser) -> None:
    """The GPT and how ids are drawn, for all commands that sample."""
    add = parser.add_argument
    add("--gpt-model", metavar="SIZE", help=f"check that G has this size: {' | '.join(GPT_SIZES)} (default: any)")
    add("--gpt-ckpt", metavar="G", help="weights of the GPT: .safetensors or a run folder")
    add("--per-proc-batch-size", type=at_least(1), default=8, metavar="B", help="clips sampled together (default: 8)")
    mask = "draw valid ids only; without it, invalid clips are counted and have no video"
    add("--check-special-token-mask", action="store_true", help=mask)
    add("--tokens-per-block", metavar="K,K,..", help="force the tokens of each block (or of the first ones)")
    add("--max-tokens", type=at_least(1), metavar="N", help="limit the tokens of a clip, length tokens not counted")
    add("--seed", type=at_least(0), default=0, help="a clip depends on this and its own name (default: 0)")
    add("--temperature", type=positive, default=1.0, help="divides the logits (default: 1)")
    add("--top-k", type=at_least(0), default=0, metavar="K", help="draw among the K likeliest ids; 0: all (default)")
    add("--top-p", type=positive, default=1.0, metavar="P", help="draw among the likeliest ids of total probability P")
    names, precision = " | ".join(PRECISION_NAMES), os.environ.get("PRECISION", "none")
    add("--precision", default=precision, help=f"of the GPT: {names} (default: $PRECISION, else none)")
    add("--compile", action="store_true", help="torch.compile the step: a slower start that pays for many clips")
    add("--no-fused-draw", action="store_true", help="on a GPU: draw ids by torch's kernels, not by one of ours")
    add("--fp8-cache", action="store_true", help="keep keys and values in 8 bits; prints what that changes")


def parse(parser: Parser, required: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; unknown flags are named before missing ones."""
    args = parser.parse_args()
    missing = [f"--{name.replace('_', '-')}" for name in required if getattr(args, name) is None]
    if missing:
        raise UserError(f"missing: {', '.join(missing)} (see --help)")
    return args


def parse_lengths(flag: str, text: str) -> tuple[int, ...]:
    """ "512,128" -> (512, 128). UserError, naming the flag, for anything but whole numbers."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"{flag} {text!r}: give whole numbers with commas between them, such as 512,128")
    return tuple(map(int, parts))


def parse_guidance(text: str) -> tuple[float, ...]:
    """ "2.25" or "3,2,1,1" -> scales. UserError for anything but numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--cfg-scale {text!r}: give a number, or one for each block with commas between") from None
