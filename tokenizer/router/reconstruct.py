"""The main job: decode ahead, reconstruct in batches, write beside, sum up.

All figures come from the models' arrays, floats in [0, 1], not from a written video: H.264 at its usual quality leaves
even the original at about 33 dB.

Letters: S clips of the whole set, B clips of a batch, C T H W, N temporal blocks, A assignments (rows).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tokenizer.budget import Budget, choose_rows, find_price, keeps_quality, parse_budget
from tokenizer.common.clip_shape import Size
from tokenizer.common.device import batches_at_once, float32_mode, pick_device
from tokenizer.common.errors import UserError
from tokenizer.common.image_quality import PSNR_OF_EQUAL, motion_figures, psnr, ssim
from tokenizer.common.work_units import map_ahead
from tokenizer.data.clip_stream import ClipRule, ClipWalk, SourceClip, find_sources
from tokenizer.data.video_io import DecodedClip, display_name, to_model_range, to_uint8
from tokenizer.losses.perceptual import PerceptualDistance, check_frames_fit, load_perceptual
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import TrainedRouter, router_of_flags
from tokenizer.router.results import (
    UNIFORM_MEASURES,
    Reconstruction,
    ResultsFolder,
    assignment_use,
    codebook_use,
    floor_use,
    means,
    padding,
    rank_correlation,
    tokenizer_facts,
    tokens_by_motion,
    versions,
)
from tokenizer.viz.report import closing_lines, write_report

PERCEPTUAL_ORDER = ("lpips_vgg", "stlpips_alex")  # of `auto`: the paper's network, then one that pip installs
_MOST_KEPT = 1 << 30  # bytes of decoded clips that the scoring pass of average:N may hand to the second pass


def reconstruct_videos(args: argparse.Namespace) -> None:
    """Run the job of the command line; KeyboardInterrupt with what to do next if it is stopped."""
    device = pick_device(args.device)
    folder = ResultsFolder(args.save_dir, videos=not args.no_videos)
    sources = find_sources(args.vid_path, folder.holds)
    tokenizer = load_tokenizer(args.vq_ckpt, device, args.tok_config)
    budget = parse_budget(args.budget, tokenizer.space, args.trade_off)
    router = router_of_flags(args, tokenizer.config, device, budget)
    trade_off = router.trade_off(budget) if router else None
    perceptual, no_lpips = pick_perceptual(args.perceptual, device, tokenizer.config.size)
    rule = ClipRule(tokenizer.config.num_frames, tokenizer.config.size, args.fps, args.all_clips, args.backend)
    walk = ClipWalk(sources, rule, args.num_workers, args.max_clips)
    settings = {
        "tokenizer_sha256": tokenizer.sha256,
        "router_sha256": router.sha256 if router else None,
        "budget": args.budget,
        "trade_off": trade_off,
        "fps": args.fps,
        "backend": args.backend,
        "lpips_backbone": perceptual.name if perceptual else None,
        "compare_uniform": args.compare_uniform,
    }
    with folder.start(settings, args.overwrite):
        priced = price_of_the_set(walk, router, budget, folder)
        reconstruct = Reconstructor(tokenizer, router, budget, priced.price, perceptual, args.compare_uniform)
        facts = {**protocol_facts(args, reconstruct), "lpips_reason": no_lpips}
        done: list[str] = []
        try:
            for name in finished_clips(walk, folder, reconstruct, priced, args):
                done.append(name)
        except KeyboardInterrupt:
            finish(folder, done, walk, facts, complete=False)
            raise KeyboardInterrupt(f"interrupted after {len(done)} clips; rerun the same command to resume") from None
        finish(folder, done, walk, facts, complete=True)


@dataclass(frozen=True)
class PricedSet:
    """What a pass over the whole set found: the price, the scores by clip name, and the clips if they fit in memory."""

    price: float | None = None
    score_A: Mapping[str, Tensor] | None = None
    clips: list[SourceClip] | None = None

    def scores(self, clips: Sequence[SourceClip]) -> Tensor | None:
        """score_BA of a batch; None unless all its clips were scored."""
        known = self.score_A or {}
        found = [known[clip.name] for clip in clips if clip.name in known]
        return torch.stack(found) if found and len(found) == len(clips) else None


def price_of_the_set(walk: ClipWalk, router: TrainedRouter | None, budget: Budget, folder: ResultsFolder) -> PricedSet:
    """For `average:N` a first pass with the router alone: the price per token that keeps the whole set at N.

    Scores and price are stored, so a resumed job neither decodes again nor depends on how another machine rounds.
    Other budgets need no such price.
    """
    if router is None or budget.average_tokens is None:
        return PricedSet()
    inputs = json.dumps([walk.digest(), router.sha256, router.quality_weight, budget.text])
    made_from = hashlib.sha256(inputs.encode()).hexdigest()
    if stored := folder.load_scores(made_from):
        return PricedSet(*stored)
    kept: list[SourceClip] | None = []
    names, scores, num_bytes = [], [], 0
    for clip in walk("scoring"):
        if clip.decoded is None:
            continue
        names.append(clip.name)
        scores.append(router.rate(to_model_range(clip.decoded.frames_THWC)[None], budget)[0])  # [A]: 2.5 KB for 625
        num_bytes += clip.decoded.frames_THWC.nbytes
        if num_bytes > _MOST_KEPT:
            kept = None  # too much for memory: the second pass decodes again
        if kept is not None:
            kept.append(clip)
    if not scores:
        return PricedSet()
    score_SA = torch.stack(scores)  # S x [A] -> [S, A]
    price = find_price(score_SA, router.space, budget.average_tokens, router.search)
    folder.save_scores(made_from, price, names, score_SA)
    return PricedSet(price, dict(zip(names, score_SA, strict=True)), kept)


def finished_clips(
    walk: ClipWalk, folder: ResultsFolder, reconstruct: Reconstructor, priced: PricedSet, args: argparse.Namespace
) -> Iterator[str]:
    """The name of each clip, in order, once its results are in the folder; finished ones are not done again.

    Threads compute batches and write the files of earlier clips, while this one waits for the next.
    """
    longest = reconstruct.tokenizer.config.levels[-1]

    def write(item: tuple[SourceClip, Reconstruction | None]) -> tuple[str, dict[str, Any] | None]:
        clip, result = item
        if result is None or clip.decoded is None:
            return clip.name, None
        return clip.name, folder.write(clip, clip.decoded, result, longest)

    results = reconstructed(walk, folder, reconstruct, priced, args.batch_size)
    with contextlib.closing(results):
        for name, record in map_ahead(write, results, max(1, args.num_workers)):
            if record is not None:
                folder.add(record)
            yield name


def reconstructed(
    walk: ClipWalk, folder: ResultsFolder, reconstruct: Reconstructor, priced: PricedSet, batch_size: int
) -> Generator[tuple[SourceClip, Reconstruction | None], None, None]:
    """Each clip with its reconstruction, in order; None for a clip that is in the folder already."""
    clips = walk("reconstructing", folder.is_done) if priced.clips is None else again(priced.clips, folder)

    def make(batch: list[SourceClip]) -> list[tuple[SourceClip, Reconstruction | None]]:
        new = [clip for clip in batch if clip.decoded]
        decoded = [clip.decoded for clip in new if clip.decoded]
        made = dict(zip((clip.name for clip in new), reconstruct(decoded, priced.scores(new)), strict=True))
        return [(clip, made.get(clip.name)) for clip in batch]

    batches = iter(lambda: list(itertools.islice(clips, batch_size)), [])
    results = map_ahead(make, batches, batches_at_once(reconstruct.tokenizer.device))
    with contextlib.closing(clips), contextlib.closing(results):
        for pairs in results:
            yield from pairs


def again(clips: list[SourceClip], folder: ResultsFolder) -> Generator[SourceClip, None, None]:
    """The clips of an earlier pass; `decoded` is None for those that are in the folder already."""
    for clip in tqdm(clips, desc="reconstructing", unit="clip", dynamic_ncols=True, disable=None):
        yield replace(clip, decoded=None) if folder.is_done(clip.name, clip.fingerprint) else clip


def protocol_facts(args: argparse.Namespace, made_by: Reconstructor) -> dict[str, Any]:
    """What the figures depend on: weights, budget, input, versions."""
    tokenizer, router, perceptual = made_by.tokenizer, made_by.router, made_by.perceptual
    given = {key: getattr(args, key) for key in ("fps", "all_clips", "max_clips", "backend")}
    stats = router.stats if router and made_by.budget.max_distance is not None else None

    def files(weights: str, config: str | None) -> dict[str, str | None]:
        return {"weights": display_name(weights), "config": config and display_name(config)}

    return {
        "lpips_backbone": perceptual.name if perceptual else None,
        "budget": args.budget,
        "price": made_by.price,
        "trade_off": router.trade_off(made_by.budget) if router else None,
        "quality_floor": stats and {"distance": made_by.budget.max_distance, "perceptual_net": stats.perceptual_net},
        "compare_uniform": made_by.compare_uniform,
        "tokenizer": {**files(args.vq_ckpt, args.tok_config), **tokenizer_facts(tokenizer)},
        "router": router and {**files(args.router_ckpt, args.router_config), "sha256": router.sha256},
        "input": {"vid_path": display_name(args.vid_path), **given},
        "versions": versions(),
        "device": str(tokenizer.device),
        "float32": float32_mode(),
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
    if floor := facts["quality_floor"]:
        facts = {**facts, "quality_floor": {**floor, **floor_use(records, floor, facts["lpips_backbone"])}}
    metrics = {
        "clips": records,
        "mean": means(records),
        "mean_uniform": means(records, UNIFORM_MEASURES) if facts["compare_uniform"] else None,
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
    print(f"{closing_lines(metrics)}; report: {write_report(folder.folder)}")


# --- one batch ----------------------------------------------------------------------------------------------------


@dataclass
class Reconstructor:
    """The models and the budget. A clip's result does not depend on the other clips of its batch."""

    tokenizer: VideoTokenizer
    router: TrainedRouter | None
    budget: Budget
    price: float | None  # of `average:N`, for the whole set; None for the other budgets
    perceptual: PerceptualDistance | None
    compare_uniform: bool = False  # reconstruct every clip a second time, at the nearest uniform assignment

    @torch.inference_mode()
    def __call__(self, clips: Sequence[DecodedClip], score_BA: Tensor | None = None) -> list[Reconstruction]:
        """Clips of the tokenizer's size, uint8 -> their reconstructions, in order.

        score_BA: what the router's `rate` gave for these clips if it is known; else the router is run.
        """
        if not clips:
            return []
        space = self.tokenizer.space
        video_BCTHW = torch.stack([to_model_range(clip.frames_THWC) for clip in clips])  # float32 in [0, 1]
        if score_BA is None and self.router:
            score_BA = self.router.rate(video_BCTHW, self.budget)  # [B, A]
        search = self.router.search if self.router else None
        row_B = choose_rows(self.budget, score_BA, space, self.price, len(clips), search)  # [B]
        tokens_B = space.tokens_of(row_B)
        tokens = self.tokenizer.encode(video_BCTHW, space.lengths_of(row_B))  # lengths [B, N] -> codes [L]
        ours_BCTHW = self.tokenizer.decode(tokens)  # float32 in [0, 1]
        measured = self._measure(ours_BCTHW, video_BCTHW.to(ours_BCTHW.device))  # key -> [B]
        uniform_BCTHW: Tensor | None = None
        uniform_figures: list[dict[str, Any]] = [{} for _ in clips]
        if self.compare_uniform:
            uniform_BCTHW, uniform_figures = self._at_uniform(video_BCTHW, tokens_B)
        results = []
        for b, clip in enumerate(clips):
            figures: dict[str, Any] = {"assignment": tokens.length_BN[b].tolist(), "tokens": int(tokens_B[b])}
            figures |= {key: None if value_B is None else float(value_B[b]) for key, value_B in measured.items()}
            figures |= motion_figures(clip.frames_THWC, space.num_blocks) | uniform_figures[b]
            if score_BA is not None:
                figures |= self._router_figures(score_BA[b], int(row_B[b]))
            uniform_THWC = None if uniform_BCTHW is None else to_uint8(uniform_BCTHW[b])
            results.append(Reconstruction(to_uint8(ours_BCTHW[b]), tokens.clip(b), figures, uniform_THWC))
        return results

    def _at_uniform(self, video_BCTHW: Tensor, tokens_B: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Each clip at the uniform assignment whose tokens are nearest to `tokens_B`, and what that gives."""
        space = self.tokenizer.space
        level_B = [min(space.levels, key=lambda k: abs(k * space.num_blocks - int(tokens))) for tokens in tokens_B]
        row_B = torch.tensor([space.uniform_row(level) for level in level_B])  # [B]
        uniform_BCTHW = self.tokenizer.decode(self.tokenizer.encode(video_BCTHW, space.lengths_of(row_B)))
        measured = self._measure(uniform_BCTHW, video_BCTHW.to(uniform_BCTHW.device))
        figures = [
            {f"uniform_{key}": None if value_B is None else float(value_B[b]) for key, value_B in measured.items()}
            | {"uniform_tokens": level * space.num_blocks}
            for b, level in enumerate(level_B)
        ]
        return uniform_BCTHW, figures

    def _measure(self, ours_BCTHW: Tensor, real_BCTHW: Tensor) -> dict[str, Tensor | None]:
        lpips_B = None if self.perceptual is None else self.perceptual.clip_distance(ours_BCTHW, real_BCTHW).cpu()
        psnr_B = psnr(ours_BCTHW, real_BCTHW).clamp(max=PSNR_OF_EQUAL).cpu()
        return {"psnr": psnr_B, "ssim": ssim(ours_BCTHW, real_BCTHW).cpu(), "lpips": lpips_B}

    def _router_figures(self, score_A: Tensor, row: int) -> dict[str, Any]:
        """Tokens of the router's own choice, and by how much its score beats the best uniform row allowed.

        The gap compares what the budget compares: score minus price times tokens. Under quality:Q instead: the
        predicted distance, and whether it keeps Q.
        """
        space, router = self.tokenizer.space, self.router
        assert router is not None
        if self.budget.max_distance is not None:
            kept = keeps_quality(self.budget, score_A[None], torch.tensor([row]))
            return {"predicted_distance": -float(score_A[row]), "keeps_quality": bool(kept)}
        price = self.budget.price if self.price is None else self.price
        limit = self.budget.max_tokens or space.max_tokens
        levels = [level for level in space.levels if level * space.num_blocks <= limit]
        row_1R = torch.tensor([[row, *map(space.uniform_row, levels)]])
        ours, *uniform = router.values_of(score_A[None], row_1R, price)[0].tolist()
        own_row_B = choose_rows(Budget("router"), score_A[None], space, search=router.search)
        return {
            "router_tokens": int(space.tokens_of(own_row_B)[0]),
            "best_uniform": levels[uniform.index(max(uniform))],
            "score_gap": ours - max(uniform),
        }


def pick_perceptual(name: str, device: torch.device, size: Size) -> tuple[PerceptualDistance | None, str | None]:
    """Load `auto` (the first of PERCEPTUAL_ORDER with weights on this machine), `none`, or a name of `load_perceptual`.

    Returns the distance, or None and the reason. UserError if a named network lacks weights or frames of this `size`
    are too small for it.
    """
    if name == "none":
        return None, "not asked for (--perceptual none)"
    if name != "auto":
        check_frames_fit(name, size)
        return load_perceptual(name).to(device), None
    reasons = []
    for candidate in PERCEPTUAL_ORDER:
        try:
            check_frames_fit(candidate, size)
            return load_perceptual(candidate).to(device), None
        except UserError as error:
            reasons.append(str(error))
    return None, "; ".join(reasons)
