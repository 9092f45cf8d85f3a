"""FVD of frame prediction: the first frames of each real clip are given, the GPT writes the whole clip.

    bash scripts/test/eval_frame_pred.sh --protocol k600-fp-50k-64px --tok-config T.yaml --vq-ckpt T \\
        --gpt-model GPT-L --gpt-ckpt G --check-special-token-mask --out results/eval/fp

The given frames are generated again, so every frame that is scored is the model's own. `--ours DIR` scores a folder
that a sampling command wrote.

Letters: C T H W, K tokens of a block, L codes of the given frames.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.sampler import Request
from evaluations.clip_list import ListedClip
from evaluations.generation import Generator, add_sampling_flags, check_task
from evaluations.job import Evaluation, FolderMaker, add_common_flags, check_tokenizer, parse
from tokenizer.common.arguments import Parser
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.video_io import to_model_range
from tokenizer.model import VideoTokenizer
from tokenizer.streaming import Past, encode_block, read_patches


def parse_arguments() -> argparse.Namespace:
    """The command line, spelt as in the README."""
    parser = Parser("Score the clips that a GPT continues from their first frames, under a named protocol.")
    add_common_flags(parser)
    add_sampling_flags(parser)
    return parse(parser)


def main() -> None:
    args = parse_arguments()
    evaluation = Evaluation(args, "frame_prediction")
    protocol, clips = evaluation.protocol, evaluation.clips
    if args.ours is not None:
        evaluation.run(FolderMaker(args.ours, len(clips.clips), protocol.num_frames, args.force))
        return
    generator = Generator(evaluation)
    check_task(generator, frame_prediction=True)
    check_tokenizer(protocol, generator.tokenizer)
    prefix, given, block = (
        generator.layout.condition_lengths,
        protocol.condition_frames,
        generator.tokenizer.config.patch_frames,
    )
    if not (len(prefix) - 1) * block < given <= len(prefix) * block:
        raise UserError(f"protocol {protocol.name} gives {given} frames, the model {len(prefix)} block(s) of {block}")

    def request_of(clip: ListedClip) -> tuple[Request, dict[str, Any]]:
        real_THWC = clip.read()
        condition_L = given_codes(generator.tokenizer, real_THWC, given, prefix)
        request = Request(("clip", clip.name), condition_L=condition_L, rule=generator.rule)
        return request, {"real_THWC": real_THWC}

    generator.request_of = request_of
    evaluation.run(generator)


@torch.no_grad()
def given_codes(tokenizer: VideoTokenizer, real_THWC: np.ndarray, num_given: int, prefix: tuple[int, ...]) -> Tensor:
    """The codes of the first frames, int64 [L] on the CPU; the last one is repeated up to the end of its block."""
    seen = np.minimum(np.arange(len(real_THWC)), num_given - 1)
    video_BCTHW = to_model_range(real_THWC[seen])[None].to(tokenizer.device)
    patches, past, codes = read_patches(tokenizer, video_BCTHW), Past.empty(tokenizer), []
    for t, length in enumerate(prefix):
        code_1K, encoder = encode_block(tokenizer, patches, t, length, past)
        past = replace(past, encoder=encoder)
        codes.append(code_1K[0])
    return torch.cat(codes).cpu()


if __name__ == "__main__":
    run_cli(main)
