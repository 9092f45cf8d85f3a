"""report.html of the main job: who got how many tokens, and why. Made from a results folder alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokenizer.common.checkpoint import atomic_write
from tokenizer.router import report_words as words
from tokenizer.router.film_page import (
    PAUSE,
    PLAYED_FPS,
    fact_list,
    figure_row,
    film_style,
    films_in,
    html_page,
    token_bars,
)
from tokenizer.router.report_charts import (
    MOST_DOTS,
    assignment_histogram,
    codebook_curve,
    evenly,
    levels_by_block,
    motion_against_tokens,
)
from tokenizer.router.report_words import Record, signed

MOST_FILMS = 60  # 60 films of 128x128 clips are about 8 MB
NUM_EXTREMES = 4


def write_report(folder: str | Path) -> Path:
    """Write report.html beside metrics.json, skipped.json and clips/, and return its path."""
    folder = Path(folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    skipped = json.loads((folder / "skipped.json").read_text(encoding="utf-8"))
    path = folder / "report.html"
    atomic_write(path, Report(folder, metrics, skipped).html().encode())
    return path


class Report:
    """The sections of the page, top to bottom."""

    def __init__(self, folder: Path, metrics: Mapping[str, Any], skipped: Sequence[Mapping[str, str]]) -> None:
        self.folder, self.metrics, self.skipped = folder, metrics, skipped
        self.records: list[Record] = metrics["clips"]
        self.tokenizer = metrics["tokenizer"]
        self.by_cost = sorted(self.records, key=lambda r: (r["tokens"], r["motion"]))
        self.shown = self.by_cost
        if len(self.records) > MOST_FILMS:
            low, middle, high = (self.by_cost[i] for i in _thirds(NUM_EXTREMES))
            self.shown = [*low, *evenly(middle, MOST_FILMS - 2 * NUM_EXTREMES), *high]
        self.anchors = {r["name"]: f"c{i}" for i, r in enumerate(self.shown)}
        self.motions = [r["motion"] for r in self.records]

    def html(self) -> str:
        """The whole page."""
        sections = [self.header(), self.overview(), self.extremes(), self.all_clips(), self.left_out(), self.protocol()]
        return html_page(words.title(self.metrics), self.films(), sections)

    def header(self) -> str:
        """Title, budget in words, warnings, mean figures."""
        m, mean, tok = self.metrics, self.metrics["mean"], self.tokenizer
        correlation, book = m["motion_tokens_rank_correlation"], m["codebook"]
        figures = {
            "tokens a clip": (f"{mean['tokens']:.1f}", f"of {self.even_totals()[0]} to {self.even_totals()[-1]}"),
            "PSNR": (f"{mean['psnr']:.2f}", "dB"),
            "SSIM": (f"{mean['ssim']:.3f}", ""),
            "LPIPS": ("–", "no weights") if mean["lpips"] is None else (f"{mean['lpips']:.4f}", m["lpips_backbone"]),
            "motion ~ tokens": ("–" if correlation is None else signed(correlation), "rank correlation"),
            "codebook in use": (f"{100 * book['share_used']:.0f} %", f"of {book['size']}"),
        }
        stopped = None if m["complete"] else "The run was stopped: these are the clips that it had done."
        notes = "".join(f'<p class="note">{note}</p>' for note in (stopped, words.size_warning(tok)) if note)
        heading, lede, made = (escape(say(m)) for say in (words.title, words.budget_sentence, words.made_with))
        return (
            f'<header><h1>{heading}</h1><p class="lede">{lede}</p><p class="made">{made}</p>{notes}'
            f"{figure_row(figures)}</header>"
        )

    def even_totals(self) -> list[int]:
        """Tokens of a clip when all its blocks get the same level, for each level."""
        return [level * self.tokenizer["num_blocks"] for level in self.tokenizer["levels"]]

    def overview(self) -> str:
        """The four charts."""
        tok, book, num = self.tokenizer, self.metrics["codebook"], len(self.records)
        correlation = self.metrics["motion_tokens_rank_correlation"]
        below = "No rank correlation: all clips have the same number of tokens, or the same motion."
        if correlation is not None:
            below = f"Rank correlation {signed(correlation)} over {num} clips. A dot leads to its clip."
        if num > MOST_DOTS:
            below += f" {MOST_DOTS} of them are drawn."
        drawn = (
            f"{100 * book['share_used']:.0f} % of the {book['size']} codes occur among {book['num_drawn']} tokens; "
            f"perplexity {book['perplexity']:.0f}."
        )
        blocks = " ".join(str(t + 1) for t in range(tok["num_blocks"]))
        panels = [
            ("Tokens against motion", motion_against_tokens(self.records, self.even_totals(), self.anchors), below),
            (f"Assignments, tokens of block {blocks}", *assignment_histogram(self.records, tok["levels"][-1])),
            ("Which block gets how much", levels_by_block(self.records, tok["levels"]), "share of the clips"),
            ("Codebook", codebook_curve(book), drawn),
        ]
        cells = "".join(
            f'<section class="panel"><h3>{heading}</h3>{chart}<p class="soft">{line}</p></section>'
            for heading, chart, line in panels
        )
        return f'<h2>Where the tokens went</h2><div class="panels">{cells}</div>'

    def extremes(self) -> str:
        """The cheapest and the dearest clips, where there are enough clips for that to say anything."""
        if len(self.records) < 3 * NUM_EXTREMES or self.by_cost[0]["tokens"] == self.by_cost[-1]["tokens"]:
            return ""
        groups = {"The cheapest": self.by_cost[:NUM_EXTREMES], "The dearest": self.by_cost[: -NUM_EXTREMES - 1 : -1]}
        return "".join(
            f'<h2>{heading}</h2><div class="clips">{"".join(self.card(r, anchored=False) for r in group)}</div>'
            for heading, group in groups.items()
        )

    def all_clips(self) -> str:
        """Every clip that is shown, cheapest first."""
        num, total = len(self.shown), len(self.records)
        which = (
            "cheapest first" if num == total else f"{num} of {total}, evenly spread from the cheapest to the dearest"
        )
        heading = f"<h2>All clips<small>{which}, played at {PLAYED_FPS} frames a second</small></h2>"
        cards = "".join(self.card(record) for record in self.shown)
        return f'<div class="bar">{heading}{PAUSE}</div><div class="clips">{cards}</div>'

    def card(self, r: Record, anchored: bool = True) -> str:
        """One clip: original and reconstruction, the tokens of its blocks in step with them, figures, and why."""
        key, longest = self.anchors[r["name"]], self.tokenizer["levels"][-1]
        films = films_in({"real": "original", "ours": "reconstruction"})
        lpips = "–" if r["lpips"] is None else f"{r['lpips']:.3f}"
        figures = {"tokens": r["tokens"], "PSNR": f"{r['psnr']:.1f}", "LPIPS": lpips, "motion": f"{r['motion']:.1f}"}
        numbers = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in figures.items())
        file, start = escape(r["file"]), f" <span>from frame {r['start']}</span>" if r["start"] else ""
        reason = escape(words.why(r, self.metrics["budget"], self.motions))
        return (
            f'<article class="clip {key}"{f" id={key}" if anchored else ""}><div class="pair">{films}</div>'
            f'{token_bars(r["assignment"], longest)}<h3 title="{file}">{file}{start}</h3>'
            f'<dl class="numbers">{numbers}</dl><p class="why">{reason}</p></article>'
        )

    def left_out(self) -> str:
        """The files that could not be read."""
        if not self.skipped:
            return ""
        items = "".join(f"<li>{escape(each['file'])}: {escape(each['reason'])}</li>" for each in self.skipped)
        return f'<h2>Skipped<small>{len(self.skipped)} videos</small></h2><ul class="skipped">{items}</ul>'

    def protocol(self) -> str:
        """Everything that decides the figures."""
        return f"<h2>How it was made</h2>{fact_list(words.protocol(self.metrics))}"

    def films(self) -> str:
        """The pictures of the shown clips, as style rules."""
        films = {key: (self.folder / "clips" / name / "frames.jpg").read_bytes() for name, key in self.anchors.items()}
        return film_style(films, self.tokenizer["num_frames"])


def _thirds(num: int) -> tuple[slice, slice, slice]:
    """The first `num` items, those between, the last `num`."""
    return slice(num), slice(num, -num), slice(-num, None)
