"""Quality over cost as a chart: one line for each strategy, cost on a binary logarithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tokenizer.viz.plots import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, level_line, svg, x_mark

_LEGEND = 150  # width at the right that the names take
_MOST_X_MARKS = 7

# Told apart by colour and by shape; ordered so that neighbours differ most. Both colour schemes.
_LIGHT = ("#1d1b19", "#b8630a", "#1f6fb2", "#2f8f5b", "#a8326d", "#6a5acd", "#8a8178", "#00838f", "#c0392b", "#7a6a00")
_DARK = ("#ece9e5", "#f0a13a", "#6bb3ef", "#63c890", "#ef7fb4", "#a79bf5", "#a39d95", "#4fd0dd", "#f08376", "#d8c24a")

CURVE_STYLE = (
    ":root{" + "".join(f"--s{i}:{colour};" for i, colour in enumerate(_LIGHT)) + "}\n"
    "@media (prefers-color-scheme: dark){:root{"
    + "".join(f"--s{i}:{colour};" for i, colour in enumerate(_DARK))
    + "}}\n"
    + "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(len(_LIGHT)))
    + "\n.chart .curve{fill:none;stroke:var(--c);stroke-width:1.6;stroke-linejoin:round;opacity:.85}\n"
    ".chart .mark{fill:var(--c);stroke:var(--card);stroke-width:.8}\n"
    ".chart .name{fill:var(--ink)}\n"
)
_ALONE = (
    ":root{--card:#fff;--ink:#1d1b19;--soft:#6f6a64;--line:#e4e1db}\n"
    "@media (prefers-color-scheme: dark){:root{--card:#1c1a19;--ink:#ece9e5;--soft:#a39d95;--line:#322f2c}}\n"
    "svg{background:var(--card);padding:12px;box-sizing:border-box}\n"
    ".chart text{font:12px system-ui,sans-serif;fill:var(--soft)}\n"
    ".chart .grid{stroke:var(--line);stroke-width:1}\n"
)


_TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM"}


def charts(metrics: Mapping[str, Any], alone: bool = False) -> dict[str, str]:
    """File name -> SVG: each metric over tokens, and over bytes where there are codecs or entropy-coded tokens."""
    names = dict.fromkeys(point["strategy"] for point in metrics["points"])
    by_tokens = {point["strategy"] for point in metrics["points"] if "tokens" in point}
    coded = set(names) - by_tokens
    over_bytes = coded | {name for name in names if name in ("uniform", "average", "router") or "entropy" in name}
    made = {}
    for metric in (*metrics["metrics"], *metrics["frechet"]):
        title = _TITLES.get(metric, f"{metric}, lower is better")
        lines = series_of(metrics["points"], "tokens", metric, lambda name: name in by_tokens and "entropy" not in name)
        made[f"{metric}_over_tokens.svg"] = curve_chart(lines, "tokens a clip", title, alone)
        if len(over_bytes) > 1 and over_bytes != by_tokens:
            lines = series_of(metrics["points"], "bytes", metric, lambda name: name in over_bytes)
            made[f"{metric}_over_bytes.svg"] = curve_chart(lines, "bytes a clip", title, alone)
    return made


@dataclass(frozen=True)
class Series:
    """One line: its name, and (cost, quality, what to say of the point) for each point. `look`: colour and shape."""

    name: str
    points: tuple[tuple[float, float, str], ...]
    look: int = 0


def series_of(
    points: Sequence[Mapping[str, Any]], cost: str, quality: str, only: Callable[[str], bool]
) -> list[Series]:
    """The points of a metrics.json as lines, strategy by strategy in their order; those without a figure left out."""
    names = dict.fromkeys(point["strategy"] for point in points)
    lines = []
    for look, name in enumerate(names):  # the same in every chart of these points
        if not only(name):
            continue
        mine = [p for p in points if p["strategy"] == name and p.get(cost) and p.get(quality) is not None]
        marks = sorted((p[cost], p[quality], f"{name} {p['setting']}") for p in mine)
        if marks:
            lines.append(Series(name, tuple(marks), look))
    return lines


def curve_chart(lines: Sequence[Series], x_title: str, y_title: str, alone: bool = False) -> str:
    """The chart as SVG; `alone`: with its own style sheet, as a file, otherwise with CURVE_STYLE in the page."""
    costs = [cost for line in lines for cost, _, _ in line.points]
    qualities = [quality for line in lines for _, quality, _ in line.points]
    left, right = math.log2(min(costs)) - 0.15, math.log2(max(costs)) + 0.15
    marks = _round_marks(min(qualities), max(qualities))
    low, high = min(marks[0], min(qualities)), max(marks[-1], max(qualities))

    def x(cost: float) -> float:
        return LEFT + (WIDTH - LEFT - _LEGEND) * (math.log2(cost) - left) / (right - left)

    def y(quality: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - quality) / (high - low)

    parts = [level_line(y(mark), f"{mark:g}", _LEGEND) for mark in marks]
    parts += [x_mark(x(mark), f"{mark:g}") for mark in _powers_of_two(2**left, 2**right)]
    for index, line in enumerate(lines):
        path = " ".join(f"{x(cost):.1f},{y(quality):.1f}" for cost, quality, _ in line.points)
        dots = "".join(
            f"<g>{_dot(line.look, x(cost), y(quality))}<title>{escape(hint)}: {cost:.4g}, {quality:.4g}</title></g>"
            for cost, quality, hint in line.points
        )
        at = TOP + 6 + 17 * index
        legend = _dot(line.look, WIDTH - _LEGEND + 16, at)
        legend += f'<text class="name" x="{WIDTH - _LEGEND + 26}" y="{at + 4}">{escape(line.name)}</text>'
        parts.append(
            f'<g class="s{line.look % len(_LIGHT)}"><polyline class="curve" points="{path}"/>{dots}{legend}</g>'
        )
    return svg(
        parts,
        escape(x_title),
        escape(y_title),
        escape(f"{y_title} over {x_title}"),
        CURVE_STYLE + _ALONE if alone else "",
    )


def _dot(look: int, x: float, y: float) -> str:
    """Circle, square, diamond or triangle, in turn."""
    shape = look % 4
    if shape == 0:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if shape == 1:
        return f'<rect class="mark" x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"/>'
    diamond, triangle = ((0, -5), (5, 0), (0, 5), (-5, 0)), ((0, -5), (5, 4), (-5, 4))
    corners = diamond if shape == 2 else triangle
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="mark" points="{points}"/>'


def _round_marks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that span [low, high]."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _powers_of_two(low: float, high: float) -> list[float]:
    """Powers of two within the range, thinned until they fit; halves between them where there are too few."""
    powers = [2.0**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    if len(powers) < 3:
        powers = sorted({*powers, *(1.5 * 2.0**k for k in range(-2, 40) if low <= 1.5 * 2.0**k <= high)})
    return powers[:: -(-len(powers) // _MOST_X_MARKS)] if powers else []
