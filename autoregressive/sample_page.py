"""report.html of a sampling command: the sampled clips at play, the tokens of each block, what they came from."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from autoregressive.sample_pictures import ShownClip
from tokenizer.router.film_page import PAUSE, fact_list, figure_row, film_style, films_in, html_page, token_bars

MOST_FILMS = 60  # 60 films of 128x128 clips are about 8 MB


@dataclass(frozen=True)
class Card:
    """A clip on the page, under a heading, with what is written below it."""

    heading: str
    text: str
    clip: ShownClip


def sample_page(summary: Mapping[str, Any], cards: Sequence[Card], longest: int) -> str:
    """The page. `summary`: what samples.json holds. `cards`: at least one. `longest`: a full bar of tokens."""
    films, sections = {}, [_header(summary, len(cards))]
    for heading, under in itertools.groupby(enumerate(cards), lambda numbered: numbered[1].heading):
        articles = ""
        for i, card in under:
            films[f"c{i}"] = _film(card.clip)
            articles += _article(f"c{i}", card, longest)
        sections.append(f'<h2>{escape(heading)}</h2><div class="clips">{articles}</div>')
    sections.append(f"<h2>How they were made</h2>{fact_list(_facts(summary))}")
    first = cards[0].clip
    return html_page(_title(summary), film_style(films, len(first.frames_THWC), len(first.rows)), sections)


def _title(summary: Mapping[str, Any]) -> str:
    return f"{summary['num_samples']} sampled clips"


def _header(summary: Mapping[str, Any], num_shown: int) -> str:
    figures = {
        "clips": (str(summary["num_samples"]), "sampled"),
        "tokens a clip": (f"{summary['mean_tokens']:.1f}", "on the mean, without length tokens"),
        "broken": (str(summary["num_broken"]), "sequences against the grammar"),
    }
    given = "Framed in blue: the frames that were given. " if summary["settings"].get("given_frames") else ""
    num_good = summary["num_samples"] - summary["num_broken"]
    less = f"{num_shown} of {num_good} are shown. " if num_shown < num_good else ""
    lede = f"{given}{less}The bars are the tokens that the model gave each temporal block."
    return (
        f'<header><h1>{_title(summary)}</h1><p class="lede">{escape(lede)}</p>{figure_row(figures)}</header>'
        f'<div class="bar"><span></span>{PAUSE}</div>'
    )


def _article(key: str, card: Card, longest: int) -> str:
    kinds, clip, text = {"real": "original", "ours": "sampled"}, card.clip, escape(card.text)
    if clip.real_THWC is None:
        del kinds["real"]
    return (
        f'<article class="clip {key}"><div class="pair">{films_in(kinds)}</div>{token_bars(clip.lengths, longest)}'
        f'<h3 title="{text}">{text}</h3><p class="why">{sum(clip.lengths)} tokens</p></article>'
    )


def _film(clip: ShownClip) -> bytes:
    """All frames in one JPEG: the original above the sampled one, where there is one."""
    picture = io.BytesIO()
    film = rearrange(np.stack(clip.rows), "R T H W C -> (R H) (T W) C")
    Image.fromarray(film).save(picture, format="JPEG", quality=90, subsampling=0)
    return picture.getvalue()


def _facts(summary: Mapping[str, Any]) -> dict[str, str]:
    facts = {"model": f"{summary['gpt_model']}, {summary['gpt']}", "tokenizer": summary["tokenizer"]}
    return facts | {key.replace("_", " "): str(value) for key, value in summary["settings"].items()}
