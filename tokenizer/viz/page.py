"""Pages from the templates beside this file: one HTML file without scripts that opens from disk.

A page extends base.html (style sheet, content policy) and takes its parts from macros.html. Text is escaped. A film is
one picture of all frames of a clip that the style sheet moves; all films and their token bars share its clock.

Also: tables in Markdown, and the marked parts of a README that programs fill.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from tokenizer.common.errors import UserError

PLAYED_FPS = 8  # slow enough to compare; the mp4 files keep the true rate
_SHOWN_SIDE = 128  # CSS pixels of a film's longer side
_ENLARGED = 3  # times, by a click
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # names of files and classes are data
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """The page that a template beside this file makes of `values`. Charts go through the filter `safe`."""
    return _TEMPLATES.get_template(template).render(values) + "\n"


def film_sheet(films: Mapping[str, bytes], num_frames: int, num_rows: int) -> dict[str, Any]:
    """What the macro film_style needs: the films as base64, their size in CSS pixels, and the clock.

    films: class of a clip -> its JPEG, `num_frames` frames wide and `num_rows` clips high.
    """
    with Image.open(io.BytesIO(next(iter(films.values())))) as picture:
        width, height = picture.width // num_frames, picture.height // num_rows
    shown = round(width * _SHOWN_SIDE / max(width, height))
    return {
        "pictures": {key: base64.b64encode(data).decode() for key, data in films.items()},
        "num_frames": num_frames,
        "num_rows": num_rows,
        "width": shown,
        "shape": f"{width} / {height}",
        "enlarged": _ENLARGED * shown,
        "clock": f"{num_frames / PLAYED_FPS}s steps({num_frames}, jump-none) infinite",
    }


def between_markers(text: str, name: str, content: str) -> str:
    """`text` with `content` between its markers for `name`."""
    start, end = f"<!-- figures:{name} -->", f"<!-- /figures:{name} -->"
    if start not in text or end not in text:
        raise UserError(f"README.md: the markers {start} and {end} are missing")
    return re.sub(f"{start}.*?{end}", lambda _: f"{start}\n{content}\n{end}", text, flags=re.DOTALL)


def has_markers(text: str, name: str) -> bool:
    """Whether `between_markers` finds the markers for `name`."""
    return f"<!-- figures:{name} -->" in text and f"<!-- /figures:{name} -->" in text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a | inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
