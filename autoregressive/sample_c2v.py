"""Class-to-video: clips of the classes that are asked for, with as many tokens per block as the GPT gives them.

    bash scripts/test/sample_c2v_visualization.sh --tok-config T.yaml --vq-ckpt T --gpt-model GPT-LP --gpt-ckpt G \\
        --sample-dir OUT --cfg-scale 2.25 --qual-num 20 --class-idx 1,JumpRope --check-special-token-mask

Writes OUT/samples/<clip>/, a grid for each class in OUT/grids/, and OUT/samples.json. Rerun the
same command to resume. With RANK and WORLD_SIZE set, each process makes its share; together they make the same clips.
"""

from __future__ import annotations

import argparse

from autoregressive.flags import REQUIRED, add_common_flags, parse, parse_guidance
from tokenizer.common.cli import Parser, answer_help, at_least, frame_rate


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Sample clips of given classes from a GPT, and decode them with its tokenizer.")
    add_common_flags(parser)
    add = parser.add_argument
    add("--class-idx", metavar="C,C,..", help="numbers (from 0) or names; double quotes keep a comma (default: all)")
    add("--qual-num", type=at_least(1), default=1, metavar="N", help="samples of each class (default: 1)")
    add("--cfg-scale", default="2.25", metavar="S", help="guidance, one number or one a block; 1: none (default: 2.25)")
    add(
        "--fps",
        type=frame_rate,
        default=25.0,
        help="frame rate of the videos that are written (default: 25, UCF-101's)",
    )
    return parse(parser, REQUIRED)


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import re
from collections.abc import Iterator
from dataclasses import dataclass

from autoregressive.condition import names_of, parse_classes
from autoregressive.sample_job import SampleJob, Wanted
from autoregressive.sampler import Request
from tokenizer.common.errors import UserError, run_cli


@dataclass(frozen=True)
class Class:
    """A class with the samples that are wanted of it; a model without classes has one, of label None."""

    label: int | None
    class_name: str
    num_samples: int

    @property
    def title(self) -> str:
        """Safe in a path."""
        if self.label is None:
            return self.class_name
        return f"class_{self.label:03d}_{re.sub(r'[^A-Za-z0-9]+', '_', self.class_name)}"

    @property
    def names(self) -> list[str]:
        return [f"{self.title}_{i:05d}" for i in range(self.num_samples)]


def main() -> None:
    args = parse_arguments()
    job = SampleJob(args, parse_guidance(args.cfg_scale))
    classes = wanted_classes(job, args)
    job.start(task="class-to-video")
    wanted = [each for each in wanted_clips(job, classes, args.fps) if job.folder.record(each.name) is None]
    if wanted:
        job.make(wanted, len(wanted))
    job.finish({each.title: each.names for each in classes}, args.fps)


def wanted_classes(job: SampleJob, args: argparse.Namespace) -> list[Class]:
    """Those of --class-idx. UserError for a model of the other kind, and for a class that the model does not have."""
    if job.layout.condition_lengths:
        raise UserError(
            f"{args.gpt_ckpt}: is a model of frame prediction; use scripts/test/frame_pred_visualization.sh"
        )
    if job.layout.num_classes == 0:
        if args.class_idx is not None:
            raise UserError(f"--class-idx {args.class_idx}: {args.gpt_ckpt} was trained without classes; leave it out")
        return [Class(None, "clips", args.qual_num)]
    class_names = names_of(job.gpt.class_names, job.layout.num_classes)
    return [Class(i, class_names[i], args.qual_num) for i in parse_classes(args.class_idx, class_names)]


def wanted_clips(job: SampleJob, classes: list[Class], fps: float) -> Iterator[Wanted]:
    """The share of this process, in the order of the classes. A clip's numbers depend on its class and its index."""
    everything = [(each, i) for each in classes for i in range(each.num_samples)]
    for each, i in everything[job.process.rank :: job.process.world]:
        key = ("class", each.label, i) if each.label is not None else ("clip", i)
        request = Request(key, each.label, rule=job.rule)
        yield Wanted(each.names[i], request, {"class": each.label, "class_name": each.class_name, "index": i}, fps)


if __name__ == "__main__":
    run_cli(main)
