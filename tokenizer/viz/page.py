"""A page on which clips play: what the main job's report and the page of sampled clips are made of.

One file without scripts that opens from disk: style, charts and films are inside, and its content policy lets nothing
else in. A film is one picture of all frames that the style sheet moves; all films and their token bars share its clock.

Tables in Markdown, and the places of a README that programs fill.

How the report looks: one style sheet, light and dark, narrow and wide, no script and nothing from outside.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from PIL import Image

from tokenizer.common.errors import UserError


def between_markers(text: str, name: str, content: str) -> str:
    """`text` with `content` between its markers for `name`."""
    start, end = f"<!-- figures:{name} -->", f"<!-- /figures:{name} -->"
    if start not in text or end not in text:
        raise UserError(f"README.md: the markers {start} and {end} are missing")
    return re.sub(f"{start}.*?{end}", lambda _: f"{start}\n{content}\n{end}", text, flags=re.DOTALL)


def has_markers(text: str, name: str) -> bool:
    """Whether `between_markers` would find its place."""
    return f"<!-- figures:{name} -->" in text and f"<!-- /figures:{name} -->" in text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a | inside of a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f6f3; --card: #ffffff; --ink: #1d1b19; --soft: #6f6a64; --line: #e4e1db;
  --accent: #b8630a; --wash: #f1efea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131211; --card: #1c1a19; --ink: #ece9e5; --soft: #a39d95; --line: #322f2c;
    --accent: #f0a13a; --wash: #272422;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; font-variant-numeric: tabular-nums;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1260px; margin: 0 auto; padding: 44px 16px 72px; }
h1 { font-size: clamp(26px, 4.4vw, 38px); line-height: 1.15; letter-spacing: -0.02em; font-weight: 650;
  margin: 0 0 10px; }
h2 { font-size: 19px; letter-spacing: -0.01em; font-weight: 620; margin: 52px 0 14px; }
h2 small { font-size: 14px; font-weight: 400; color: var(--soft); letter-spacing: 0; margin-left: 8px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 10px; }
p { margin: 0; }
a { color: inherit; }
.lede { max-width: 70ch; font-size: 17px; color: var(--soft); }
.made { margin-top: 8px; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.note { max-width: 90ch; margin-top: 18px; padding: 9px 14px; border-left: 3px solid var(--accent);
  background: var(--wash); }
.soft { color: var(--soft); font-size: 13px; }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 1px; margin: 28px 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.figures div { background: var(--card); padding: 13px 16px 12px; }
.figures dt { color: var(--soft); font-size: 13px; }
.figures dd { margin: 0; font-size: 23px; font-weight: 620; letter-spacing: -0.01em; }
.figures dd small { display: block; min-height: 20px; font-size: 13px; font-weight: 400; color: var(--soft);
  letter-spacing: 0; }

.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
.panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; min-width: 0;
  display: flex; flex-direction: column; }
.panel .soft { margin-top: auto; padding-top: 8px; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
.chart text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .even { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 4; }
.chart .dot { fill: var(--accent); fill-opacity: .6; stroke: var(--card); stroke-width: 1; }
.chart a:hover .dot, .chart a:focus .dot { fill-opacity: 1; stroke: var(--ink); }
.chart .area { fill: var(--accent); fill-opacity: .22; stroke: var(--accent); stroke-width: 1.5; }

.rows { display: grid; grid-template-columns: auto auto 1fr auto; gap: 5px 12px; align-items: center; font-size: 13px; }
.rows .glyph { display: flex; align-items: flex-end; gap: 2px; height: 18px; }
.rows .glyph i { width: 7px; background: var(--accent); }
.rows .count { height: 10px; background: var(--wash); border-radius: 2px; }
.rows .count i { display: block; height: 100%; background: var(--accent); opacity: .75; border-radius: 2px; }
table.levels { width: 100%; border-collapse: separate; border-spacing: 3px; font-size: 13px; text-align: center; }
.levels th { font-weight: 400; color: var(--soft); padding: 2px 6px; }
.levels tbody td { height: 41px; border-radius: 4px; background: var(--wash); }
.levels td[style] { background: color-mix(in srgb, var(--accent) var(--share), var(--card)); }
.levels tfoot td { font-weight: 600; padding-top: 4px; }

.clips { display: grid; grid-template-columns: repeat(auto-fill, 294px); gap: 16px; justify-content: center; }
.clip { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px;
  scroll-margin: 16px; }
.clip:target { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
.pair { display: flex; justify-content: space-between; }
.pair figure { margin: 0; }
.pair figcaption { font-size: 12px; color: var(--soft); margin-bottom: 3px; }
.film { background-image: var(--film); background-repeat: no-repeat; image-rendering: pixelated; border-radius: 3px; }
.ours { background-position-y: 100%; }
.blocks { position: relative; display: flex; gap: 3px; height: 46px; margin: 9px 0 11px; }
.blocks div { position: relative; flex: 1; background: var(--wash); border-radius: 3px; overflow: hidden; }
.blocks div i { position: absolute; inset: auto 0 0 0; background: var(--accent); opacity: .55; }
.blocks div b { position: absolute; left: 6px; top: 3px; font-size: 12px; font-weight: 600; }
.blocks .head { position: absolute; top: -2px; bottom: -2px; width: 2px; margin-left: -1px; background: var(--ink); }
.clip h3 { margin: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.clip h3 span { color: var(--soft); font-weight: 400; }
.numbers { display: grid; grid-template-columns: repeat(4, auto); justify-content: space-between; margin: 7px 0 0; }
.numbers dt { font-size: 12px; color: var(--soft); line-height: 1.3; }
.numbers dd { margin: 0; font-weight: 600; font-size: 14px; }
.clip .why { font-size: 13px; color: var(--soft); margin-top: 8px; line-height: 1.42; overflow-wrap: anywhere; }
@keyframes play { from { background-position-x: 0%; } to { background-position-x: 100%; } }
.bar { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; }
.pause { font-size: 13px; color: var(--soft); cursor: pointer; }
.pause input { margin: 0 5px 0 0; vertical-align: -1px; }
body:has(#pause:checked) :is(.film, .head) { animation-play-state: paused; }

dl.protocol { display: grid; grid-template-columns: minmax(110px, 190px) minmax(0, 1fr); gap: 5px 16px; margin: 0;
  font-size: 14px; }
.protocol dt { color: var(--soft); }
.protocol dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px ui-monospace, "SF Mono", Consolas, monospace; }
ul.skipped { margin: 0; padding-left: 18px; font-size: 14px; overflow-wrap: anywhere; }
"""


