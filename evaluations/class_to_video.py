"""gFVD of class-to-video: one sample for each real clip of the protocol, with that clip's class.

    bash scripts/test/eval_c2v.sh --protocol ucf101-c2v-10k --tok-config T.yaml --vq-ckpt T --gpt-model GPT-L \\
        --gpt-ckpt G --cfg-scale 1.75 --check-special-token-mask --out results/eval/c2v

Writes OUT/metrics.json, OUT/per_clip.csv, the protocol card, and pictures of the samples nearest to the real clips, in
the middle and farthest from them. `--ours DIR` scores a folder that a sampling command wrote.
"""

from __future__ import annotations

import argparse

from autoregressive.flags import add_sampler_flags, parse
from evaluations.flags import REQUIRED, add_common_flags
from tokenizer.common.cli import Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Score the clips that a GPT samples for given classes, under a named protocol.")
    add_common_flags(parser)
    add_sampler_flags(parser)
    parser.add_argument("--cfg-scale", default="1", metavar="S", help="guidance: a number, or one a block (default: 1)")
    return parse(parser, REQUIRED)


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported


from autoregressive.condition import names_of
from autoregressive.flags import parse_guidance
from autoregressive.sampler import Request
from evaluations.generation import Generator, check_task
from evaluations.job import Evaluation, check_tokenizer
from evaluations.system import Source
from tokenizer.common.errors import UserError, run_cli


def main() -> None:
    args = parse_arguments()
    evaluation = Evaluation(args, "class_to_video")
    if evaluation.run_ours():
        return
    generator = Generator(evaluation, parse_guidance(args.cfg_scale))
    check_task(generator, frame_prediction=False)
    check_tokenizer(evaluation.protocol, generator.tokenizer)
    names = names_of(generator.gpt.class_names, generator.layout.num_classes)
    label_of = {name.lower(): number for number, name in enumerate(names)}
    if strange := sorted({clip.label for clip in evaluation.clips.clips if clip.label.lower() not in label_of}):
        raise UserError(f"the list has the class {strange[0]!r}, which {args.gpt_ckpt} does not; it has {names[0]} ..")

    def request_of(source: Source) -> Request:
        label = label_of[source.clip.label.lower()]
        return Request(("class", label, source.clip.index), label, rule=generator.rule)

    generator.request_of = request_of
    evaluation.run(generator)


if __name__ == "__main__":
    run_cli(main)
