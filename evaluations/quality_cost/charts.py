"""Quality over cost as charts: one line for each strategy, cost on a binary logarithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizer.viz.plots import Series, line_chart, to_svg

_TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM"}


def charts(metrics: Mapping[str, Any], alone: bool = False) -> dict[str, str]:
    """File name -> SVG: each metric over tokens, and over bytes if there are codecs or entropy-coded tokens."""
    names = dict.fromkeys(point["strategy"] for point in metrics["points"])
    by_tokens = {point["strategy"] for point in metrics["points"] if "tokens" in point}
    coded = set(names) - by_tokens
    over_bytes = coded | {name for name in names if name in ("uniform", "average", "router") or "entropy" in name}
    made = {}
    for metric in (*metrics["metrics"], *metrics["frechet"]):
        title = _TITLES.get(metric, f"{metric}, lower is better")
        lines = series_of(metrics["points"], "tokens", metric, lambda name: name in by_tokens and "entropy" not in name)
        made[f"{metric}_over_tokens.svg"] = _chart(lines, "tokens per clip", title, alone)
        if len(over_bytes) > 1 and over_bytes != by_tokens:
            lines = series_of(metrics["points"], "bytes", metric, lambda name: name in over_bytes)
            made[f"{metric}_over_bytes.svg"] = _chart(lines, "bytes per clip", title, alone)
    return made


def series_of(
    points: Sequence[Mapping[str, Any]], cost: str, quality: str, only: Callable[[str], bool]
) -> list[Series]:
    """The points of a metrics.json as lines, strategy by strategy in their order; points without a figure left out."""
    names = dict.fromkeys(point["strategy"] for point in points)
    lines = []
    for look, name in enumerate(names):  # the same in every chart of these points
        mine = [p for p in points if p["strategy"] == name and p.get(cost) and p.get(quality) is not None]
        marks = sorted((p[cost], p[quality], f"{name} {p['setting']}: {p[cost]:.4g}, {p[quality]:.4g}") for p in mine)
        if marks and only(name):
            lines.append(Series(name, [mark[:2] for mark in marks], [mark[2] for mark in marks], look=look))
    return lines


def _chart(lines: Sequence[Series], x_title: str, y_title: str, alone: bool) -> str:
    return to_svg(line_chart(lines, x_title, y_title, log2_x=True), f"{y_title} over {x_title}", alone)
