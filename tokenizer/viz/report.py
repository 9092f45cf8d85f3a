"""report.html of the main job: who got how many tokens, and why. Made from a results folder alone.

The sentences of the report: what the budget asked for, why a clip got what it got, how the figures were made.

The charts of the report, as HTML and inline SVG that take their colours from the style sheet.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.common.checkpoint import atomic_write
from tokenizer.viz.page import PAUSE, PLAYED_FPS, fact_list, figure_row, film_style, films_in, html_page, token_bars
from tokenizer.viz.plots import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, level_line, svg, x_mark

Record = Mapping[str, Any]


def signed(number: float) -> str:
    """+0.50, or −0.50 with a true minus sign."""
    return f"{number:+.2f}".replace("-", "−")


def title(metrics: Mapping[str, Any]) -> str:
    """The result in a line."""
    num, tokens = len(metrics["clips"]), metrics["mean"]["tokens"]
    return f"1 clip, {tokens:.0f} tokens" if num == 1 else f"{num} clips, {tokens:.0f} tokens each on average"


def budget_sentence(metrics: Mapping[str, Any]) -> str:
    """What decided the lengths of every clip."""
    form, _, value = metrics["budget"].partition(":")
    if form == "fixed":
        return f"Every clip got the same tokens in its blocks: {value.replace(',', ', ')}."
    if form == "uniform":
        return f"Every clip got {value} tokens in each of its {metrics['tokenizer']['num_blocks']} blocks."
    among = {
        "router": "",
        "tokens": f" among those of at most {value} tokens",
        "price": f" after a price of {value} for every token",
        "average": f" after a price for every token at which the whole set keeps to {value} tokens a clip",
    }
    return f"Each clip got the assignment of tokens to blocks that the router rates highest{among[form]}."


def made_with(metrics: Mapping[str, Any]) -> str:
    """Weights, budget and perceptual network in one line; `protocol` has the rest."""
    router = metrics["router"]
    parts = [
        f"tokenizer {metrics['tokenizer']['sha256'][:12]}",
        f"router {router['sha256'][:12]}" if router else "no router",
        f"budget {metrics['budget']}",
        f"LPIPS by {metrics['lpips_backbone'] or 'none'}",
        f"{metrics['num_videos']} videos, {metrics['num_skipped']} skipped",
    ]
    return " · ".join(parts)


def size_warning(tokenizer: Mapping[str, Any]) -> str | None:
    """A sentence where clips and tokenizer are not the paper's."""
    if tokenizer["paper_size"]:
        return None
    clip = f"{tokenizer['num_frames']}×{tokenizer['size']}×{tokenizer['size']}"
    return (
        f"Not the size of the paper: clips of {clip} and a tokenizer of {tokenizer['num_parameters'] / 1e6:.1f}M "
        "parameters, where the paper has 16×128×128 and 145M. The figures show that the parts work; they are not to be "
        "compared with published ones."
    )


def why(record: Record, budget: str, motions: Sequence[float]) -> str:
    """Why this clip got what it got. `motions`: those of all clips of the report."""
    sentences = [choice(record, budget), movement(record, motions)]
    if record["num_padded"]:
        sentences.append(f"The file is short: its last frame is repeated {record['num_padded']} times.")
    return " ".join(sentence for sentence in sentences if sentence)


def choice(record: Record, budget: str) -> str:
    """The rule of the budget with the router's figures: scores are logits, their differences are what counts."""
    form = budget.partition(":")[0]
    alone = f" The router alone would spend {record['router_tokens']}." if "router_tokens" in record else ""
    if form in ("fixed", "uniform"):
        return f"Set by the budget.{alone}"
    scope = {"router": "", "tokens": " within the limit"}.get(form, " after the price")
    split = f"{record['best_uniform']} in every block"
    gap = record["score_gap"]
    against = f", {gap:.2f} above the best even split ({split})" if gap else f": it is an even split, {split}"
    differs = record["router_tokens"] != record["tokens"]
    return f"The router rates it highest{scope}{against}.{alone if differs else ''}"


def movement(record: Record, motions: Sequence[float]) -> str:
    """Its motion among all clips, and whether the block with most tokens is the one that moves most."""
    num, lower = len(motions), sum(motion < record["motion"] for motion in motions)
    among = (
        f"Moves more than {lower} of the other {num - 1} clips." if lower else f"No other of {num} clips moves less."
    )
    if num == 1:
        among = ""
    lengths, motion_N = record["assignment"], record["block_motion"]
    if lengths.count(max(lengths)) > 1 or max(motion_N) == min(motion_N):
        return among
    dearest, liveliest = lengths.index(max(lengths)) + 1, motion_N.index(max(motion_N)) + 1
    if dearest == liveliest:
        return f"{among} Block {dearest} moves most and gets most."
    return f"{among} Block {dearest} gets most, block {liveliest} moves most."


def protocol(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Everything that decides the figures, heading -> text."""
    tok, router, given = metrics["tokenizer"], metrics["router"], metrics["input"]
    rate = "each file's own frame rate" if given["fps"] is None else f"{given['fps']:g} frames a second"
    which = "every clip" if given["all_clips"] else "the first clip"
    which += f" (at most {given['max_clips']} in all)" if given["max_clips"] else ""
    ends = f"; {metrics['frames_left_out']} frames at the ends of files, too few for a clip, are left out"
    price = "" if metrics["price"] is None else f"; price {metrics['price']:.6g} a token"
    levels = ", ".join(map(str, tok["levels"]))
    return {
        "Videos": f"{given['vid_path']}: {metrics['num_videos']} files, {metrics['num_skipped']} skipped",
        "Clips": f"{which} of {tok['num_frames']} consecutive frames at {rate}, read with {given['backend']}; "
        f"short side to {tok['size']} pixels, centre crop; a file shorter than a clip repeats its last frame"
        + (ends if metrics["frames_left_out"] else ""),
        "Budget": metrics["budget"] + price,
        "Levels": f"{levels} tokens for each of {tok['num_blocks']} blocks: "
        f"{len(tok['levels']) ** tok['num_blocks']} assignments",
        "Tokenizer": f"{tok['weights']}, {tok['num_parameters'] / 1e6:.1f}M parameters, sha256 {tok['sha256']}",
        "Router": "none" if router is None else f"{router['weights']}, sha256 {router['sha256']}",
        "PSNR, SSIM": "of the models' own arrays, before any video is written; PSNR from the error of the whole clip",
        "LPIPS": metrics["lpips_backbone"] or f"none: {metrics['lpips_reason']}",
        "Motion": "mean absolute difference of neighbouring frames, grey levels 0 to 255",
        "Machine": f"{metrics['device']}; " + ", ".join(f"{k} {v}" for k, v in metrics["versions"].items()),
    }


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
        return html_page(title(self.metrics), self.films(), sections)

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
        notes = "".join(f'<p class="note">{note}</p>' for note in (stopped, size_warning(tok)) if note)
        heading, lede, made = (escape(say(m)) for say in (title, budget_sentence, made_with))
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
        reason = escape(why(r, self.metrics["budget"], self.motions))
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
        return f"<h2>How it was made</h2>{fact_list(protocol(self.metrics))}"

    def films(self) -> str:
        """The pictures of the shown clips, as style rules."""
        films = {key: (self.folder / "clips" / name / "frames.jpg").read_bytes() for name, key in self.anchors.items()}
        return film_style(films, self.tokenizer["num_frames"])


def _thirds(num: int) -> tuple[slice, slice, slice]:
    """The first `num` items, those between, the last `num`."""
    return slice(num), slice(num, -num), slice(-num, None)
