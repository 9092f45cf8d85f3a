"""report.html: all tables, curves and protocol cards of some results on one page that opens from disk."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from evaluations.curve_charts import CURVE_STYLE, charts
from evaluations.protocols import card_text
from evaluations.report_tables import Run, Table, own_tables, paper_tables, points_table, savings_table
from tokenizer.common.checkpoint import atomic_write
from tokenizer.router.film_page import html_page

_STYLE = """
.scroll { overflow-x: auto; }
table.results { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
.results th { font-weight: 600; text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); }
.results td { padding: 3px 14px 3px 0; }
.results td:first-child { color: var(--soft); }
.wide { grid-column: 1 / -1; }
.panels + .panels { margin-top: 16px; }
pre { font: 12px/1.5 ui-monospace, "SF Mono", Consolas, monospace; overflow-x: auto; margin: 8px 0 0; }
.picture { max-width: 100%; image-rendering: pixelated; border-radius: 3px; }
"""


def write_report(folder: Path, metrics: Mapping[str, Any]) -> Path:
    """The page of a single result, beside its metrics.json."""
    path = folder / "report.html"
    atomic_write(path, page([Run(folder.absolute(), metrics)]).encode())
    return path


def page(runs: Sequence[Run]) -> str:
    """The whole page."""
    sections = [_header(runs), _curves(runs), _own(runs), _paper(runs), _cards(runs)]
    return html_page("Evaluation", CURVE_STYLE + _STYLE, sections)


def markdown(runs: Sequence[Run]) -> dict[str, str]:
    """The sections of tables.md, by the names of the README's markers: figures:evaluation, and so on."""
    curves = [run for run in runs if run.is_curve]
    tables = {
        "evaluation": own_tables(runs),
        "quality-cost": [table for run in curves for table in (savings_table(run), points_table(run))],
        "paper": paper_tables(runs),
    }
    return {name: "\n\n".join(table.markdown() for table in some) for name, some in tables.items() if some}


def _header(runs: Sequence[Run]) -> str:
    num_small, note = sum(run.miniature for run in runs), ""
    if num_small:
        note = (
            f'<p class="note">{num_small} of {len(runs)} results are of the miniature and marked so. They show that '
            "the parts work, stand in tables of their own and compare with nothing published.</p>"
        )
    lede = "Every figure is read from a metrics.json; the paper's stand in evaluations/paper.json with their protocols."
    return f'<header><h1>Evaluation</h1><p class="lede">{lede}</p>{note}</header>'


def _curves(runs: Sequence[Run]) -> str:
    parts = []
    for run in (run for run in runs if run.is_curve):
        panels = "".join(f'<section class="panel">{chart}</section>' for chart in charts(run.data).values())
        missing = "".join(f'<p class="soft">Not drawn: {escape(line)}.</p>' for line in run.data["missing_codecs"])
        parts.append(
            f'<h2>Quality over cost<small>{escape(run.label)}</small></h2><div class="panels">{panels}</div>{missing}'
            f"{_tables([savings_table(run)])}<details><summary>All points</summary>{points_table(run).html()}</details>"
        )
    return "".join(parts)


def _own(runs: Sequence[Run]) -> str:
    tables = own_tables(runs)
    return f"<h2>Evaluations</h2>{_tables(tables)}{_pictures(runs)}" if tables else ""


def _paper(runs: Sequence[Run]) -> str:
    if all(run.is_curve for run in runs):
        return ""
    small = "a figure of ours appears beside the paper's only under the same protocol, config and networks"
    return f"<h2>Paper and ours<small>{small}</small></h2>{_tables(paper_tables(runs))}"


def _tables(tables: Sequence[Table]) -> str:
    return '<div class="panels">' + "".join(t.html().replace("panel", "panel wide", 1) for t in tables) + "</div>"


def _pictures(runs: Sequence[Run]) -> str:
    """The best, the median and the worst clip of each evaluation: originals above, ours below."""
    parts = []
    for run in (run for run in runs if not run.is_curve):
        for path in sorted((run.folder / "pictures").glob("*.png")):
            data = base64.b64encode(path.read_bytes()).decode()
            place = path.stem.partition("_")[0]
            parts.append(
                f'<section class="panel wide"><h3>{escape(run.label)}: {escape(place)} clip</h3>'
                f'<img class="picture" alt="{escape(place)} clip" src="data:image/png;base64,{data}"></section>'
            )
    return f'<div class="panels">{"".join(parts)}</div>' if parts else ""


def _cards(runs: Sequence[Run]) -> str:
    cards = [(run, card_text(dict(run.data["card"])) if not run.is_curve else _curve_card(run)) for run in runs]
    panels = "".join(
        f'<details class="panel"><summary>{escape(run.label)}</summary><pre>{escape(text)}</pre></details>'
        for run, text in cards
    )
    return f"<h2>Protocol cards</h2>{panels}"


def _curve_card(run: Run) -> str:
    """Everything that made a curve; under a protocol its card first."""
    skip = ("points", "savings", "kind", "card")
    lines = [f"{name.replace('_', ' '):<16}{value}" for name, value in run.data.items() if name not in skip]
    card = run.data.get("card")
    return "\n".join([card_text(card), "", *lines] if card else lines)
