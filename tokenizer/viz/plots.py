"""Charts of all reports, drawn by matplotlib: as inline SVG that follows a page's colours, or as PNG.

    python -m tokenizer.viz.plots results/vq/proxy results/vq/other --out curves.html
    python -m tokenizer.viz.plots results/mini/*/metrics.jsonl --only loss,val/psnr_policy --out curves.png

The command overlays the training curves of several runs, one panel per logged value. A RUN is a results folder or a
metrics.jsonl. The HTML needs neither a server nor the internet.

In a program: `line_chart`, `scatter_chart`, `bar_chart` and `area_chart` give a Figure; `to_svg` and `to_png` turn it
into text or bytes. Equal figures give equal bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullLocator

from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.schema import fits, read_json_lines
from tokenizer.viz.page import render

WIDTH, HEIGHT = 480, 280  # of one chart, in SVG units and in points
SERIES_COLOURS = ("#1f5fa8", "#c8501e", "#2f8a4c", "#8a3fa0", "#a88a1f", "#3f9aa0", "#a03f5c", "#5c5c5c")
_MARKERS = "osD^v"
_MOST_MARKERS = 60  # of a line; a longer one is drawn without
_INK, _SOFT, _LINE, _ACCENT, _CARD = "#1d1b19", "#6f6a64", "#e4e1db", "#b8630a", "#fffffe"
# style.css gives these variables a value for light and for dark pages; alone, the chart keeps the colour as written.
_VARIABLES = {_INK: "ink", _SOFT: "soft", _LINE: "line", _ACCENT: "accent", _CARD: "card"}
_VARIABLES |= {colour: f"s{i}" for i, colour in enumerate(SERIES_COLOURS)}
_RC = {
    "svg.hashsalt": "evatok",  # without it the ids of clip paths are random
    "svg.fonttype": "none",  # text stays text
    "font.size": 11,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


@dataclass(frozen=True)
class Series:
    """Points of one name. `hints` (tooltips) and `links` (a URL or "") belong to the points, in the same order.

    `look` picks colour and marker; give a name the same look in all charts of a page.
    """

    name: str
    points: Sequence[tuple[float, float]]
    hints: Sequence[str] = ()
    links: Sequence[str] = ()
    look: int = 0
    joined: bool = True  # by a line; else small dots

    @property
    def colour(self) -> str:
        return SERIES_COLOURS[self.look % len(SERIES_COLOURS)]

    @property
    def marker(self) -> str:
        return _MARKERS[self.look % len(_MARKERS)]


def line_chart(series: Sequence[Series], x_title: str, y_title: str, log2_x: bool = False) -> Figure:
    """One line with markers per series, named in a legend at the right; log2_x: a binary logarithm along x."""
    figure, axes = _figure(x_title, y_title)
    with matplotlib.rc_context(_RC):
        for line in series:
            x, y = zip(*line.points, strict=True)
            if not line.joined:
                _dots(axes, line, size=9, alpha=0.4, label=line.name)
                continue
            marked = len(x) <= _MOST_MARKERS
            axes.plot(x, y, color=line.colour, linewidth=1.6, alpha=0.85, zorder=2, label=None if marked else line.name)
            if marked:
                _dots(axes, line, size=26, label=line.name)
        if log2_x:
            _log2_axis(axes, [x for line in series for x, _ in line.points])
        figure.legend(loc="outside right upper")
    return figure


def scatter_chart(
    series: Series, x_title: str, y_title: str, y_levels: Sequence[float] = (), x_levels: Sequence[float] = ()
) -> Figure:
    """One dot per point in the accent colour. `x_levels`, `y_levels`: that axis is logarithmic, with these marks."""
    figure, axes = _figure(x_title, y_title)
    with matplotlib.rc_context(_RC):
        _dots(axes, series, size=30, colour=_ACCENT, alpha=0.65)
        for levels, scale, axis in ((x_levels, axes.set_xscale, axes.xaxis), (y_levels, axes.set_yscale, axes.yaxis)):
            if levels:
                scale("log", base=2)
                axis.set_major_locator(FixedLocator(list(levels)))
                axis.set_major_formatter(FixedFormatter([f"{level:g}" for level in levels]))
                axis.set_minor_locator(NullLocator())
        for levels, limit in ((x_levels, axes.set_xlim), (y_levels, axes.set_ylim)):
            if levels:
                limit(0.85 * min(levels), 1.12 * max(levels))
    return figure


def reliability_chart(points: Sequence[tuple[float, float]], x_title: str, y_title: str) -> Figure:
    """(predicted, measured) pairs as a line with markers, beside the dashed diagonal on which both are equal."""
    figure, axes = _figure(x_title, y_title)
    with matplotlib.rc_context(_RC):
        low, high = min(min(pair) for pair in points), max(max(pair) for pair in points)
        axes.plot([low, high], [low, high], color=_SOFT, linewidth=1, linestyle=(0, (3, 4)), label="equal")
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=_ACCENT, linewidth=1.6, zorder=2)
        hints = [f"predicted {a:.4g}, measured {b:.4g}" for a, b in points]
        _dots(axes, Series("bins", points, hints), size=26, colour=_ACCENT)
        axes.legend(loc="upper left")
    return figure


def bar_chart(labels: Sequence[str], values: Sequence[float], x_title: str, y_title: str) -> Figure:
    """Horizontal bars from the top down, the value at the end of each."""
    figure, axes = _figure(x_title, y_title)
    with matplotlib.rc_context(_RC):
        bars = axes.barh(range(len(values)), values, color=_ACCENT, alpha=0.75, height=0.66)
        axes.bar_label(bars, [f"{value:g}" for value in values], padding=3, color=_SOFT)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(max(len(labels), 4) - 0.4, -0.6)  # few bars keep their thickness
        axes.grid(False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
    return figure


def area_chart(
    points: Sequence[tuple[float, float]], x_title: str, y_title: str, level: float | None = None, level_name: str = ""
) -> Figure:
    """The area under a curve, on a square-root scale; a dashed line at `level`."""
    figure, axes = _figure(x_title, y_title)
    with matplotlib.rc_context(_RC):
        x, y = zip(*points, strict=True)
        axes.fill_between(x, y, color=_ACCENT, alpha=0.22, linewidth=0)
        axes.plot(x, y, color=_ACCENT, linewidth=1.5)
        axes.set_yscale("function", functions=(lambda v: abs(v) ** 0.5, lambda v: v**2))
        axes.set_xlim(min(x), max(max(x), min(x) + 1))
        top = 1.05 * max(2.0, *y)
        axes.set_ylim(0, top)
        marks = [mark for mark in (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if mark <= top]
        axes.yaxis.set_major_locator(FixedLocator([0, *marks[-3:]]))
        if level is not None:
            axes.axhline(level, color=_SOFT, linewidth=1, linestyle=(0, (3, 4)))
            axes.text(max(x), level, f"{level_name} ", color=_SOFT, ha="right", va="bottom")
    return figure


def to_svg(figure: Figure, name: str, alone: bool = False) -> str:
    """The figure as an <svg> element described by `name`; `alone`: a complete file with its own white background."""
    text = _saved(figure, "svg", metadata={"Date": None, "Creator": None}, transparent=not alone).decode()
    text = text[text.index("<svg") :]
    opening, body = re.match(r"<svg[^>]*>", text), re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
    assert opening is not None
    box = re.search(r'viewBox="[^"]*"', opening[0])
    spaces = ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"' if alone else ""
    head = f'<svg class="chart"{spaces} {box[0] if box else ""} role="img" aria-label="{escape(name)}">'
    text = head + body.sub("", text[opening.end() :])
    # Element names such as axes_1 would occur again in the next chart of the page; ids that are hashes are kept.
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"""<a xlink:href=(["'])point:(.*?)\1[^>]*>(.*?)</a>""", _point, text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    return text.strip()


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG on white, 1.5 pixels a unit."""
    return _saved(figure, "png", dpi=108, facecolor="white", metadata={"Software": None})


def _figure(x_title: str, y_title: str, width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x_title)
        axes.set_title(y_title, loc="left", fontsize=11, color=_SOFT, x=0)
    return figure, axes


def _saved(figure: Figure, form: str, **options: Any) -> bytes:
    data = io.BytesIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(data, format=form, **options)
    return data.getvalue()


def _dots(
    axes: Axes, series: Series, size: float, colour: str | None = None, alpha: float = 1.0, label: str | None = None
) -> None:
    """Markers whose hints and links `to_svg` puts in; a URL is the only text that matplotlib lets a point carry."""
    x, y = zip(*series.points, strict=True)
    colour = colour or series.colour
    dots = axes.scatter(x, y, s=size, color=colour, alpha=alpha, marker=series.marker, zorder=3, label=label)
    dots.set_edgecolor(_CARD)
    dots.set_linewidth(0.8)
    hints = list(series.hints) or [""] * len(x)
    links = list(series.links) or [""] * len(x)
    dots.set_urls([f"point:{json.dumps([hint, link])}" for hint, link in zip(hints, links, strict=True)])


def _point(found: re.Match[str]) -> str:
    """A point of the SVG with its tooltip, inside a link if it has one."""
    hint, link = json.loads(unescape(found[2]))
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return f'<a href="{escape(link)}">{title}{found[3]}</a>' if link else f"<g>{title}{found[3]}</g>"


def _log2_axis(axes: Axes, values: Sequence[float]) -> None:
    """Marks at powers of two, and at one and a half times them if they would be fewer than three."""
    axes.set_xscale("log", base=2)
    low, high = min(values) / 1.1, max(values) * 1.1
    marks = [2.0**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    if len(marks) < 3:
        marks = sorted({*marks, *(m for k in range(-2, 40) if low <= (m := 1.5 * 2.0**k) <= high)})
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(marks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


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


def read_curves(runs: dict[str, Path], only: list[str]) -> dict[str, list[Series]]:
    """Logged value -> its curve in each run that logged it, in the order of the log. UserError for an unknown name."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for label, file in runs.items():
        for row in read_json_lines(file, {"step": float}, "give the metrics.jsonl of a run"):
            for name, value in row.items():
                if name != "step" and fits(value, float):
                    found.setdefault(name, {}).setdefault(label, []).append((float(row["step"]), float(value)))
    unknown = [name for name in only if name not in found]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no run logged it; there are {', '.join(found)}")
    names = only or [name for name in found if name not in _NOT_BY_DEFAULT]
    if not names:
        raise UserError(f"{', '.join(map(str, runs.values()))}: nothing was logged yet")
    look = {label: i for i, label in enumerate(runs)}
    return {n: [Series(label, points, look=look[label]) for label, points in found[n].items()] for n in names}


def curve_panels(
    curves: dict[str, list[Series]], columns: int = 2, x_title: str = "step", marked: bool = False
) -> Figure:
    """All values in one figure, a panel each; marked: a dot at every point."""
    rows = -(-len(curves) // columns)
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(columns * WIDTH / 72, rows * HEIGHT / 72), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for (name, lines), axes in zip(curves.items(), grid, strict=False):
            for line in lines:
                x, y = zip(*line.points, strict=True)
                look = ("o" if marked else "") + ("-" if line.joined else "")
                axes.plot(x, y, look, color=line.colour, linewidth=1.8, label=line.name)
            axes.set_title(name, loc="left", fontsize=11)
            axes.set_xlabel(x_title)
            axes.legend()
        for axes in grid:  # cells left without a value
            axes.set_axis_off()
    return figure


def curve_page(curves: dict[str, list[Series]]) -> str:
    """A page with one chart per logged value; the tooltip of a point holds its figures."""
    charts = {}
    for name, lines in curves.items():
        hinted = [
            Series(s.name, s.points, [f"{s.name}: {y:.5g} at step {x:g}" for x, y in s.points], look=s.look)
            for s in lines
        ]
        charts[name] = to_svg(line_chart(hinted, "step", name), name)
    last = {name: [f"{line.name}: last {line.points[-1][1]:.5g}" for line in lines] for name, lines in curves.items()}
    return render("curves.html", title="Training curves", charts=charts, last=last)


_NOT_BY_DEFAULT = ("seconds", "perf/eta_seconds", "lr", "discriminator/lr")


def main() -> None:
    parser = argparse.ArgumentParser(description="Overlay the training curves of several runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="results folder or metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.html"), help="an .html or a .png (curves.html)")
    parser.add_argument("--only", default="", metavar="A,B", help="values (default: all but times and learning rates)")
    args = parser.parse_args()
    if args.out.suffix not in (".html", ".png"):
        raise UserError(f"--out {args.out}: must end in .html or .png")
    runs = read_runs(args.runs)
    curves = read_curves(runs, [name for name in args.only.split(",") if name])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix == ".png":
        args.out.write_bytes(to_png(curve_panels(curves)))
    else:
        args.out.write_text(curve_page(curves), encoding="utf-8")
    print(f"{len(curves)} figures of {len(runs)} runs: {args.out}")


if __name__ == "__main__":
    run_cli(main)
