"""Flags of the evaluation commands. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

from tokenizer.common.cli import EXTRACTORS, Parser, at_least
from tokenizer.common.clip_shape import size_argument

MIN_CLIPS = 256  # with fewer clips the bias of a Frechet distance exceeds the distance
REQUIRED = ("protocol", "out")
_READERS = 2


def add_common_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--protocol", metavar="NAME", help="see python -m evaluations.protocols")
    add("--out", metavar="DIR", help="results folder; a stopped evaluation in it is continued")
    add("--data", metavar="PATH", help="manifest .csv or folder of videos (default: UCF_ROOT, K600_ROOT)")
    add("--ours", metavar="DIR", help="score these lossless clips (.npy, FFV1; a folder of samples) instead of a model")
    add("--tok-config", metavar="T.yaml", help="YAML of the tokenizer, checked against its weights")
    add("--vq-ckpt", metavar="T", help="weights of the tokenizer: .safetensors or a run folder")
    add("--extractor", choices=(*EXTRACTORS, "none"), help="another extractor than the protocol's: marked as changed")
    add("--extractor-weights", metavar="PATH", help="i3d: TorchScript file or address; videomae: folder")
    add("--extractor-sha256", metavar="HEX", help="its expected hash; required for an address")
    add("--perceptual", metavar="NAME", help="another LPIPS than the protocol's, or none: marked as changed")
    add("--count", type=at_least(1), metavar="N", help="another number of clips: marked as changed")
    add("--num-frames", type=at_least(1), metavar="N", help="frames of a clip, for tokenizers of another shape than "
        "the protocol's: marked as changed")  # fmt: skip
    add("--size", type=size_argument, metavar="N", help="pixels, 64 or 96x160 (height x width): marked as changed")
    add("--draws", type=at_least(1), metavar="N", help="draws of the bootstrap: marked as changed")
    add("--force", action="store_true", help=f"Frechet distance on fewer than {MIN_CLIPS} clips; lossy video in --ours")
    cache = "results/eval_cache"
    add("--cache", metavar="DIR", default=cache, help=f"features of real clips (default: {cache})")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--num-workers", type=at_least(1), default=_READERS, metavar="N", help="processes that read clips ahead and "
        f"count frames (default: {_READERS})")  # fmt: skip
    add("--batch-size", type=at_least(1), metavar="N", help="clips of a batch in all networks; the last "
        "digits of a result depend on it (default: 1 on a CPU, 8 on a GPU)")  # fmt: skip
    add("--overwrite", action="store_true", help="remove the earlier results in --out and start again")
