"""The frame of a chart as inline SVG that takes its colours from a style sheet: grid, marks, titles."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 480, 280, 46, 40, 22, 8


def level_line(y: float, label: str, right: float = RIGHT) -> str:
    """A line of the grid with its mark; `right`: what is left free at the right edge."""
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'


def x_mark(x: float, label: str) -> str:
    """A mark under the chart."""
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{label}</text>'


def svg(parts: Sequence[str], x_title: str, y_title: str, name: str, style: str = "") -> str:
    """The whole chart. `style`: rules for a picture that stands alone; inside a page the page has them."""
    titles = f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{x_title}</text>'
    titles += f'<text x="0" y="10">{y_title}</text>'
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}"'
    if style:
        box, style = f'xmlns="http://www.w3.org/2000/svg" {box}', f"<style>{style}</style>"
    return f'<svg class="chart" {box}>{style}{"".join(parts)}{titles}</svg>'