PLAYED_FPS = 8  # slow enough to compare; the mp4 files keep the true rate
PAUSE = '<label class="pause"><input type="checkbox" id="pause">hold still</label>'
_SHOWN_SIDE = 128  # CSS pixels of a film; smaller clips are enlarged by a whole number
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def html_page(title: str, style: str, sections: Iterable[str]) -> str:
    """The whole document. `style`: rules beside the common ones, such as those of `film_style`."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def film_style(films: Mapping[str, bytes], num_frames: int, rows: int = 2) -> str:
    """The style rules that hold the films, and the clock they share.

    films: class of a clip -> its picture (JPEG), `num_frames` square frames wide and `rows` clips high: original above
    reconstruction, or the one clip that there is.
    """
    with Image.open(io.BytesIO(next(iter(films.values())))) as picture:
        side = picture.height // rows
    shown = side * max(1, _SHOWN_SIDE // side)
    clock = f"{num_frames / PLAYED_FPS}s steps({num_frames}, jump-none) infinite"
    half_frame = 50 / num_frames
    return "".join(
        f".{key}{{--film:url(data:image/jpeg;base64,{base64.b64encode(data).decode()})}}\n"
        for key, data in films.items()
    ) + (
        f".film{{width:{shown}px;height:{shown}px;background-size:{100 * num_frames}% {100 * rows}%}}\n"
        f".film{{animation:play {clock}}}\n"
        f".blocks .head{{animation:run {clock}}}\n"
        f"@keyframes run{{from{{left:{half_frame:.3f}%}}to{{left:{100 - half_frame:.3f}%}}}}\n"
        "@media (prefers-reduced-motion: reduce){.film,.blocks .head{animation:none}}\n"
    )


def films_in(kinds: Mapping[str, str]) -> str:
    """The films of a clip side by side; kind ("real": the upper row, "ours": the lowest) -> caption."""
    return "".join(
        f'<figure><figcaption>{label}</figcaption><div class="film {kind}" role="img" aria-label="{label}"></div>'
        "</figure>"
        for kind, label in kinds.items()
    )


def token_bars(lengths: Sequence[int], longest: int) -> str:
    """The tokens of each temporal block as bars, with the line that runs along as the film plays."""
    bars = "".join(
        f'<div><i style="height:{100 * length / longest:.1f}%"></i><b>{length}</b></div>' for length in lengths
    )
    return f'<div class="blocks">{bars}<span class="head"></span></div>'


def figure_row(figures: Mapping[str, tuple[str, str]]) -> str:
    """The large figures at the head of a page: label -> value and what stands below it."""
    cells = "".join(
        f"<div><dt>{label}</dt><dd>{value} <small>{escape(unit)}</small></dd></div>"
        for label, (value, unit) in figures.items()
    )
    return f'<dl class="figures">{cells}</dl>'


def fact_list(facts: Mapping[str, str]) -> str:
    """What decided the figures, a line each."""
    items = "".join(f"<dt>{heading}</dt><dd>{escape(text)}</dd>" for heading, text in facts.items())
    return f'<dl class="protocol">{items}</dl>'
