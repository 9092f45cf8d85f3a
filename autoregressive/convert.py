"""Bring a GPT that other code saved into our format, or list the content of its file; as tokenizer.convert does.

    python -m autoregressive.convert FILE.pt --to OUT.safetensors --gpt-model GPT-LP [--map MAP.yaml]

Reads LlamaGen's spelling and ours. Prepared for the published weights, never tried on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from autoregressive.flags import GPT_SIZES
from tokenizer.common.cli import Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Convert a GPT of other code to our .safetensors.")
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help=".pt, .pth or .safetensors")
    add("--to", type=Path, metavar="OUT", help="the .safetensors to write; without it, list names and matches")
    add("--gpt-model", choices=GPT_SIZES, default="GPT-B", help="its size (default: GPT-B)")
    add("--config", type=Path, metavar="YAML", help="a config of ours, instead of --gpt-model")
    add("--map", type=Path, metavar="YAML", help="lines `theirs: ours` or `theirs: drop`, for names the rules miss")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported


from autoregressive.model import GPT, GPTConfig
from autoregressive.presets import PRESETS
from tokenizer.common.checkpoint import file_sha256, save_model
from tokenizer.common.config import load_section, to_dict
from tokenizer.common.errors import run_cli
from tokenizer.common.foreign import Rule, Split, convert, read_foreign

GPT_RULES: tuple[Rule, ...] = (
    (r"^(?:\w+\.)*?(?:layers|blocks)\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.", "."),
    (r"\.ffn_norm\.", ".feed_norm."),
    (r"\.feed_forward\.w1\.", ".gate."),
    (r"\.feed_forward\.w3\.", ".gated."),
    (r"\.feed_forward\.w2\.", ".from_hidden."),
    (r"^tok_embeddings\.weight$", "embedding.ids"),
    (r"^cls_embedding\.embedding_table\.weight$", "embedding.conditions"),
    (r"^(output|lm_head)\.", "head."),
    (r"^(pos_embed|pos_embedding|pos_embedding\.weight|wpe\.weight)$", "positions"),
)


def splits_of(config: GPTConfig) -> dict[str, Split]:
    """Our fused tensors: gate and value of a SwiGLU; ids and conditions in one table."""
    return {
        r"(.*)\.to_hidden\.weight": Split((r"\1.gate.weight", r"\1.gated.weight")),
        r"embedding\.weight": Split(("embedding.ids", "embedding.conditions"), rows=config.layout.num_ids),
    }


def main() -> None:
    args = parse_arguments()
    file = read_foreign(args.file)
    config = load_section(GPTConfig, args.config, "model") if args.config else PRESETS[args.gpt_model]
    model = GPT(config)
    if not convert(file, args, model, GPT_RULES, splits_of(config)):
        return
    card = {"kind": "gpt", "converted_from": args.file.name, "source_sha256": file_sha256(args.file)}
    save_model(args.to, model.state_dict(), {"model": to_dict(config)}, card | {"state": "mapped, not evaluated"})
    print(f"{args.to}: mapped, not evaluated")


if __name__ == "__main__":
    run_cli(main)
