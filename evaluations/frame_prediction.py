"""FVD of frame prediction: the first frames of each real clip are given, the GPT writes the whole clip.

    bash scripts/test/eval_frame_pred.sh --protocol k600-fp-50k-64px --tok-config T.yaml --vq-ckpt T \\
        --gpt-model GPT-L --gpt-ckpt G --check-special-token-mask --out results/eval/fp

The given frames are generated again, so every frame that is scored is the model's own. `--ours DIR` scores a folder
that a sampling command wrote.

Letters: C T H W, L codes of the given frames.
"""

from __future__ import annotations

import argparse

from autoregressive.flags import add_sampler_flags, parse
from evaluations.flags import REQUIRED, add_common_flags
from tokenizer.common.cli import Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Score the clips that a GPT continues from their first frames, under a named protocol.")
    add_common_flags(parser)
    add_sampler_flags(parser)
    return parse(parser, REQUIRED)


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported


from autoregressive.condition import encode_condition
from autoregressive.sampler import Request
from evaluations.generation import Generator, check_task
from evaluations.job import Evaluation, check_tokenizer
from evaluations.system import Source
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.video_io import to_model_range


def main() -> None:
    args = parse_arguments()
    evaluation = Evaluation(args, "frame_prediction")
    if evaluation.run_ours():
        return
    generator = Generator(evaluation)
    check_task(generator, frame_prediction=True)
    protocol = evaluation.protocol
    check_tokenizer(protocol, generator.tokenizer)
    prefix, given = generator.layout.condition_lengths, protocol.condition_frames
    block = generator.tokenizer.config.patch_frames
    if not (len(prefix) - 1) * block < given <= len(prefix) * block:
        raise UserError(f"protocol {protocol.name} gives {given} frames, the model {len(prefix)} block(s) of {block}")

    def request_of(source: Source) -> Request:
        assert source.real is not None  # a protocol with originals reads them
        video_1CTHW = to_model_range(source.real.frames_THWC)[None]
        condition_L = encode_condition(generator.tokenizer, video_1CTHW, given, prefix)[0]
        return Request(("clip", source.clip.name), condition_L=condition_L, rule=generator.rule)

    generator.request_of = request_of
    evaluation.run(generator)


if __name__ == "__main__":
    run_cli(main)
