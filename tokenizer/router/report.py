"""report.html of the main job: who got how many tokens, and why. Made from a results folder alone.

One file without scripts that opens from disk: style, charts and films are inside, and its content policy lets nothing
else in. A film is one picture of all frames that the style sheet moves; all films and their token bars share its clock.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from tokenizer.common.checkpoint import atomic_write
from tokenizer.router.report_charts import (
    Record,
    assignment_histogram,
    codebook_curve,
    evenly,
    levels_by_block,
    motion_against_tokens,
)
from tokenizer.router.report_style import STYLE

MOST_FILMS = 60  # 60 films of 128x128 clips are about 8 MB
NUM_EXTREMES = 4
PLAYED_FPS = 8  # slow enough to compare; the mp4 files keep the true rate
_SHOWN_SIDE = 128


def write_report(folder: str | Path) -> Path:
    """Write report.html beside metrics.json, skipped.json and clips/, and return its path."""
    folder = Path(folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    skipped = json.loads((folder / "skipped.json").read_text(encoding="utf-8"))
    path = folder / "report.html"
    atomic_write(path, Report(folder, metrics, skipped).html().encode())
    return path


def signed(number: float) -> str:
    """+0.50, or −0.50 with a true minus sign."""
    return f"{number:+.2f}".replace("-", "−")


class Report:
    """The sections of the page, top to bottom."""

    def __init__(self, folder: Path, metrics: Mapping[str, Any], skipped: Sequence[Mapping[str, str]]) -> None:
        self.folder, self.metrics, self.skipped = folder, metrics, skipped
        self.records: list[Record] = metrics["clips"]
        self.tokenizer = metrics["tokenizer"]
        self.by_cost = sorted(self.records, key=lambda r: (r["tokens"], r["motion"]))
        self.shown = evenly(self.by_cost, MOST_FILMS)
        self.anchors = {r["name"]: f"c{i}" for i, r in enumerate(self.shown)}
        self.motions = sorted(r["motion"] for r in self.records)

    def html(self) -> str:
        """The whole page."""
        sections = [self.header(), self.overview(), self.extremes(), self.all_clips(), self.left_out(), self.protocol()]
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title())}</title><style>{self.films()}{STYLE}</style></head>"
            f"<body><main>{''.join(sections)}</main></body></html>\n"
        )

    def title(self) -> str:
        """The result in a line."""
        num, tokens = len(self.records), self.metrics["mean"]["tokens"]
        return f"{num} clip{'s' * (num != 1)}, {tokens:.0f} tokens {'each on average' if num != 1 else ''}".strip()

    def header(self) -> str:
        """Title, budget in words, mean figures."""
        m, mean, tok = self.metrics, self.metrics["mean"], self.tokenizer
        full, least = tok["levels"][-1] * tok["num_blocks"], tok["levels"][0] * tok["num_blocks"]
        correlation, book = m["motion_tokens_rank_correlation"], m["codebook"]
        lpips = ("–", "no weights") if mean["lpips"] is None else (f"{mean['lpips']:.4f}", m["lpips_backbone"])
        figures = [
            ("tokens a clip", f"{mean['tokens']:.1f}", f"of {least} to {full}"),
            ("PSNR", f"{mean['psnr']:.2f}", "dB"),
            ("SSIM", f"{mean['ssim']:.3f}", ""),
            ("LPIPS", *lpips),
            ("motion ~ tokens", "–" if correlation is None else signed(correlation), "rank correlation"),
            ("codebook in use", f"{100 * book['share_used']:.0f} %", f"of {book['size']}"),
        ]
        cells = "".join(f"<div><dt>{k}</dt><dd>{v} <small>{escape(unit)}</small></dd></div>" for k, v, unit in figures)
        stopped = "" if m["complete"] else '<p class="note">The run was stopped: these are the clips done so far.</p>'
        return (
            f'<header><h1>{escape(self.title())}</h1><p class="lede">{self.budget_in_words()}</p>{stopped}'
            f'{self.miniature()}<dl class="figures">{cells}</dl></header>'
        )

    def budget_in_words(self) -> str:
        """What decided the lengths."""
        form, _, value = self.metrics["budget"].partition(":")
        price = f"{self.metrics['price'] or 0:.4g}"
        words = {
            "router": "Each clip got the assignment of tokens to blocks that the router rates highest.",
            "tokens": f"Each clip got the assignment that the router rates highest among those of at most {value} tokens.",
            "average": f"Each clip got the assignment that the router rates highest after a price of {price} for every token, "
            f"at which the whole set keeps to {value} tokens a clip.",
            "price": f"Each clip got the assignment that the router rates highest after a price of {value} for every token.",
            "fixed": f"Every clip got the same tokens in its blocks: {value.replace(',', ', ')}.",
            "uniform": f"Every clip got {value} tokens in each of its {self.tokenizer['num_blocks']} blocks.",
        }
        return escape(words[form.strip()])

    def miniature(self) -> str:
        """A warning where the figures are not the paper's size."""
        tok = self.tokenizer
        if tok["paper_size"]:
            return ""
        clip = f"{tok['num_frames']}×{tok['size']}×{tok['size']}"
        return (
            f'<p class="note"><b>Not the size of the paper.</b> Clips of {clip} and a tokenizer of '
            f"{tok['num_parameters'] / 1e6:.1f}M parameters; the paper has 16×128×128 and 145M. "
            "The figures show that the parts work and are not to be compared with published ones.</p>"
        )

    def overview(self) -> str:
        """The four charts."""
        m, tok = self.metrics, self.tokenizer
        totals = [level * tok["num_blocks"] for level in tok["levels"]]
        correlation, book = m["motion_tokens_rank_correlation"], m["codebook"]
        if correlation is None:
            words = "No rank correlation: all clips have the same number of tokens, or the same motion."
        else:
            words = f"Rank correlation {signed(correlation)} over {len(self.records)} clips. A dot leads to its clip."
        drawn = (
            f"{100 * book['share_used']:.0f} % of the {book['size']} codes occur among {book['num_drawn']} tokens; "
            f"perplexity {book['perplexity']:.0f}."
        )
        panels = [
            ("Tokens against motion", motion_against_tokens(self.records, totals, self.anchors), words),
            ("Assignments, tokens of block " + " ".join(str(t + 1) for t in range(tok["num_blocks"])),
             assignment_histogram(self.records, tok["levels"][-1]), ""),
            ("Which block gets how much", levels_by_block(self.records, tok["levels"]), ""),
            ("Codebook", codebook_curve(book), drawn),
        ]  # fmt: skip
        cells = "".join(
            f'<section class="panel"><h3>{title}</h3>{chart}{f"<p class=soft>{below}</p>" if below else ""}</section>'
            for title, chart, below in panels
        )
        return f'<h2>Where the tokens went</h2><div class="panels">{cells}</div>'

    def extremes(self) -> str:
        """The cheapest and the dearest clips, where there are enough clips for that to say anything."""
        if len(self.records) < 3 * NUM_EXTREMES or self.by_cost[0]["tokens"] == self.by_cost[-1]["tokens"]:
            return ""
        cheapest = [r for r in self.shown[:NUM_EXTREMES]]
        dearest = [r for r in reversed(self.shown[-NUM_EXTREMES:])]
        return "".join(
            f'<h2>{title}</h2><div class="clips">{"".join(self.card(r, anchored=False) for r in group)}</div>'
            for title, group in (("The cheapest", cheapest), ("The dearest", dearest))
        )

    def all_clips(self) -> str:
        """Every clip that is shown, cheapest first."""
        num, total = len(self.shown), len(self.records)
        words = (
            "cheapest first" if num == total else f"{num} of {total}, evenly spread from the cheapest to the dearest"
        )
        pause = '<label class="pause"><input type="checkbox" id="pause">hold still</label>'
        cards = "".join(self.card(record) for record in self.shown)
        title = f"<h2>All clips<small>{words}, played at {PLAYED_FPS} frames a second</small></h2>"
        return f'<div class="bar">{title}{pause}</div><div class="clips">{cards}</div>'

    def card(self, r: Record, anchored: bool = True) -> str:
        """One clip: original and reconstruction, the tokens of its blocks in step with them, figures, and why."""
        key, longest = self.anchors[r["name"]], self.tokenizer["levels"][-1]
        films = "".join(
            f'<figure><figcaption>{label}</figcaption><div class="film {kind}" role="img" aria-label="{label}"></div></figure>'
            for kind, label in (("real", "original"), ("ours", "reconstruction"))
        )
        blocks = "".join(
            f'<div><i style="height:{100 * length / longest:.1f}%"></i><b>{length}</b></div>'
            for length in r["assignment"]
        )
        start = f" <span>from frame {r['start']}</span>" if r["start"] else ""
        lpips = "–" if r["lpips"] is None else f"{r['lpips']:.3f}"
        figures = {"tokens": r["tokens"], "PSNR": f"{r['psnr']:.1f}", "LPIPS": lpips, "motion": f"{r['motion']:.1f}"}
        numbers = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in figures.items())
        return (
            f'<article class="clip {key}"{f" id={key}" if anchored else ""}><div class="pair">{films}</div>'
            f'<div class="blocks">{blocks}<span class="head"></span></div>'
            f'<h3 title="{escape(r["file"])}">{escape(r["file"])}{start}</h3>'
            f'<dl class="numbers">{numbers}</dl><p class="why">{escape(self.why(r))}</p></article>'
        )

    def why(self, r: Record) -> str:
        """In words: what the router compared, and how the clip moves beside the others."""
        sentences = [self.choice(r), self.movement(r)]
        if r["num_padded"]:
            sentences.append(f"The file is short: its last frame is repeated {r['num_padded']} times.")
        return " ".join(sentence for sentence in sentences if sentence)

    def choice(self, r: Record) -> str:
        """The rule of the budget, with the router's own figures where there is a router."""
        form = self.metrics["budget"].partition(":")[0].strip()
        alone = f" The router alone would spend {r['router_tokens']}." if "router_tokens" in r else ""
        if form in ("fixed", "uniform"):
            return f"Set by the budget.{alone}"
        scope = {
            "router": "",
            "tokens": " within the limit",
            "average": " after the price",
            "price": " after the price",
        }[form]
        split = f"{r['best_uniform']} in every block"
        gap = (
            f", {r['score_gap']:.2f} above the best even split ({split})"
            if r["score_gap"]
            else f": an even split, {split}"
        )
        free = "" if r["router_tokens"] == r["tokens"] else alone
        return f"The router rates it highest{scope}{gap}.{free}"

    def movement(self, r: Record) -> str:
        """Its motion among all clips, and whether the block with most tokens is the one that moves most."""
        num, lower = len(self.motions), sum(motion < r["motion"] for motion in self.motions)
        if num == 1:
            among = ""
        elif lower == 0:
            among = f"Moves least of {num} clips."
        else:
            among = f"Moves more than {lower} of the other {num - 1} clips."
        lengths, motions = r["assignment"], r["block_motion"]
        if lengths.count(max(lengths)) > 1 or max(motions) == min(motions):
            return among
        dearest, liveliest = lengths.index(max(lengths)), motions.index(max(motions))
        if dearest == liveliest:
            return f"{among} Block {dearest + 1} moves most and gets most."
        return f"{among} Block {dearest + 1} gets most, block {liveliest + 1} moves most."

    def left_out(self) -> str:
        """The files that could not be read."""
        if not self.skipped:
            return ""
        items = "".join(f"<li>{escape(each['file'])}: {escape(each['reason'])}</li>" for each in self.skipped)
        return f'<h2>Skipped<small>{len(self.skipped)} videos</small></h2><ul class="skipped">{items}</ul>'

    def protocol(self) -> str:
        """Everything that decides the figures."""
        m, tok, router, given = self.metrics, self.tokenizer, self.metrics["router"], self.metrics["input"]
        rate = "each file's own frame rate" if given["fps"] is None else f"{given['fps']:g} frames a second"
        which = "every clip" if given["all_clips"] else "the first clip"
        num_rows = len(tok["levels"]) ** tok["num_blocks"]
        rows = {
            "Videos": f"{given['vid_path']}: {given['num_videos']} files, {m['num_skipped']} skipped",
            "Clips": f"{which} of {tok['num_frames']} consecutive frames at {rate}; short side to {tok['size']} pixels, "
            "centre crop; a file shorter than a clip repeats its last frame",
            "Budget": m["budget"] + (f", price {m['price']:.6g} a token" if m["price"] is not None else ""),
            "Levels": f"{', '.join(map(str, tok['levels']))} tokens in each of {tok['num_blocks']} blocks: {num_rows} assignments",
            "Tokenizer": f"{tok['weights']}, {tok['num_parameters'] / 1e6:.1f}M parameters, sha256 {tok['sha256']}",
            "Router": "none" if router is None else f"{router['weights']}, sha256 {router['sha256']}",
            "PSNR, SSIM": "between the arrays of the models, before any video is written; PSNR from the error of the whole clip",
            "LPIPS": m["lpips_backbone"] or f"none: {m['lpips_reason']}",
            "Motion": "mean absolute difference of neighbouring frames, grey levels 0 to 255",
            "Machine": f"{m['device']}; " + ", ".join(f"{name} {number}" for name, number in m["versions"].items()),
        }
        items = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in rows.items())
        return f'<h2>How it was made</h2><dl class="protocol">{items}</dl>'

    def films(self) -> str:
        """The style rules that hold the films, one for each shown clip, and the clock they share."""
        num_frames = self.tokenizer["num_frames"]
        half = 50 / num_frames
        clock = f"{num_frames / PLAYED_FPS}s steps({num_frames}, jump-none) infinite"
        side = 0
        rules = []
        for name, key in self.anchors.items():
            path = self.folder / "clips" / name / "frames.jpg"
            data = base64.b64encode(path.read_bytes()).decode()
            rules.append(f".{key}{{--film:url(data:image/jpeg;base64,{data})}}")
        with Image.open(path) as film:
            side = film.height // 2
        shown = side * max(1, _SHOWN_SIDE // side)
        rules.append(
            f".film{{width:{shown}px;height:{shown}px;background-size:{num_frames * 100}% 200%;animation:play {clock}}}"
        )
        rules.append(f".blocks .head{{animation:run {clock}}}")
        rules.append(f"@keyframes run{{from{{left:{half:.3f}%}}to{{left:{100 - half:.3f}%}}}}")
        return "\n".join(rules)
