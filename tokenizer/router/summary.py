"""Summary of a set of finished clips: means, padding, assignments, motion and tokens, use of the codebook.

Letters: S clips of the whole set, V codebook size.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from tokenizer.model import VideoTokenizer
from tokenizer.presets import PRESETS
from tokenizer.tokens import VideoTokens

MEASURES = ("tokens", "psnr", "ssim", "lpips", "motion")
UNIFORM_MEASURES = ("uniform_tokens", "uniform_psnr", "uniform_ssim", "uniform_lpips")  # with --compare-uniform
CURVE_POINTS = 129
PACKAGES = ("evatok", "torch", "av", "numpy")


def means(records: Sequence[Mapping[str, Any]], measures: Sequence[str] = MEASURES) -> dict[str, Any]:
    """Mean of every measure over the clips; None if a clip lacks it (lpips without weights)."""
    columns = {key: [record[key] for record in records] for key in measures}  # [S] each
    return {key: None if None in column else float(np.mean(column)) for key, column in columns.items()}


def floor_use(
    records: Sequence[Mapping[str, Any]], floor: Mapping[str, Any], lpips_backbone: str | None
) -> dict[str, Any]:
    """How quality:Q was kept: clips that no assignment keeps it for by prediction, and the measured ones that do.

    Measured: LPIPS at most Q; None unless it is the network's whose distance was predicted.
    """
    num_kept = None
    if lpips_backbone is not None and lpips_backbone == floor["perceptual_net"]:
        num_kept = sum(record["lpips"] <= floor["distance"] for record in records)
    return {"num_not_predicted": sum(not r["keeps_quality"] for r in records), "num_kept_measured": num_kept}


def assignment_use(records: Sequence[Mapping[str, Any]], num_possible: int) -> dict[str, Any]:
    """The number of distinct assignments, of `num_possible`; the commonest one and its share of the clips, 0 to 1."""
    ranked = Counter(tuple(record["assignment"]) for record in records).most_common()
    commonest, count = min(ranked, key=lambda item: (-item[1], sum(item[0]), item[0]))  # a tie goes to the cheaper
    return {
        "num_distinct": len(ranked),
        "num_possible": num_possible,
        "commonest": list(commonest),
        "commonest_share": count / len(records),
    }


def tokens_by_motion(records: Sequence[Mapping[str, Any]], num_groups: int = 3) -> list[dict[str, Any]]:
    """Mean motion and mean tokens of the stillest third of the clips, the middle third, and the liveliest third."""
    ranked = sorted(records, key=lambda record: record["motion"])
    groups = [ranked[i * len(ranked) // num_groups : (i + 1) * len(ranked) // num_groups] for i in range(num_groups)]
    return [
        {"num_clips": len(group)} | {key: float(np.mean([r[key] for r in group])) for key in ("motion", "tokens")}
        for group in groups
        if group
    ]


def padding(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Clips whose last frame is repeated, how many such frames there are, and the means of the other clips or None."""
    padded = [record["num_padded"] for record in records if record["num_padded"]]
    whole = [record for record in records if not record["num_padded"]]
    return {
        "num_clips": len(padded),
        "num_frames": sum(padded),
        "mean_without": means(whole) if whole else None,
    }


def rank_correlation(x_S: Sequence[float], y_S: Sequence[float]) -> float | None:
    """Spearman's coefficient, -1 to 1, equal values sharing their mean rank. None if all values of a side are equal."""
    if len(set(x_S)) < 2 or len(set(y_S)) < 2:
        return None
    return float(spearmanr(x_S, y_S).statistic)  # ties get mean ranks


def codebook_use(token_files: Iterable[Path], codebook_size: int) -> dict[str, Any]:
    """How evenly the codes are used, read from saved tokens one file at a time.

    `share_used` of the codebook, `perplexity` (1 .. V; V when all codes are equally frequent), `num_drawn` codes in
    all, and `curve`: frequencies from the commonest code down, at evenly spaced ranks, relative to an even use.
    """
    count_V = np.zeros(codebook_size, np.int64)
    for path in token_files:
        count_V += np.bincount(VideoTokens.load(path).code_L.numpy(), minlength=codebook_size)
    share_V = np.sort(count_V / max(1, count_V.sum()))[::-1]  # commonest first
    used = share_V[share_V > 0]
    at = np.linspace(0, codebook_size - 1, min(CURVE_POINTS, codebook_size)).round().astype(int)
    return {
        "size": codebook_size,
        "num_drawn": int(count_V.sum()),
        "share_used": len(used) / codebook_size,
        "perplexity": float(np.exp(-(used * np.log(used)).sum())),  # exp of the entropy in nats
        "curve": (share_V[at] * codebook_size).tolist(),
    }


def tokenizer_facts(tokenizer: VideoTokenizer) -> dict[str, Any]:
    """The tokenizer's shape and sha256. `paper_size`: whether it has the shape of the paper's S-B."""
    config, paper = tokenizer.config, PRESETS["VQ_SB"]
    return {
        "sha256": tokenizer.sha256,
        "num_parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
        "num_frames": config.num_frames,
        "size": config.size,
        "num_blocks": config.num_blocks,
        "levels": list(config.levels),
        "codebook_size": config.codebook_size,
        "paper_size": replace(config, codebook_size=paper.codebook_size, init=paper.init) == paper,
    }


def versions() -> dict[str, str]:
    """Python and the packages that can change a figure."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # the repository itself, run in place
