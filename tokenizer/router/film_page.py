"""A page on which clips play: what the main job's report and the page of sampled clips are made of.

One file without scripts that opens from disk: style, charts and films are inside, and its content policy lets nothing
else in. A film is one picture of all frames that the style sheet moves; all films and their token bars share its clock.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from PIL import Image

from tokenizer.router.report_style import STYLE

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
