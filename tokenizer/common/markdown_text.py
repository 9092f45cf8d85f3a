"""Tables in Markdown, and the places of a README that programs fill."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
