"""Bring a tokenizer or router that other code saved into our format, or list the content of its file.

    python -m tokenizer.convert FILE.pt                                   # inventory and matches; writes nothing
    python -m tokenizer.convert FILE.pt --to OUT.safetensors [--config THEIRS.yaml] [--map MAP.yaml] [--kind router]

Prepared for the weights that the authors of EVATok published; never tried on them.
The output is written only if every tensor of ours is filled exactly once and none of theirs is left over. Then a
tokenizer reconstructs bundled clips, and its card tells whether the result is a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizer.common.cli import Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Convert a tokenizer or router of other code to our .safetensors.")
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help=".pt, .pth or .safetensors")
    add("--to", type=Path, metavar="OUT", help="the .safetensors to write; without it, list names and matches")
    add("--config", type=Path, metavar="YAML", help="theirs (`init_args`) or ours (default: the paper's S-B)")
    add("--map", type=Path, metavar="YAML", help="lines `theirs: ours` or `theirs: drop`, for names the rules miss")
    add("--kind", choices=("tokenizer", "router"), default="tokenizer", help="what it is (default: tokenizer)")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tokenizer.common.checkpoint import file_sha256, save_model
from tokenizer.common.config import from_dict, read_yaml, to_dict
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.foreign import Rule, convert, read_foreign
from tokenizer.common.image_quality import psnr
from tokenizer.data.files import bundled_videos
from tokenizer.data.video_io import iter_clips, to_model_range
from tokenizer.model import TokenizerConfig, TransformerConfig, VideoTokenizer
from tokenizer.router.model import Router, RouterConfig

TOO_LOW_DB = 20.0  # mean PSNR of held-out clips at LEVEL
LEVEL = 256  # tokens a block in that check; a smaller tokenizer's largest
ABOVE_FLAT_DB = 3.0  # what a smaller tokenizer must reach above clips of one colour
NUM_CLIPS = 8

TOKENIZER_RULES: tuple[Rule, ...] = (
    (r"^s2to1encoder\.", "encoder."),
    (r"^s1to2decoder\.", "decoder."),
    (r"^(encoder|decoder)\.(?:\w+\.)*?(?:layers|blocks|resblocks)\.(\d+)\.", r"\1.\2."),
    (r"\.(self_attn|self_attention|attn1)\.", ".self."),
    (r"\.(multihead_attn|cross_attn|cross_attention|attn2)\.", ".cross."),
    (r"\.norm1\.", ".norm_self."),
    (r"\.norm2\.", ".norm_cross."),
    (r"\.norm3\.", ".norm_mlp."),
    (r"\.(linear1|mlp\.fc1|ffn\.0)\.", ".mlp.0."),
    (r"\.(linear2|mlp\.fc2|ffn\.2)\.", ".mlp.2."),
    (r"^quantizer?\.(embedding|codebook)\.", "quantizer.codebook."),
    (r"^quant_conv\.", "to_latent.1."),
    (r"^post_quant_conv\.", "from_latent.0."),
    (r"^encoder\.(patch_embed|x_embedder|conv_in)(\.proj)?\.", "patch_embed."),
    (r"^encoder\.(query_embed|query_proj)\.", "query_embed."),
    (r"^encoder\.(conv_out|proj_out|output)\.", "to_latent.0."),
    (r"^decoder\.(conv_in|proj_in|input)\.", "from_latent.1."),
    (r"^decoder\.(conv_out|proj_out|output)\.", "to_pixels."),
    (r"^(encoder|decoder)\.(norm|norm_out|final_norm)\.", r"\1_norm."),
)
ROUTER_RULES: tuple[Rule, ...] = (
    (r"^(?:\w+\.)*?(?:layers|blocks|resblocks)\.(\d+)\.", r"layers.\1."),
    (r"\.(attn|self_attn|self_attention)\.", ".attention."),
    (r"\.norm1\.", ".norm_attention."),
    (r"\.norm2\.", ".norm_mlp."),
    (r"\.(linear1|mlp\.fc1)\.", ".mlp.0."),
    (r"\.(linear2|mlp\.fc2)\.", ".mlp.2."),
    (r"^(cls_token|class_token)$", "cls_D"),
    (r"^(patch_embed|x_embedder)(\.proj)?\.", "embed."),
    (r"^(classifier|fc)\.", "head."),
)

# Keys of their `init_args`; the sizes are GigaTok's.
_KEYS = {
    "frame_num": "num_frames",
    "input_size": "size",
    "temporal_patch_size": "patch_frames",
    "patch_size": "patch_size",
    "spatial_token_num_choices": "levels",
    "codebook_size": "codebook_size",
    "codebook_embed_dim": "code_width",
    "z_channels": "bottleneck_width",
}
_SIZES = {
    "small": TransformerConfig(layers=6, width=512, heads=8),
    "base": TransformerConfig(layers=12, width=768, heads=12),
    "large": TransformerConfig(layers=24, width=1024, heads=16),
}
_OF_TRAINING = ("commit_loss_beta", "entropy_loss_ratio", "distill_depth", "codebook_show_usage", "dropout_p")


@dataclass
class Translated:
    """A config of ours, and the keys of theirs that were not understood."""

    config: Any
    unknown: dict[str, Any]


def main() -> None:
    args = parse_arguments()
    file = read_foreign(args.file)
    is_router = args.kind == "router"
    translated = router_config(args.config) if is_router else tokenizer_config(args.config)
    for key, value in translated.unknown.items():
        print(f"note: {args.config}: {key}: {value!r} is not translated")
    model = Router(translated.config) if is_router else VideoTokenizer(translated.config)
    rules, part_of = (ROUTER_RULES, lambda name: "") if is_router else (TOKENIZER_RULES, side_of)
    if not convert(file, args, model, rules, None, part_of, patches_as_ours):
        return
    card = {"kind": args.kind, "converted_from": args.file.name, "source_sha256": file_sha256(args.file)}
    if isinstance(model, VideoTokenizer):
        level = LEVEL if LEVEL in model.config.levels else model.config.levels[-1]
        quality, flat = held_out_psnr(model.eval(), level)
        least = TOO_LOW_DB if level == LEVEL else flat + ABOVE_FLAT_DB
        verdict = "mapped, but does not reconstruct" if quality < least else "mapped, and reconstructs"
        card |= {"psnr": f"{quality:.2f} dB at {level} tokens a block, {NUM_CLIPS} held-out clips", "state": verdict}
    else:
        card["state"] = "mapped, not evaluated"
    save_model(args.to, model.state_dict(), {"model": to_dict(model.config)}, {k: str(v) for k, v in card.items()})
    print(f"{args.to}: {card['state']}" + (f" ({card['psnr']})" if "psnr" in card else ""))


def side_of(name: str) -> str:
    """encoder, decoder, or neither, of a neutral name."""
    if name.startswith(("encoder", "patch_embed", "query_embed", "to_latent")):
        return "encoder"
    return "decoder" if name.startswith(("decoder", "from_latent", "to_pixels")) else ""


def patches_as_ours(name: str, tensor: Tensor) -> Tensor:
    """A patch embedding saved as a 3D convolution -> a matrix over pixels in the order of `patchify`."""
    if name.endswith("embed.weight") and tensor.ndim == 5:
        return rearrange(tensor, "D C pt ph pw -> D (pt ph pw C)")
    return tensor


def tokenizer_config(path: Path | None) -> Translated:
    """Their YAML, or ours, as a TokenizerConfig. Raises UserError for a setting that our model does not have."""
    if path is None:
        return Translated(TokenizerConfig(), {})
    content = read_yaml(path)
    model = content.get("model")
    if not isinstance(model, Mapping):
        raise UserError(f"{path}: no section `model`; it has {', '.join(content)}")
    if "init_args" not in model:
        return Translated(from_dict(TokenizerConfig, model, str(path)), {})
    ours: dict[str, Any] = {}
    unknown = {f"section {key}": "..." for key in content if key != "model"}
    unknown |= {key: value for key, value in model.items() if key not in ("init_args", "model_cls")}
    for key, value in model["init_args"].items():
        if key in _KEYS:
            ours[_KEYS[key]] = value
        elif key in ("encoder_size", "decoder_size"):
            if value not in _SIZES:
                raise UserError(f"{path}: {key} = {value!r} is none of {', '.join(_SIZES)}; give a config of ours")
            ours[key.removesuffix("_size")] = to_dict(_SIZES[value])
        elif key == "codebook_l2_norm":
            if value is not True:
                raise UserError(f"{path}: codebook_l2_norm = {value!r}: our codes have length 1 always")
        elif key not in _OF_TRAINING:
            unknown[key] = value
    return Translated(from_dict(TokenizerConfig, ours, str(path)), unknown)


def router_config(path: Path | None) -> Translated:
    """Ours as a RouterConfig; the form of theirs is not known."""
    if path is None:
        return Translated(RouterConfig(), {})
    model = read_yaml(path).get("model")
    if not isinstance(model, Mapping) or "init_args" in model:
        raise UserError(f"{path}: give a router config of ours, with a section `model`; theirs is not known")
    return Translated(from_dict(RouterConfig, model, str(path)), {})


@torch.no_grad()
def held_out_psnr(model: VideoTokenizer, level: int) -> tuple[float, float]:
    """Mean PSNR in dB of bundled held-out clips at `level` tokens a block, and of their mean colours."""
    c = model.config
    clips = [next(iter_clips(v.path, c.num_frames, c.size)) for v in bundled_videos("heldout")[:NUM_CLIPS]]
    video_BCTHW = torch.stack([to_model_range(clip.frames_THWC) for clip in clips])
    ours_BCTHW = model.decode(model.encode(video_BCTHW, budget=f"uniform:{level}"))
    flat_BCTHW = video_BCTHW.mean(dim=(2, 3, 4), keepdim=True).expand_as(video_BCTHW)
    return float(psnr(ours_BCTHW, video_BCTHW).mean()), float(psnr(flat_BCTHW, video_BCTHW).mean())


if __name__ == "__main__":
    run_cli(main)
