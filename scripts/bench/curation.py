"""Stage 2 as a prefix tree against brute force, on the same clips and weights, LPIPS included.

    python scripts/bench/curation.py [--quick]

Brute force reconstructs each clip under each assignment on its own and compares both sides anew, as calling a metric
on pairs of videos does. One thread, CPU time of the thread; the argmax of the reward must agree on every clip.
The last line is JSON; exit 1 where the ratio is under 3 or an argmax differs. --quick takes 3 of the 5 levels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from _report import report

from tokenizer.assignment import pack
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.losses.perceptual import load_perceptual
from tokenizer.model import VideoTokenizer
from tokenizer.presets import build_tokenizer
from tokenizer.router.curate import Scorer, Scores
from tokenizer.router.reward import QualityTable, reward, stats_of

GOAL = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Curation: prefix tree against brute force.")
    parser.add_argument("--quick", action="store_true", help="3 levels (81 assignments) instead of 5 (625)")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    model = _tokenizer([8, 16, 32] if quick else [8, 16, 32, 64, 128])
    clips = build_dataset(DataConfig(sources=["bundled:heldout"], size=64, augment=False))
    video = torch.stack([clips.get(i).video_CTHW for i in (0, len(clips) - 1)])
    scorer = Scorer(model, load_perceptual("stlpips_alex"))
    tree_seconds, tree = _timed(scorer.tree, video)
    brute_seconds, brute = _timed(scorer.brute_force, video)
    same = torch.equal(_best(model, tree), _best(model, brute))
    report(
        "curation tree against brute force",
        ratio=brute_seconds / tree_seconds,
        goal=GOAL,
        holds=same and brute_seconds / tree_seconds >= GOAL,
        identical_argmax=same,
        largest_lpips_difference=float((tree[0] - brute[0]).abs().max()),
        assignments=model.space.num_rows,
        tree_seconds_per_clip=tree_seconds / len(video),
    )


def _tokenizer(levels: list[int]) -> VideoTokenizer:
    """The miniature's shape with random weights; codes from real latents, so that assignments differ."""
    torch.manual_seed(0)
    model = build_tokenizer("VQ_mini", levels=levels, init="random").eval()
    torch.nn.init.normal_(model.to_pixels.weight, std=0.1)
    clips = build_dataset(DataConfig(sources=["bundled:train"], size=64, augment=False))
    video = torch.stack([clips.get(i).video_CTHW for i in range(0, 64, 8)])
    lengths = model.space.lengths_of(torch.full((len(video),), model.space.num_rows - 1))
    with torch.inference_mode():
        latents = model.encode_latents(video, pack(lengths))
    model.quantizer.start_from(latents, torch.Generator().manual_seed(0))
    return model


def _timed(score: Callable[[torch.Tensor], Scores], video: torch.Tensor) -> tuple[float, Scores]:
    start = time.thread_time()
    scores = score(video)
    return time.thread_time() - start, scores


def _best(model: VideoTokenizer, scores: Scores) -> torch.Tensor:
    """The best row of each clip at w_q = 1.2."""
    space = model.space
    table = QualityTable(*scores, [str(i) for i in range(len(scores[0]))], space.levels, space.num_blocks)
    return reward(table.lpips_BA, space.tokens_A, 1.2, stats_of(table)).argmax(dim=1)


if __name__ == "__main__":
    main()
