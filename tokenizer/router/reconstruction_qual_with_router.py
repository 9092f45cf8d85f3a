"""The main job: videos in, and for each clip the router's choice of tokens, the reconstruction, and a report.

    python tokenizer/router/reconstruction_qual_with_router.py --vid_path DIR --save_dir OUT \\
        --router_config R.yaml --router_ckpt R.safetensors --tok_config T.yaml --vq_ckpt T.safetensors

Writes OUT/clips/<clip>/ (original, reconstruction, both side by side with the tokens of each block, the tokens
themselves), OUT/metrics.json, OUT/skipped.json and OUT/report.html. A stopped job goes on with the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tokenizer.budget import FORMS, Budget, find_price, parse_budget
from tokenizer.common.cli import Parser, at_least, positive
from tokenizer.common.device import pick_device
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.clip_stream import ClipRule, ClipWalk, find_sources
from tokenizer.data.video_io import display_name, to_model_range
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import TrainedRouter, check_router_fits, load_router
from tokenizer.router.reconstruct import PERCEPTUAL_ORDER, Reconstructor, pick_perceptual
from tokenizer.router.results import ResultsFolder
from tokenizer.router.summary import (
    assignment_use,
    codebook_use,
    means,
    padding,
    rank_correlation,
    tokenizer_facts,
    tokens_by_motion,
    versions,
)
from tokenizer.viz.report import padding_sentence, write_report


def parse_arguments() -> argparse.Namespace:
    """The command line, spelt as in the README."""
    about = "Reconstruct videos with as many tokens per temporal block as the router, or a budget, gives them."
    parser = Parser(about)
    add = parser.add_argument
    add("--vid_path", required=True, help="a folder of videos (searched recursively) or one file")
    add("--save_dir", required=True, help="results folder; an unfinished job in it is continued")
    add("--router_config", help="YAML of the router, checked against its weights")
    add("--router_ckpt", help="weights of the router; not needed for the budgets fixed and uniform")
    add("--tok_config", help="YAML of the tokenizer, checked against its weights")
    add("--vq_ckpt", required=True, help="weights of the tokenizer: .safetensors or a run folder")
    add("--budget", type=str.strip, default="router", help=f"{FORMS} (default: router)")
    add("--max-clips", type=at_least(1), metavar="N", help="stop after N clips")
    add(
        "--all-clips",
        action="store_true",
        help="all clips of 16 frames of a video, not only the first; a shorter rest is left out and counted",
    )
    add("--fps", type=positive, help="frame rate to read at (default: each file's own)")
    add("--batch-size", type=at_least(1), default=4, metavar="N", help="clips that go through the models together")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--num-workers", type=at_least(0), default=1, metavar="N", help="processes that decode ahead (default: 1)")
    add("--overwrite", action="store_true", help="remove the earlier results in --save_dir and start again")
    add("--backend", choices=("pyav", "decord"), default="pyav", help="video reader")
    networks = f"lpips_vgg | lpips_alex | stlpips_vgg | stlpips_alex | none | auto ({' or '.join(PERCEPTUAL_ORDER)})"
    add("--perceptual", default="auto", metavar="NAME", help=networks)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    folder = ResultsFolder(args.save_dir)
    sources = find_sources(args.vid_path, folder.holds)
    tokenizer = load_tokenizer(args.vq_ckpt, device, args.tok_config)
    router = load_fitting_router(args, tokenizer, device)
    budget = parse_budget(args.budget, tokenizer.space)
    perceptual, no_lpips = pick_perceptual(args.perceptual, device)
    rule = ClipRule(tokenizer.config.num_frames, tokenizer.config.size, args.fps, args.all_clips, args.backend)
    walk = ClipWalk(sources, rule, args.num_workers, args.max_clips)

    folder.start(
        {
            "tokenizer_sha256": tokenizer.sha256,
            "router_sha256": router.sha256 if router else None,
            "budget": args.budget,
            "fps": args.fps,
            "backend": args.backend,
            "lpips_backbone": perceptual.name if perceptual else None,
        },
        args.overwrite,
    )
    price = price_of_the_set(walk, router, budget)
    folder.agree({"price": price})

    reconstruct = Reconstructor(tokenizer, router, budget, price, perceptual)
    facts = {**protocol_facts(args, reconstruct), "lpips_reason": no_lpips}
    done: list[str] = []
    try:
        for names in reconstruct_batches(walk, folder, reconstruct, args.batch_size):
            done += names
    except KeyboardInterrupt:
        finish(folder, done, walk, facts, complete=False)
        raise KeyboardInterrupt(f"interrupted after {len(done)} clips; the same command goes on from there") from None
    finish(folder, done, walk, facts, complete=True)


def load_fitting_router(
    args: argparse.Namespace, tokenizer: VideoTokenizer, device: torch.device
) -> TrainedRouter | None:
    """The router of the command line, or None where there is none and none is needed."""
    if args.router_ckpt is None:
        if args.router_config is not None:
            raise UserError("--router_config without --router_ckpt: give the weights too, or neither")
        if parse_budget(args.budget, tokenizer.space).needs_router:
            raise UserError(
                f"--budget {args.budget} asks a router: give --router_config and --router_ckpt, "
                f"or a budget without one, such as uniform:{tokenizer.config.levels[-1]}"
            )
        return None
    router = load_router(args.router_ckpt, device, args.router_config)
    check_router_fits(router, tokenizer.config)
    return router


def price_of_the_set(walk: ClipWalk, router: TrainedRouter | None, budget: Budget) -> float | None:
    """For `average:N` a first pass that only asks the router: the price per token at which the whole set keeps to N.

    It keeps the scores of every clip, 2.5 KB each for 625 rows, and nothing else. Other budgets need no such price.
    """
    if router is None or budget.average_tokens is None:
        return None
    clips = walk("scoring")  # what cannot be read comes up again in the second pass
    scores = [router.scores(to_model_range(c.decoded.frames_THWC)[None]) for c in clips if c.decoded]
    if not scores:
        return None
    return find_price(torch.cat(scores), router.space, budget.average_tokens)


def reconstruct_batches(
    walk: ClipWalk, folder: ResultsFolder, reconstruct: Reconstructor, batch_size: int
) -> Iterator[list[str]]:
    """Names of the clips of each batch, once their results are in the folder; finished ones are not done again."""
    clips = walk("reconstructing", folder.is_done)
    longest = reconstruct.tokenizer.config.levels[-1]
    with contextlib.closing(clips):
        while batch := list(itertools.islice(clips, batch_size)):
            new = [(clip, clip.decoded) for clip in batch if clip.decoded]
            for (clip, decoded), result in zip(new, reconstruct([decoded for _, decoded in new]), strict=True):
                folder.add(clip, decoded, result, longest)
            yield [clip.name for clip in batch]


def protocol_facts(args: argparse.Namespace, made_by: Reconstructor) -> dict[str, Any]:
    """What a reader of the figures must know: weights, budget, input, versions."""
    tokenizer, router, perceptual = made_by.tokenizer, made_by.router, made_by.perceptual

    def files(weights: str, config: str | None) -> dict[str, str | None]:
        return {"weights": display_name(weights), "config": config and display_name(config)}

    return {
        "lpips_backbone": perceptual.name if perceptual else None,
        "budget": args.budget,
        "price": made_by.price,
        "tokenizer": {**files(args.vq_ckpt, args.tok_config), **tokenizer_facts(tokenizer)},
        "router": router and {**files(args.router_ckpt, args.router_config), "sha256": router.sha256},
        "input": {
            "vid_path": display_name(args.vid_path),
            **{key: getattr(args, key) for key in ("fps", "all_clips", "max_clips", "backend")},
        },
        "device": str(tokenizer.device),
        "versions": versions(),
    }


def finish(folder: ResultsFolder, names: list[str], walk: ClipWalk, facts: dict[str, Any], complete: bool) -> None:
    """Write skipped.json, metrics.json and the report, and print the essence. UserError if no clip was done."""
    folder.write_skipped(walk.skipped)
    if not names:
        if complete:
            first = f"; {walk.skipped[0].source.file}: {walk.skipped[0].reason}" if walk.skipped else ""
            listed = folder.folder / "skipped.json"
            raise UserError(f"none of the {len(walk.sources)} videos could be read, see {listed}{first}")
        return
    records, tokenizer = [folder.records[name] for name in names], facts["tokenizer"]
    metrics = {
        "clips": records,
        "mean": means(records),
        "padding": padding(records),
        "assignments": assignment_use(records, len(tokenizer["levels"]) ** tokenizer["num_blocks"]),
        "tokens_by_motion": tokens_by_motion(records),
        "motion_tokens_rank_correlation": rank_correlation(
            *([r[key] for r in records] for key in ("motion", "tokens"))
        ),
        "codebook": codebook_use(folder.token_files(names), tokenizer["codebook_size"]),
        "num_videos": len(walk.sources),
        "num_skipped": len(walk.skipped),
        "frames_left_out": sum(rest.num_frames for rest in walk.rests),  # at the ends of videos, too few for a clip
        "complete": complete,
        **facts,
    }
    folder.write_metrics(metrics)
    print(closing_lines(metrics, write_report(folder.folder)))


def closing_lines(metrics: Mapping[str, Any], report: Path) -> str:
    """The result in a few lines: assignments, motion beside tokens, padding, and last the mean figures."""
    mean, use, correlation = metrics["mean"], metrics["assignments"], metrics["motion_tokens_rank_correlation"]
    commonest = " ".join(map(str, use["commonest"]))
    lines = [
        f"{use['num_distinct']} distinct assignments of {use['num_possible']}; the commonest ({commonest}) has "
        f"{use['commonest_share']:.0%} of the clips"
    ]
    thirds = metrics["tokens_by_motion"]
    if len(thirds) > 1:
        each = "; ".join(f"{t['motion']:.1f} grey levels: {t['tokens']:.1f} tokens" for t in thirds)
        rank = "none" if correlation is None else f"{correlation:+.2f}"
        lines.append(
            f"motion and tokens, clips in {len(thirds)} groups from still to lively: {each}; rank correlation {rank}"
        )
    if padded := padding_sentence(metrics):
        lines.append(padded)
    left_out = f", {metrics['frames_left_out']} frame(s) at their ends left out" if metrics["frames_left_out"] else ""
    lpips = "" if mean["lpips"] is None else f", {metrics['lpips_backbone']} {mean['lpips']:.4f}"
    lines.append(
        f"{len(metrics['clips'])} clip(s), {mean['tokens']:.1f} tokens each, PSNR {mean['psnr']:.2f} dB, "
        f"SSIM {mean['ssim']:.4f}{lpips}; {metrics['num_skipped']} video(s) skipped{left_out}; report: {report}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
