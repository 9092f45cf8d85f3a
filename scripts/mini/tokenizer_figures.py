"""The held-out figures of the shipped miniature, recomputed from its files: `python scripts/mini/tokenizer_figures.py`.

The clips come from other source files than the training clips. Nothing here is comparable with the paper.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.image_quality import motion, psnr
from tokenizer.data.clips import ClipDataset, DataConfig, build_dataset
from tokenizer.data.video_io import to_uint8
from tokenizer.losses.perceptual import PerceptualDistance, load_perceptual
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import TrainedRouter, load_router
from tokenizer.router.results import rank_correlation
from tokenizer.router.reward import QualityTable, RewardStats, best_uniform, reward, reward_percentile

_BATCH = 8
_REAL, _GRADED, _CLASSED = "bundled:heldout", "synthetic:heldout:226", "classed:heldout:100"
# what motion and tokens are rated on; the first set is that of the protocol mini-recon
_MOTION_SETS = {
    "real clips and graded scenes": (_REAL, _GRADED),
    "of these, real clips": (_REAL,),
    "of these, graded scenes": (_GRADED,),
    "classed scenes": (_CLASSED,),
}
_TABLE = "all clips of the table above, whatever their kind"


class _MotionCost(NamedTuple):
    """Of a clip: its kind, grey levels that a pixel changes from frame to frame, tokens from the router."""

    kind: str
    motion: float
    tokens: int


def held_out_figures(folder: Path) -> dict[str, Any]:
    """All figures of the miniature in `folder` (final, router and held-out table), as plain numbers."""
    tokenizer, router = load_tokenizer(folder / "final.safetensors"), load_router(folder / "router.safetensors")
    table = QualityTable.load(folder / "heldout_table.safetensors")
    perceptual = load_perceptual(str(table.meta["perceptual_net"]))
    clips = build_dataset(DataConfig(**table.meta["data"]))
    if clips.names != table.names:
        raise UserError(f"{folder}: the held-out table lists other clips than its data section gives")
    video = torch.stack([clips.get(i).video_CTHW for i in range(len(clips))])
    score_BA = torch.cat([router.scores(some) for some in video.split(_BATCH)])
    row_B = router.space.best_row(score_BA)
    reward_BA = _reward(table)
    return {
        "num_clips": len(clips),
        "perceptual_net": perceptual.name,
        "sha256": {"final": tokenizer.sha256, "router": router.sha256, "proxy": table.meta["tokenizer_sha256"]},
        "router": _router_figures(score_BA, row_B, table, reward_BA),
        "adaptivity": _adaptivity(router, clips, video, {
            "router": router.space.tokens_A[row_B], "best": router.space.tokens_A[reward_BA.argmax(dim=1)],
        }),
        "final": _final_figures(tokenizer, perceptual, video, row_B),
        "proxy": {
            str(level): {name: getattr(table, f"{name}_BA")[:, table.space.uniform_row(level)].mean().item()
                         for name in ("lpips", "psnr")}
            for level in table.levels
        },
    }  # fmt: skip


def _reward(table: QualityTable) -> Tensor:
    """By the table, for the weight that the router was trained with."""
    stats = RewardStats(**table.meta["reward_stats"])
    return reward(table.lpips_BA, table.space.tokens_A, table.meta["quality_weight"], stats)


def _router_figures(score_BA: Tensor, row_B: Tensor, table: QualityTable, reward_BA: Tensor) -> dict[str, Any]:
    """How good the chosen assignments are by the proxy's table."""
    space = table.space
    best_B = reward_BA.argmax(dim=1)
    level, uniform = best_uniform(reward_BA, space)
    constant = int(reward_BA.mean(dim=0).argmax())
    return {
        "quality_weight": table.meta["quality_weight"],
        "top1": (row_B == best_B).double().mean().item(),
        "top5": (score_BA.topk(5).indices == best_B[:, None]).any(dim=1).double().mean().item(),
        "percentile": reward_percentile(reward_BA, row_B),
        "best_uniform_level": level,
        "best_uniform_percentile": uniform,
        "best_constant_row": space.lengths_of(torch.tensor(constant)).tolist(),
        "best_constant_percentile": reward_percentile(reward_BA, torch.full_like(row_B, constant)),
        "mean_tokens": space.tokens_A[row_B].double().mean().item(),
        "best_row_tokens": space.tokens_A[best_B].double().mean().item(),
    }


def _adaptivity(
    router: TrainedRouter, clips: ClipDataset, video: Tensor, tokens_B: dict[str, Tensor]
) -> dict[str, Any]:
    """Does motion cost tokens: rank correlations in sets of clips, and the mean of each kind.

    `clips`, `video`, `tokens_B`: those of the table, and what its clips get from the "router" and by its "best" rows.
    A grey level of motion is a small shape of loud colours in a classed scene and a moving camera in a photograph, so
    these are also rated apart.
    """
    sources = (_REAL, _GRADED, _CLASSED)
    costs = {source: _motion_costs(router, build_dataset(replace(clips.cfg, sources=[source]))) for source in sources}
    correlations: dict[str, dict[str, float | None]] = {}
    for name, members in _MOTION_SETS.items():
        rows = [row for source in members for row in costs[source]]
        rank = rank_correlation([row.motion for row in rows], [row.tokens for row in rows])
        correlations[name] = {"clips": len(rows), "router": rank, "best": None}
    motion_B = [motion(to_uint8(clip)) for clip in video]
    ranks = {who: rank_correlation(motion_B, tokens.tolist()) for who, tokens in tokens_B.items()}
    correlations[_TABLE] = {"clips": len(clips), **ranks}

    kinds = defaultdict[str, list[_MotionCost]](list)
    for row in itertools.chain.from_iterable(costs.values()):
        kinds[row.kind].append(row)
    groups = {
        kind: {"clips": len(rows), "motion": fmean(r.motion for r in rows), "tokens": fmean(r.tokens for r in rows)}
        for kind, rows in kinds.items()
    }
    return {"rank_correlation_motion_tokens": correlations, "groups": groups}


