"""From the records and features of all clips to the numbers of a table.

metrics.json:

    {"card": the protocol card, "num_clips", "num_skipped", "notes": [what a reader must be told],
     "metrics": {name: {"value", "low", "high", "level", "draws"}},     # low .. draws null where there is no interval
     "tokens_counted": how "tokens" and "tokens_with_length_tokens" differ}

Names of metrics carry their network: stlpips_alex, lpips_vgg, fvd_i3d, fcd_effnet, kcd_effnet.

Letters: S clips, F numbers in a feature.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluations.metrics.bootstrap import Interval, mean_interval, spread_interval
from evaluations.metrics.clip_scores import mean_scores
from evaluations.metrics.frechet import (
    KERNEL_NAMES,
    NAMES,
    fit_gaussian,
    frechet_distance,
    frechet_of_features,
    kernel_distance,
)
from evaluations.protocols import MIN_CLIPS, Protocol
from evaluations.shards import Record

_DISTANCE_SHARE = 20  # a distance takes this much fewer draws: each is another decomposition
COUNTED = ("tokens", "tokens_with_length_tokens")


def summarise(
    protocol: Protocol,
    records: Sequence[Record],
    ours: tuple[Tensor, Tensor],
    real: tuple[Tensor, Tensor],
    force: bool = False,
) -> dict[str, Any]:
    """`metrics`, `notes`, `num_clips`, `num_skipped`. ours, real: (places in the list [S], features [S, F])."""
    good = [record for record in records if "skipped" not in record]
    notes = [] if len(good) == len(records) else [f"{len(records) - len(good)} clips were skipped, see per_clip.csv"]
    if padded := sum(bool(record.get("num_padded")) for record in good):
        notes.append(f"{padded} clips repeat their last frame: their videos are shorter (num_padded in per_clip.csv)")
    if others := sum(record.get("sampled_class", record.get("label")) != record.get("label") for record in good):
        notes.append(f"{others} samples are of another class than the real clip in their place: shares differ")
    metrics = _means(good, protocol)
    if protocol.extractor != "none":
        num_clips, distance = min(len(ours[0]), len(real[0])), NAMES[protocol.extractor]
        too_few = num_clips < MIN_CLIPS
        if num_clips < 2:
            notes.append(f"{distance} not computed: it needs at least 2 clips a side, there is {num_clips}")
        elif too_few and not force:
            notes.append(f"{distance} not computed: {num_clips} clips are fewer than {MIN_CLIPS}; --force computes it")
        else:
            if too_few:
                notes.append(f"{distance} FORCED on {num_clips} clips, fewer than {MIN_CLIPS}: not to be compared")
            metrics |= _distances(protocol, ours[1], real[1])
    counted = "tokens: codes; tokens_with_length_tokens: one more for each temporal block"
    return {
        "num_clips": len(good),
        "num_skipped": len(records) - len(good),
        "notes": notes,
        "metrics": metrics,
        "tokens_counted": counted,
    }


def per_clip_table(records: Sequence[Record]) -> str:
    """A .csv with a row for each clip; lists are written with spaces between."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    out = io.StringIO()
    table = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    table.writeheader()
    for record in records:
        table.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in record.items()})
    return out.getvalue()


def pick_shown(
    protocol: Protocol, records: Sequence[Record], ours: tuple[Tensor, Tensor], real: Tensor
) -> dict[str, int]:
    """ "best", "median", "worst" -> place in the list.

    By the perceptual distance (else PSNR) where a clip has an original of its own; for class-to-video by how far the
    clip's feature lies from the mean of the real ones.
    """
    good = [record for record in records if "skipped" not in record]
    if protocol.paired:
        key = protocol.perceptual if protocol.perceptual != "none" else "mse"
        ranked = sorted(good, key=lambda record: (record[key], record["index"]))
        order = [record["index"] for record in ranked]
    elif len(ours[0]) and len(real):
        order = ours[0][(ours[1] - real.mean(dim=0)).norm(dim=1).argsort(stable=True)].tolist()
    else:
        order = [record["index"] for record in good]
    return {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]} if order else {}


def result_lines(summary: dict[str, Any]) -> list[str]:
    """The numbers for people, one a line."""
    lines = [f"{'clips':<26}{summary['num_clips']} scored, {summary['num_skipped']} skipped"]
    for name, metric in summary["metrics"].items():
        interval = "" if metric["low"] is None else f"  [{metric['low']:.4f}, {metric['high']:.4f}]"
        lines.append(f"{name:<26}{metric['value']:.4f}{interval}")
    return [*lines, *(f"note: {note}" for note in summary["notes"])]


def _means(records: Sequence[Record], protocol: Protocol) -> dict[str, Any]:
    """Means over clips with their intervals."""
    if not records:
        return {}
    metrics = {}
    qualities = [name for name in ("psnr", "ssim", protocol.perceptual) if name in records[0]]
    if qualities:
        means = mean_scores([{name: record[name] for name in ("mse", *qualities)} for record in records])
        for name in qualities:
            value_S = np.array([record[name] for record in records])
            metrics[name] = _metric(means[name], mean_interval(value_S, protocol.seed, protocol.draws))
        metrics["psnr_of_mean_mse"] = _metric(means["psnr_of_mean_mse"], None)
    for name in COUNTED:
        if name in records[0]:
            value_S = np.array([record[name] for record in records], dtype=np.float64)
            metrics[name] = _metric(float(value_S.mean()), mean_interval(value_S, protocol.seed, protocol.draws))
    return metrics


def _distances(protocol: Protocol, ours_SF: Tensor, real_SF: Tensor) -> dict[str, Any]:
    """Frechet and kernel distance; the interval of the first redraws the clips of both sides alike."""
    covariance = protocol.covariance
    value = frechet_distance(fit_gaussian([ours_SF], covariance), fit_gaussian([real_SF], covariance))
    draws = protocol.draws // _DISTANCE_SHARE
    interval = None
    if draws > 1 and len(ours_SF) == len(real_SF):

        def redrawn(index_S: np.ndarray) -> float:
            place_S = torch.from_numpy(index_S)
            return frechet_of_features(ours_SF[place_S], real_SF[place_S], covariance)

        interval = spread_interval(value, redrawn, len(ours_SF), protocol.seed, draws)
    return {
        NAMES[protocol.extractor]: _metric(value, interval),
        KERNEL_NAMES[protocol.extractor]: _metric(kernel_distance(ours_SF, real_SF), None),
    }


def _metric(value: float, interval: Interval | None) -> dict[str, Any]:
    nothing = dict.fromkeys(("low", "high", "level", "draws"))
    return {"value": value, **(nothing if interval is None else dataclasses.asdict(interval))}
