"""Named sizes; build or load a tokenizer. `python -m tokenizer.presets` lists the sizes."""

from __future__ import annotations

import argparse

from tokenizer.common.cli import Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("List the named tokenizers and routers with their parameters by part.")
    parser.add_argument("--json", action="store_true", help="print one JSON object: name -> {total, parts}")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tokenizer.common.config import differences, load_section, to_dict
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.hub import parameters_by_part
from tokenizer.model import TokenizerConfig, TransformerConfig, VideoTokenizer

PRESETS: dict[str, TokenizerConfig] = {
    # the paper's S-B: encoder small, decoder base; 16384 codes, or 8192 for UCF-101 + K600
    "VQ_SB": TokenizerConfig(),
    "VQ_SB_8192": TokenizerConfig(codebook_size=8192),
    # encoder small, decoder large: the paper's names with the next size of its family (24 layers of 1024, 16 heads)
    "VQ_SL": TokenizerConfig(decoder=TransformerConfig(layers=24, width=1024, heads=16)),
    # 16x64x64 clips, the paper's ratios; what ckpts/mini holds
    "VQ_mini": TokenizerConfig(
        size=64,
        levels=[8, 16, 32, 64, 128],
        codebook_size=2048,
        bottleneck_width=64,
        encoder=TransformerConfig(layers=2, width=96, heads=3),
        decoder=TransformerConfig(layers=3, width=128, heads=4),
    ),
    # seconds on a CPU, for tests
    "VQ_debug": TokenizerConfig(
        size=32,
        levels=[2, 4, 8],
        codebook_size=64,
        bottleneck_width=16,
        encoder=TransformerConfig(layers=2, width=32, heads=2),
        decoder=TransformerConfig(layers=2, width=48, heads=2),
    ),
}


def build_tokenizer(which: str | TokenizerConfig, **changes: object) -> VideoTokenizer:
    """A fresh tokenizer, by preset name or config; `changes` replace fields of it."""
    if isinstance(which, str):
        if which not in PRESETS:
            raise UserError(f"no tokenizer preset {which!r}; there are {', '.join(PRESETS)}")
        which = PRESETS[which]
    return VideoTokenizer(replace(which, **changes))  # type: ignore[arg-type]


def load_tokenizer(
    path: str | Path, device: str | torch.device = "cpu", config_path: str | Path | None = None
) -> VideoTokenizer:
    """A trained tokenizer from a .safetensors file, a folder, or "owner/name" on the hub; the file holds the config.

    `config_path`: a YAML whose `model` section must agree with it. Raises UserError naming both files and every
    differing key if it does not, and for damaged, pickled or foreign files.
    """
    model = VideoTokenizer.from_pretrained(path, device=device)
    if config_path is not None:
        wanted = load_section(TokenizerConfig, config_path, "model")
        if different := differences(to_dict(wanted), to_dict(model.config)):
            raise UserError(f"{config_path} and {path} do not belong together; model differs in {'; '.join(different)}")
    return model


def print_sizes(listing: Mapping[str, Mapping[str, int]], as_json: bool) -> None:
    """name -> parameters by part, as text or as JSON."""
    if as_json:
        print(json.dumps({name: {"total": sum(parts.values()), "parts": parts} for name, parts in listing.items()}))
        return
    for name, parts in listing.items():
        print(f"{name}: {sum(parts.values()) / 1e6:.2f}M")
        print("\n".join(f"    {part:<18} {count / 1e6:9.3f}M" for part, count in parts.items()))


def main() -> None:
    from tokenizer.router.model import Router, RouterConfig

    routers = {"router": RouterConfig(), "router_vjepa2": RouterConfig(stem="vjepa2")}  # Table 8 of arXiv 2603.12267
    as_json = parse_arguments().json
    with torch.device("meta"):
        listing = {name: parameters_by_part(VideoTokenizer(config)) for name, config in PRESETS.items()}
        listing |= {name: parameters_by_part(Router(config)) for name, config in routers.items()}
    print_sizes(listing, as_json)


if __name__ == "__main__":
    run_cli(main)
