"""What the miniature GPTs generate, in figures. Not comparable with the paper.

    python scripts/mini/generation_figures.py

Class-to-video: does a classifier that was trained on true clips recognise the class, do the lengths follow the classes
as the router's do, what share of sequences is valid without grammar masking. Frame prediction: is a predicted
clip nearer to the true one than the last given frame, repeated.

Letters: B clips, C T H W.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from scene_classifier import NAMES, REAL, accuracy, train_scene_classifier
from torch import Tensor
from tqdm import tqdm

from autoregressive.condition import encode_condition
from autoregressive.presets import TrainedGPT, check_tokenizer_fits, load_gpt
from autoregressive.sample_grid import tokens_of
from autoregressive.sampler import Request, Sample, Sampler, SamplingConfig
from autoregressive.sequence import SequenceLayout, length_rule
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.image_quality import psnr
from tokenizer.data.classed_scenes import CLASS_NAMES, MOTIONS
from tokenizer.data.clips import ClipSample, DataConfig, build_dataset
from tokenizer.losses.perceptual import PerceptualDistance, load_perceptual
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import TrainedRouter, load_router
from tokenizer.router.results import rank_correlation

PER_CLASS = 20  # generated clips of each class
GUIDANCE = 2.25  # with a class: the default of the command; valid sequences are counted without guidance
GIVEN_FRAMES = 5
_SLOTS = 16
_BATCH = 16
_MOVING = MOTIONS[1:]  # all but still


def generation_figures(folder: Path, per_class: int = PER_CLASS) -> dict[str, Any]:
    """All figures of the GPTs in `folder` (final, router, gpt_c2v, gpt_fp), as plain numbers."""
    tokenizer, router = load_tokenizer(folder / "final.safetensors"), load_router(folder / "router.safetensors")
    class_gpt, frame_gpt = (load_gpt(folder / f"gpt_{task}.safetensors", size="GPT-mini") for task in ("c2v", "fp"))
    for gpt in (class_gpt, frame_gpt):
        check_tokenizer_fits(gpt, tokenizer)
    if class_gpt.class_names != NAMES:
        raise UserError(f"{class_gpt.origin} has the classes {list(class_gpt.class_names)}, not {list(NAMES)}")
    perceptual = load_perceptual("stlpips_alex")
    return {
        "sha256": {"gpt_c2v": class_gpt.sha256, "gpt_fp": frame_gpt.sha256, "final": tokenizer.sha256},
        "class_to_video": _class_to_video(class_gpt, tokenizer, router, per_class),
        "frame_prediction": _frame_prediction(frame_gpt, tokenizer, perceptual),
        "perceptual_net": perceptual.name,
    }


def _class_to_video(
    gpt: TrainedGPT, tokenizer: VideoTokenizer, router: TrainedRouter, per_class: int
) -> dict[str, Any]:
    true = _held_out(["duotone:heldout:100", "bundled:heldout"])
    true_names = [sample.label if sample.label in CLASS_NAMES else REAL for sample in true]
    video = torch.stack([sample.video_CTHW for sample in true])
    tokens = [tokenizer.encode(some, router=router) for some in video.split(_BATCH)]
    shown = torch.cat([tokenizer.decode(some) for some in tokens])
    router_tokens = torch.cat([some.length_BN.sum(dim=1) for some in tokens]).tolist()

    names = [name for name in NAMES for _ in range(per_class)]
    samples = _sample(gpt, names, SamplingConfig(_SLOTS, guidance=(GUIDANCE,)))
    generated = _decode(tokenizer, samples, gpt.model.layout)
    free = _sample(gpt, names, SamplingConfig(_SLOTS, check_grammar=False))

    classifier = train_scene_classifier(tokenizer.config.size, tokenizer.config.num_frames)
    of_gpt = _mean_by_name(names, [sum(sample.lengths) for sample in samples])
    of_router = _mean_by_name(true_names, router_tokens)
    return {
        "clips_per_class": per_class,
        "guidance": GUIDANCE,
        "accuracy": {
            "true": accuracy(classifier, video, true_names),
            "reconstructed": accuracy(classifier, shown, true_names),
            "generated": accuracy(classifier, generated, names),
        },
        "tokens": {name: {"generated": of_gpt[name], "router": of_router[name]} for name in NAMES},
        "rank_correlation_of_tokens": rank_correlation([of_gpt[n] for n in NAMES], [of_router[n] for n in NAMES]),
        "valid_without_mask": sum(sample.broken is None for sample in free) / len(free),
    }


def _frame_prediction(gpt: TrainedGPT, tokenizer: VideoTokenizer, perceptual: PerceptualDistance) -> dict[str, Any]:
    """Distance of the frames behind the given ones: predicted, repeated, and what the tokenizer itself would reach."""
    layout = gpt.model.layout
    true = [sample for sample in _held_out(["duotone:heldout:100"]) if sample.kind in _MOVING]
    video = torch.stack([sample.video_CTHW for sample in true])
    condition_BK = torch.cat(
        [encode_condition(tokenizer, some, GIVEN_FRAMES, layout.condition_lengths) for some in video.split(_BATCH)]
    )
    rule = length_rule(layout)
    requests = [Request((i,), None, condition_K, rule) for i, condition_K in enumerate(condition_BK)]
    samples = _in_order(Sampler(gpt.model, SamplingConfig(_SLOTS)).run(requests), len(requests), "frame prediction")
    length_BN = torch.tensor([sample.lengths for sample in samples])
    last = video[:, :, GIVEN_FRAMES - 1 : GIVEN_FRAMES].expand_as(video)
    ways = {
        "predicted": _decode(tokenizer, samples, layout),
        "last frame repeated": last,
        "last frame repeated, through the tokenizer": _reconstruct(tokenizer, last, length_BN),
        "true clip, through the tokenizer": _reconstruct(tokenizer, video, length_BN),
    }
    behind = slice(GIVEN_FRAMES, None)
    groups = {"all": list(range(len(true)))} | _places([sample.kind or "" for sample in true])
    tokens = length_BN.sum(dim=1).double().mean().item()
    figures: dict[str, Any] = {"clips": len(true), "tokens": tokens, "ways": {}}
    for name, ours in ways.items():
        pairs = zip(ours[:, :, behind].split(_BATCH), video[:, :, behind].split(_BATCH), strict=True)
        scores = [(perceptual.clip_distance(a, b), psnr(a, b)) for a, b in pairs]
        distance_B, decibel_B = (torch.cat(column).double() for column in zip(*scores, strict=True))
        figures["ways"][name] = {
            group: {"lpips": distance_B[at].mean().item(), "psnr": decibel_B[at].mean().item()}
            for group, at in groups.items()
        }
    return figures


def _held_out(sources: list[str]) -> list[ClipSample]:
    clips = build_dataset(DataConfig(sources, size=64, augment=False))
    return [clips.get(i) for i in range(len(clips))]


def _sample(gpt: TrainedGPT, names: Sequence[str], config: SamplingConfig) -> list[Sample]:
    rule = length_rule(gpt.model.layout)
    requests = [Request((i,), NAMES.index(name), rule=rule) for i, name in enumerate(names)]
    return _in_order(Sampler(gpt.model, config).run(requests), len(requests), "class-to-video")


def _in_order(samples: Iterable[Sample], num: int, what: str) -> list[Sample]:
    return sorted(tqdm(samples, what, num, unit="clip"), key=lambda sample: sample.request.key)


def _decode(tokenizer: VideoTokenizer, samples: list[Sample], layout: SequenceLayout) -> Tensor:
    parts = [samples[i : i + _BATCH] for i in range(0, len(samples), _BATCH)]
    return torch.cat([tokenizer.decode(tokens_of(part, layout, tokenizer)) for part in parts])


def _reconstruct(tokenizer: VideoTokenizer, video_BCTHW: Tensor, length_BN: Tensor) -> Tensor:
    pairs = zip(video_BCTHW.split(_BATCH), length_BN.split(_BATCH), strict=True)
    return torch.cat([tokenizer.decode(tokenizer.encode(video, lengths)) for video, lengths in pairs])


def _mean_by_name(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {name: sum(values[i] for i in at) / len(at) for name, at in _places(names).items()}


def _places(names: Sequence[str]) -> dict[str, list[int]]:
    places = defaultdict[str, list[int]](list)
    for i, name in enumerate(names):
        places[name].append(i)
    return dict(places)


def as_markdown(figures: dict[str, Any]) -> str:
    c2v, frames, net = figures["class_to_video"], figures["frame_prediction"], figures["perceptual_net"]
    share = {name: values["all"] for name, values in c2v["accuracy"].items()}
    lines = [
        f"{c2v['clips_per_class']} clips of each class, guidance {c2v['guidance']}. Recompute with "
        "`python scripts/mini/generation_figures.py`.",
        "",
        "| class-to-video | |",
        "|---|---|",
        f"| class recognised, true held-out clips | {share['true']:.1%} |",
        f"| class recognised, the same clips through the tokenizer | {share['reconstructed']:.1%} |",
        f"| class recognised, generated clips | {share['generated']:.1%} |",
        f"| rank correlation of tokens by class, generated and router | {c2v['rank_correlation_of_tokens']:.2f} |",
        f"| valid sequences without grammar masking | {c2v['valid_without_mask']:.1%} |",
        "",
        "| class | recognised | tokens, generated | tokens, router on true clips |",
        "|---|---|---|---|",
    ]
    for name, tokens in sorted(c2v["tokens"].items(), key=lambda item: item[1]["router"]):
        found = c2v["accuracy"]["generated"][name]
        lines.append(f"| {name} | {found:.0%} | {tokens['generated']:.1f} | {tokens['router']:.1f} |")
    lines += [
        "",
        f"Frame prediction, {frames['clips']} held-out moving scenes, frames {GIVEN_FRAMES + 1} to 16, "
        f"{frames['tokens']:.0f} tokens a clip:",
        "",
        f"| frames | {net}, all | PSNR, all | {' | '.join(f'{net}, {kind}' for kind in _MOVING)} |",
        "|---|---|---" + "|---" * len(_MOVING) + "|",
    ]
    for name, groups in frames["ways"].items():
        some = " | ".join(f"{groups[g]['lpips']:.4f}" for g in _MOVING)
        lines.append(f"| {name} | {groups['all']['lpips']:.4f} | {groups['all']['psnr']:.2f} | {some} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Recompute what the shipped miniature GPTs generate, in figures.")
    parser.add_argument("--folder", type=Path, default=Path("ckpts/mini"), help="final, router, gpt_c2v and gpt_fp")
    parser.add_argument("--per-class", type=int, default=PER_CLASS, help="generated clips of each class")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of tables")
    args = parser.parse_args()
    figures = generation_figures(args.folder, args.per_class)
    print(json.dumps(figures, indent=1) if args.json else as_markdown(figures))


if __name__ == "__main__":
    run_cli(main)
