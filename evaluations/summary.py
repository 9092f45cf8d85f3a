"""From the records and features of all clips to the numbers of a table.

metrics.json:

    {"card": the protocol card, "num_clips", "num_skipped", "num_padded", "notes": [what a reader must know],
     "metrics": {name: {"value", "low", "high", "level", "draws", "defined"}},   # low, high null: no interval
     "without_padded": the same means over clips without repeated frames, null if no clip has any,
     "tokens_counted": how "tokens" and "tokens_with_length_tokens" differ}

Names of metrics carry their network: stlpips_alex, lpips_vgg, fvd_i3d, fcd_effnet, kcd_effnet. The interval of a
Frechet distance is for its value at this number of clips; NAME_infinity estimates the value of infinitely many clips,
and its interval is for that.

Letters: S clips, F numbers in a feature.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from evaluations.flags import MIN_CLIPS
from evaluations.metrics.bootstrap import Interval, mean_interval
from evaluations.metrics.clip_scores import TOKEN_COUNTS, mean_scores
from evaluations.metrics.extractors import Extractor
from evaluations.metrics.frechet import KERNEL_NAMES, NAMES, frechet_jackknife, kernel_distance
from evaluations.protocols import Protocol
from evaluations.shards import Record

INFINITY = "_infinity"


def summarise(
    protocol: Protocol,
    records: Sequence[Record],
    ours: tuple[Tensor, Tensor],
    real: tuple[Tensor, Tensor],
    force: bool = False,
    extractor: Extractor | None = None,
) -> dict[str, Any]:
    """Everything in metrics.json but the card. ours, real: (places in the list [S], features [S, F]).

    extractor: names the distances after its weights; without one they are named after the protocol's extractor.
    """
    good = [record for record in records if "skipped" not in record]
    whole = [record for record in good if not record.get("num_padded")]
    num_padded, notes = len(good) - len(whole), _notes(records, good, len(good) - len(whole))
    metrics = _means(good, protocol)
    if protocol.extractor != "none":
        name = extractor.distance_name if extractor else NAMES[protocol.extractor]
        kernel_name = extractor.kernel_name if extractor else KERNEL_NAMES[protocol.extractor]
        notes += extractor.notes if extractor else []
        num_clips = min(len(ours[0]), len(real[0]))
        too_few = num_clips < MIN_CLIPS
        if num_clips < 2:
            notes.append(f"{name} not computed: it needs at least 2 clips a side, there is {num_clips}")
        elif too_few and not force:
            notes.append(f"{name} not computed: {num_clips} clips are fewer than {MIN_CLIPS}; --force computes it")
        else:
            if too_few:
                notes.append(f"{name} FORCED on {num_clips} clips, fewer than {MIN_CLIPS}: not to be compared")
            found, note = _distances(protocol, name, ours[1], real[1])
            metrics |= found | {kernel_name: _metric(kernel_distance(ours[1], real[1]), None)}
            notes += note
    return {
        "num_clips": len(good),
        "num_skipped": len(records) - len(good),
        "num_padded": num_padded,
        "notes": notes,
        "metrics": metrics,
        "without_padded": _means(whole, protocol) if num_padded else None,
        "tokens_counted": "tokens: codes; tokens_with_length_tokens: one more for each temporal block",
    }


def _notes(records: Sequence[Record], good: Sequence[Record], num_padded: int) -> list[str]:
    """What a reader must know of the clips: skipped, padded, below the quality asked for, from odd files."""
    notes = [] if len(good) == len(records) else [f"{len(records) - len(good)} clips were skipped, see per_clip.csv"]
    if num_padded:
        notes.append(
            f"{num_padded} of {len(good)} clips are padded: their videos are shorter, so the last frame is repeated "
            "(num_padded in per_clip.csv); without_padded has the means without them"
        )
    kinds = Counter(note.partition(":")[0] for record in good for note in record.get("file_notes", ()))
    notes += [
        f"{num} clips come from files with {kind!r}, see file_notes in per_clip.csv" for kind, num in kinds.items()
    ]
    if missed := sum(not record.get("keeps_quality", True) for record in good):
        notes.append(
            f"no assignment is predicted to keep quality:Q for {missed} clips: they got the best predicted one"
        )
    if others := _other_classes(good):
        notes.append(f"{others} samples are of another class than the real clips: shares differ")
    return notes


def _other_classes(records: Sequence[Record]) -> int:
    """How many of the given samples would need another class for the shares of classes to agree."""
    given = [record for record in records if "sampled_class" in record]
    wanted = Counter(str(record.get("label")).casefold() for record in given)
    return (Counter(str(record["sampled_class"]).casefold() for record in given) - wanted).total()


def csv_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """A .csv with a header. Lists are written with spaces between; what a row lacks stays empty.

    Text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def per_clip_table(records: Sequence[Record]) -> bytes:
    """per_clip.csv: a row for each clip."""
    return csv_table(list(dict.fromkeys(name for record in records for name in record)), records)


def pick_shown(
    protocol: Protocol, records: Sequence[Record], ours: tuple[Tensor, Tensor], real: Tensor
) -> dict[str, int]:
    """ "best", "median", "worst" -> place in the list.

    Ranked by the perceptual distance (else the squared error) if each clip has an original; for class-to-video by how
    far the clip's feature lies from the mean of the real ones.
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


def result_lines(summary: Mapping[str, Any]) -> list[str]:
    """The numbers for people, one a line."""
    counts = f"{summary['num_clips']} scored, {summary['num_skipped']} skipped, {summary['num_padded']} padded"
    lines = [f"{'clips':<26}{counts}"]
    for name, metric in summary["metrics"].items():
        interval = "" if metric["low"] is None else f"  [{metric['low']:.4f}, {metric['high']:.4f}]"
        lines.append(f"{name:<26}{metric['value']:.4f}{interval}")
    for name, metric in (summary["without_padded"] or {}).items():
        lines.append(f"{name + ', no padded':<26}{metric['value']:.4f}")
    return [*lines, *(f"note: {note}" for note in summary["notes"])]


def _means(records: Sequence[Record], protocol: Protocol) -> dict[str, Any]:
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
    for name in TOKEN_COUNTS:
        if name in records[0]:
            value_S = np.array([record[name] for record in records], dtype=np.float64)
            metrics[name] = _metric(float(value_S.mean()), mean_interval(value_S, protocol.seed, protocol.draws))
    return metrics


def _distances(protocol: Protocol, name: str, ours_SF: Tensor, real_SF: Tensor) -> tuple[dict[str, Any], list[str]]:
    """The Frechet distance at this number of clips and extrapolated to infinitely many, and why the latter is missing.

    Clips and their originals are one set: both are left out together. Samples of a class and real clips are two sets.
    """
    paired = protocol.paired and len(ours_SF) == len(real_SF)
    value, found = frechet_jackknife(ours_SF, real_SF, paired, protocol.covariance, protocol.seed)
    num_clips, width = min(len(ours_SF), len(real_SF)), ours_SF.shape[1]
    metrics = {name: _metric(value, found.interval if found else None)}
    if found and num_clips > width:
        return metrics | {f"{name}{INFINITY}": _metric(found.limit, found.limit_interval)}, []
    return metrics, [f"{name}{INFINITY} not computed: it needs more clips than the {width} features, not {num_clips}"]


def _metric(value: float, interval: Interval | None) -> dict[str, Any]:
    nothing = {field.name: None for field in dataclasses.fields(Interval)}
    return {"value": value, **(nothing if interval is None else dataclasses.asdict(interval))}