def _motion_costs(router: TrainedRouter, clips: ClipDataset) -> list[_MotionCost]:
    rows = []
    for start in range(0, len(clips), _BATCH):
        some = [clips.get(i) for i in range(start, min(start + _BATCH, len(clips)))]
        row_B = router.space.best_row(router.scores(torch.stack([sample.video_CTHW for sample in some])))
        for sample, tokens in zip(some, router.space.tokens_A[row_B].tolist(), strict=True):
            kind = f"rendered {sample.kind}" if sample.kind else f"real {sample.label}"
            rows.append(_MotionCost(kind, motion(to_uint8(sample.video_CTHW)), tokens))
    return rows


def _final_figures(
    tokenizer: VideoTokenizer, perceptual: PerceptualDistance, video: Tensor, row_B: Tensor
) -> dict[str, dict[str, float]]:
    """The final tokenizer under the router and at each uniform level: perceptual distance, PSNR, tokens."""
    space = tokenizer.space
    ways = {str(level): space.lengths_of(torch.full_like(row_B, space.uniform_row(level))) for level in space.levels}
    ways["router"] = space.lengths_of(row_B)
    figures = {}
    for name, length_BN in tqdm(ways.items(), desc="final tokenizer", unit="assignment"):
        distance, decibel = [], []
        for start in range(0, len(video), _BATCH):
            some = slice(start, start + _BATCH)
            ours = tokenizer.decode(tokenizer.encode(video[some], length_BN[some]))
            distance.append(perceptual.clip_distance(ours, video[some]))
            decibel.append(psnr(ours, video[some]))
        figures[name] = {
            "lpips": torch.cat(distance).mean().item(),
            "psnr": torch.cat(decibel).mean().item(),
            "tokens": length_BN.sum(dim=1).double().mean().item(),
        }
    return figures


def as_markdown(figures: dict[str, Any]) -> str:
    router, adaptivity, net = figures["router"], figures["adaptivity"], figures["perceptual_net"]
    lines = [
        f"{figures['num_clips']} held-out clips. Recompute with `python scripts/mini/tokenizer_figures.py`.",
        "",
        f"| assignment | tokens a clip | proxy: {net} | proxy: PSNR | final: {net} | final: PSNR |",
        "|---|---|---|---|---|---|",
    ]
    for name, final in figures["final"].items():
        proxy = figures["proxy"].get(name)
        shown = f"{proxy['lpips']:.4f} | {proxy['psnr']:.2f}" if proxy else "- | -"
        label = "router" if name == "router" else f"uniform {name}"
        lines.append(f"| {label} | {final['tokens']:.0f} | {shown} | {final['lpips']:.4f} | {final['psnr']:.2f} |")
    lines += [
        "",
        "The proxy's distance looks at the frames named in the table's config, the final's at all 16.",
        "",
        f"| router at w_q = {router['quality_weight']} | |",
        "|---|---|",
        f"| reward percentile | {router['percentile']:.2%} |",
        f"| best uniform (level {router['best_uniform_level']}) | {router['best_uniform_percentile']:.2%} |",
        f"| best single assignment {router['best_constant_row']} | {router['best_constant_percentile']:.2%} |",
        f"| top-1 / top-5 | {router['top1']:.2%} / {router['top5']:.2%} |",
        f"| tokens a clip, router / best rows | {router['mean_tokens']:.1f} / {router['best_row_tokens']:.1f} |",
        "",
        "| rank correlation of motion and tokens, held-out clips | clips | from the router | best rows of the table |",
        "|---|---|---|---|",
    ]
    for name, figure in adaptivity["rank_correlation_motion_tokens"].items():
        ranks = ("-" if figure[who] is None else f"{figure[who]:.2f}" for who in ("router", "best"))
        lines.append(f"| {name} | {figure['clips']} | {' | '.join(ranks)} |")
    lines += ["", "| kind | clips | motion, grey levels a frame | tokens from the router |", "|---|---|---|---|"]
    for name, group in sorted(adaptivity["groups"].items(), key=lambda item: item[1]["tokens"]):
        lines.append(f"| {name} | {group['clips']} | {group['motion']:.1f} | {group['tokens']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recompute the held-out figures of the shipped miniature.")
    parser.add_argument("--folder", type=Path, default=Path("ckpts/mini"), help="final, router and held-out table")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of tables")
    args = parser.parse_args()
    figures = held_out_figures(args.folder)
    print(json.dumps(figures, indent=1) if args.json else as_markdown(figures))


if __name__ == "__main__":
    run_cli(main)
