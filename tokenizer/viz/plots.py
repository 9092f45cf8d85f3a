"""The curves of several runs laid over each other, one panel a figure, as one HTML page or one PNG.

    python -m tokenizer.viz.plots results/vq/proxy results/vq/other --out curves.html
    python -m tokenizer.viz.plots results/mini/*/metrics.jsonl --only loss,val/psnr_policy --out curves.png

A RUN is a results folder or a metrics.jsonl. The HTML needs no server and no internet.

The frame of a chart as inline SVG that takes its colours from a style sheet: grid, marks, titles.
"""

from __future__ import annotations

import argparse
import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from tokenizer.common.errors import UserError, run_cli

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


Points = list[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 260, 58, 26, 24  # of a panel, and its margins, in pixels
_COLUMNS = 2
_COLOURS = ("#1f5fa8", "#c8501e", "#2f8a4c", "#8a3fa0", "#a88a1f", "#3f9aa0", "#a03f5c", "#5c5c5c")
_NOT_BY_DEFAULT = ("seconds", "perf/eta_seconds", "lr", "adversary/lr")


@dataclass(frozen=True)
class Panel:
    """One figure: the curve of each run that logged it, and the range of all of them."""

    name: str
    curves: dict[str, Points]

    @property
    def ranges(self) -> tuple[float, float, float, float]:
        """(first step, last step, lowest, highest), never empty."""
        xs, ys = ([point[i] for curve in self.curves.values() for point in curve] for i in (0, 1))
        low, high = min(ys), max(ys)
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        return min(xs), max(max(xs), min(xs) + 1), low - pad, high + pad

    def pixel(self, point: tuple[float, float]) -> tuple[float, float]:
        """Where a (step, value) lies inside the panel."""
        x0, x1, y0, y1 = self.ranges
        x = _LEFT + (point[0] - x0) / (x1 - x0) * (_WIDTH - _LEFT - 12)
        y = _TOP + (y1 - point[1]) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    def labels(self) -> Iterator[tuple[float, float, str]]:
        """(x, y, text) of the numbers at the axes."""
        x0, x1, y0, y1 = self.ranges
        for share in (0.0, 0.5, 1.0):
            value, step = y0 + share * (y1 - y0), x0 + share * (x1 - x0)
            yield 4, self.pixel((x0, value))[1] - 5, f"{value:.4g}"
            yield self.pixel((step, y0))[0] - 14, _HEIGHT - _BOTTOM + 6, f"{step:.0f}"


def read_runs(paths: list[Path]) -> dict[str, Path]:
    """Label -> metrics.jsonl; labels are the shortest ends of the paths that tell the runs apart."""
    files = [path / "metrics.jsonl" if path.is_dir() else path for path in paths]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; give results folders or metrics.jsonl files")
    folders = [file.resolve().parts[:-1] if file.name == "metrics.jsonl" else file.resolve().parts for file in files]
    for depth in range(1, max(map(len, folders)) + 1):
        names = ["/".join(parts[-depth:]) for parts in folders]
        if len(set(names)) == len(names):
            return dict(zip(names, files, strict=True))
    raise UserError("a run is named twice; name each once")


def panels(runs: dict[str, Path], only: list[str]) -> list[Panel]:
    """One panel for each figure that some run logged, in the order of the log. UserError for an unknown name."""
    found: dict[str, dict[str, Points]] = {}
    for label, file in runs.items():
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.endswith("}"):
                continue  # the line that a kill cut short
            row = json.loads(line)
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                    found.setdefault(name, {}).setdefault(label, []).append((row["step"], float(value)))
    unknown = [name for name in only if name not in found]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no run logged it; there are {', '.join(found)}")
    names = only or [name for name in found if name not in _NOT_BY_DEFAULT]
    if not names:
        raise UserError(f"{', '.join(map(str, runs.values()))}: nothing was logged yet")
    return [Panel(name, found[name]) for name in names]


def as_html(runs: dict[str, Path], shown: list[Panel]) -> str:
    """A page with one inline SVG a panel."""
    colours = dict(zip(runs, _colours(len(runs)), strict=True))
    legend = "".join(f'<span style="color:{c}">&#9632; {html.escape(run)}</span> ' for run, c in colours.items())
    drawings = []
    for panel in shown:
        parts = [f'<text x="{_LEFT}" y="15" font-weight="bold">{html.escape(panel.name)}</text>']
        parts += [f'<text x="{x}" y="{y + 9}" fill="#666">{text}</text>' for x, y, text in panel.labels()]
        for run, points in panel.curves.items():
            line = " ".join(f"{x},{y}" for x, y in map(panel.pixel, points))
            title = f"<title>{html.escape(run)}: last {points[-1][1]:.5g}</title>"
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[run]}">{title}</polyline>')
        drawings.append(f'<svg width="{_WIDTH}" height="{_HEIGHT}" font-size="11">{"".join(parts)}</svg>')
    style = "body{font:14px sans-serif;margin:16px}svg{font-family:sans-serif;border:1px solid #ddd;margin:4px}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Curves</title><style>{style}</style>'
        f"<p>{legend}</p>{''.join(drawings)}</html>\n"
    )


def as_picture(runs: dict[str, Path], shown: list[Panel]) -> Image.Image:
    """The same in one RGB picture."""
    colours = dict(zip(runs, _colours(len(runs)), strict=True))
    head = 18 * len(runs) + 8
    picture = Image.new("RGB", (_COLUMNS * _WIDTH, head + -(-len(shown) // _COLUMNS) * _HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    for number, (run, colour) in enumerate(colours.items()):
        draw.text((8, 4 + 18 * number), run, fill=colour)
    for number, panel in enumerate(shown):
        left, top = number % _COLUMNS * _WIDTH, head + number // _COLUMNS * _HEIGHT
        draw.text((left + _LEFT, top + 6), panel.name, fill="black")
        for x, y, text in panel.labels():
            draw.text((left + x, top + y), text, fill="#666666")
        for run, points in panel.curves.items():
            line = [(left + x, top + y) for x, y in map(panel.pixel, points)]
            draw.line(line if len(line) > 1 else line * 2, fill=colours[run], width=2)
    return picture


def _colours(number: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(number)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Lay the curves of several runs over each other.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="results folder or metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.html"), help="an .html or a .png (curves.html)")
    parser.add_argument("--only", default="", metavar="A,B", help="figures to show (all but times and learning rates)")
    args = parser.parse_args()
    runs = read_runs(args.runs)
    shown = panels(runs, [name for name in args.only.split(",") if name])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix == ".png":
        as_picture(runs, shown).save(args.out)
    elif args.out.suffix == ".html":
        args.out.write_text(as_html(runs, shown), encoding="utf-8")
    else:
        raise UserError(f"--out {args.out}: must end in .html or .png")
    print(f"{len(shown)} figures of {len(runs)} runs: {args.out}")


if __name__ == "__main__":
    run_cli(main)
