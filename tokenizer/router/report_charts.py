"""The charts of the report, as HTML and inline SVG that take their colours from the style sheet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from tokenizer.common.chart import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, level_line, svg, x_mark
from tokenizer.router.report_words import Record

MOST_DOTS = 2000
MOST_ASSIGNMENTS = 12


def motion_against_tokens(records: Sequence[Record], totals: Sequence[int], links: Mapping[str, str]) -> str:
    """A dot for each clip: motion on a square-root scale, tokens on a binary logarithm.

    `totals`: the tokens of the even splits, which are the marks of the vertical axis. `links`: clip name -> anchor.
    """
    shown = evenly(records, MOST_DOTS)
    most_motion = max(1.0, *(r["motion"] for r in records)) * 1.04
    low, high = math.log2(totals[0]) - 0.25, math.log2(totals[-1]) + 0.15

    def x(motion: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * math.sqrt(motion / most_motion)

    def y(tokens: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log2(tokens)) / (high - low)

    parts = [level_line(y(total), str(total)) for total in totals]
    parts += [x_mark(x(mark), f"{mark:g}") for mark in _marks(most_motion, x)]
    for r in shown:
        hint = f"{r['file']}, frame {r['start']}: motion {r['motion']:.1f}, {r['tokens']} tokens"
        dot = f'<circle class="dot" cx="{x(r["motion"]):.1f}" cy="{y(r["tokens"]):.1f}" r="5"/>'
        dot = f"<g>{dot}<title>{escape(hint)}</title></g>"
        anchor = links.get(r["name"])
        parts.append(f'<a href="#{anchor}">{dot}</a>' if anchor else dot)
    return svg(parts, "motion, mean absolute difference of neighbouring frames", "tokens", "Tokens against motion")


def codebook_curve(codebook: Mapping[str, Any]) -> str:
    """Frequency of the codes from the commonest to the rarest; 1 is an even use of all."""
    curve = codebook["curve"]
    top = max(2.0, max(curve)) * 1.05

    def x(share: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * share

    def y(frequency: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - math.sqrt(frequency / top))

    floor = y(0)
    points = " ".join(f"{x(i / max(1, len(curve) - 1)):.1f},{y(value):.1f}" for i, value in enumerate(curve))
    marks = [mark for mark in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if mark <= top]
    parts = [level_line(y(mark), f"{mark}×") for mark in marks[-3:]] + [level_line(floor, "0")]
    parts.append(f'<line class="even" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(1):.1f}" y2="{y(1):.1f}"/>')
    parts.append(f'<text x="{WIDTH - 10}" y="{y(1) - 5:.1f}" text-anchor="end">even use</text>')
    parts.append(f'<polygon class="area" points="{LEFT},{floor:.1f} {points} {WIDTH - 8},{floor:.1f}"/>')
    parts += [x_mark(x(share), f"{round(share * codebook['size'])}") for share in (0, 0.25, 0.5, 0.75, 1)]
    return svg(parts, "codes, commonest first", "frequency", "Use of the codebook")


def assignment_histogram(records: Sequence[Record], longest: int) -> tuple[str, str]:
    """The commonest assignments with their counts, and a line about the others."""
    counts = Counter(tuple(r["assignment"]) for r in records)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], sum(item[0])))
    rows = []
    for lengths, count in ranked[:MOST_ASSIGNMENTS]:
        bars = "".join(f'<i style="height:{max(6, 100 * length / longest):.0f}%"></i>' for length in lengths)
        share = 100 * count / ranked[0][1]
        rows.append(
            f'<span class="glyph">{bars}</span><span>{" ".join(map(str, lengths))}</span>'
            f'<span class="count"><i style="width:{share:.0f}%"></i></span><span>{count}</span>'
        )
    rest = ranked[MOST_ASSIGNMENTS:]
    line = "One assignment for all clips." if len(counts) == 1 else f"{len(counts)} different assignments."
    if rest:
        line += f" Those not drawn have {sum(count for _, count in rest)} clips together."
    return f'<div class="rows">{"".join(rows)}</div>', line


def levels_by_block(records: Sequence[Record], levels: Sequence[int]) -> str:
    """A table: how many per cent of the clips give each level to each block, and the mean of each block."""
    length_SN = np.array([r["assignment"] for r in records])
    head = "".join(f"<th>block {t + 1}</th>" for t in range(length_SN.shape[1]))
    rows = []
    for level in reversed(levels):
        shares = 100 * (length_SN == level).mean(axis=0)
        cells = "".join(
            f'<td style="--share:{12 + 0.58 * share:.0f}%">{share:.0f} %</td>' if share else "<td></td>"
            for share in shares
        )
        rows.append(f"<tr><th>{level}</th>{cells}</tr>")
    means = "".join(f"<td>{mean:.0f}</td>" for mean in length_SN.mean(axis=0))
    return (
        f'<table class="levels"><thead><tr><th>tokens</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f"<tfoot><tr><th>mean</th>{means}</tr></tfoot></table>"
    )


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, the first and the last among them, at even distances."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _marks(most: float, x: Any) -> list[float]:
    """Round numbers up to `most` whose labels do not touch."""
    kept: list[float] = [0.0]
    for mark in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 50, 70, 100, 150, 200, 255):
        if mark <= most and x(mark) - x(kept[-1]) > 44:
            kept.append(mark)
    return kept
