"""What the explorer computes of one clip, and its pictures as HTML. The page is in explore.py.

Letters: B clips, C T H W, N temporal blocks, A assignments (rows), F frames, L tokens.
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from autoregressive.condition import names_of
from autoregressive.presets import check_tokenizer_fits, load_gpt
from autoregressive.sample_grid import tokens_of
from autoregressive.sampler import Request, Sampler, SamplingConfig
from autoregressive.sequence import length_rule
from tokenizer.budget import choose_rows, find_price, parse_budget
from tokenizer.common.device import pick_device
from tokenizer.common.errors import UserError
from tokenizer.common.image_quality import psnr_of_mse
from tokenizer.data.video_io import read_clip_at, to_model_range, to_uint8
from tokenizer.losses.perceptual import check_frames_fit, load_perceptual
from tokenizer.presets import load_tokenizer
from tokenizer.router.curate import Scorer
from tokenizer.router.predict import check_router_fits, load_router
from tokenizer.tokens import VideoTokens
from tokenizer.viz.frames import error_map
from tokenizer.viz.page import PLAYED_FPS
from tokenizer.viz.plots import Series, line_chart, to_svg

FRAMES_PER_BLOCK = 1  # that the chart's distance looks at: a quarter of the time of all four
_MOST_CLIPS = 8  # kept open with their charts
SHOWN_SIDE = 256  # CSS pixels of a film's longer side
_SQUARES = 8  # rows of the picture of a block's tokens


@dataclass(eq=False)
class OpenClip:
    """A clip that is being explored, and what is known of it."""

    frames_THWC: np.ndarray  # uint8
    video_BCTHW: Tensor  # [1, 3, T, H, W] in [0, 1], on the device
    real: list[Tensor]  # perceptual features of the frames that the distance looks at
    distance_A: Tensor | None = None  # of every assignment, once it was asked for
    distance: dict[tuple[int, ...], float] = field(default_factory=dict)  # by lengths, of those that were seen


@dataclass(frozen=True, eq=False)
class View:
    """A clip under one assignment."""

    frames_THWC: np.ndarray  # uint8, the reconstruction
    tokens: VideoTokens
    psnr: float  # dB
    distance: float  # perceptual

    @property
    def lengths(self) -> list[int]:
        return self.tokens.length_BN[0].tolist()


class Explorer:
    """The models, and what the page asks of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.num_threads)
        device = pick_device(args.device)
        self.tokenizer = load_tokenizer(args.vq_ckpt, device)
        self.router, self.gpt = load_router(args.router_ckpt, device), load_gpt(args.gpt_ckpt, device)
        check_router_fits(self.router, self.tokenizer.config)
        check_tokenizer_fits(self.gpt, self.tokenizer)
        layout = self.gpt.model.layout
        if layout.num_classes == 0:
            raise UserError(f"--gpt-ckpt {args.gpt_ckpt}: has no classes to sample; give a class-to-video GPT")
        self.class_names = names_of(self.gpt.class_names, layout.num_classes)
        self.space = self.tokenizer.space
        check_frames_fit(args.perceptual, self.tokenizer.config.size)
        self.perceptual = load_perceptual(args.perceptual).to(device)
        self._scorer = Scorer(self.tokenizer, self.perceptual, FRAMES_PER_BLOCK)
        self._clips: dict[tuple[str, float], OpenClip] = {}

    @torch.inference_mode()
    def open(self, path: str, position: float = 0.0) -> OpenClip:
        """The clip at `position` in [0, 1) of a video. Raises UserError for a file that cannot be read."""
        key = (path, position)
        if key not in self._clips:
            c = self.tokenizer.config
            frames_THWC = read_clip_at(path, position, c.num_frames, c.size).frames_THWC
            video_BCTHW = to_model_range(frames_THWC)[None].to(self.tokenizer.device)
            real = self.perceptual.features(self._seen(video_BCTHW))
            while len(self._clips) >= _MOST_CLIPS:
                del self._clips[next(iter(self._clips))]
            self._clips[key] = OpenClip(frames_THWC, video_BCTHW, real)
        return self._clips[key]

    def choose(self, clip: OpenClip, budget_text: str) -> list[int]:
        """Lengths of the blocks under a budget in any of its forms; `average:N` is the average of this one clip."""
        budget, price = parse_budget(budget_text, self.space), None
        score_BA = self.router.rate(clip.video_BCTHW, budget) if budget.needs_router else None
        if budget.average_tokens is not None and score_BA is not None:
            price = find_price(score_BA, self.space, budget.average_tokens, self.router.search)
        row_B = choose_rows(budget, score_BA, self.space, price, search=self.router.search)
        return self.space.lengths_of(row_B)[0].tolist()

    @torch.inference_mode()
    def reconstruct(self, clip: OpenClip, lengths: Sequence[int]) -> View:
        """Encode and decode under `lengths`. UserError for a length that is none of the levels."""
        tokens = self.tokenizer.encode(clip.video_BCTHW, torch.tensor([lengths]))
        ours_BCTHW = self.tokenizer.decode(tokens)
        psnr = psnr_of_mse((ours_BCTHW - clip.video_BCTHW).square().mean()).item()
        distance_F = self.perceptual.distance(self.perceptual.features(self._seen(ours_BCTHW)), clip.real)
        distance = clip.distance[tuple(lengths)] = distance_F.mean().item()
        return View(to_uint8(ours_BCTHW[0]), tokens, psnr, distance)

    def score_all(self, clip: OpenClip) -> Tensor:
        """Distance of every assignment, [A], by the prefix tree of curation; kept with the clip."""
        if clip.distance_A is None:
            clip.distance_A = self._scorer.tree(clip.video_BCTHW)[0][0]
        return clip.distance_A

    def curve(self, clip: OpenClip, chosen: View) -> list[Series]:
        """The uniform levels, the router's own pick and `chosen`; all assignments too if they were scored."""
        series = []
        if clip.distance_A is not None:
            points = list(zip(self.space.tokens_A.tolist(), clip.distance_A.tolist(), strict=True))
            hints = [f"{self._named(row)}: {d:.3f}" for row, (_, d) in zip(self.space.table_AN, points, strict=True)]
            series.append(Series(f"all {len(points)}", points, hints, look=7, joined=False))
        series.append(self._series(clip, "uniform", [[k] * self.space.num_blocks for k in self.space.levels], look=0))
        picked = self.choose(clip, "router")
        if picked == chosen.lengths:
            return [*series, self._series(clip, "router, shown", [picked], look=2)]
        marks = [self._series(clip, "router", [picked], look=2), self._series(clip, "shown", [chosen.lengths], look=1)]
        return [*series, *marks]

    @torch.inference_mode()
    def sample(self, class_name: str, guidance: float, seed: int) -> tuple[np.ndarray, VideoTokens]:
        """A new clip of a class, uint8 [T, H, W, 3], and its tokens; equal arguments give equal clips."""
        layout, label = self.gpt.model.layout, self.class_names.index(class_name)
        sampler = Sampler(self.gpt.model, SamplingConfig(slots=1, seed=seed, guidance=(guidance,)))
        samples = list(sampler.run([Request(("class", label, 0), label, rule=length_rule(layout))]))
        tokens = tokens_of(samples, layout, self.tokenizer)
        return to_uint8(self.tokenizer.decode(tokens)[0]), tokens

    def _series(self, clip: OpenClip, name: str, choices: list[list[int]], look: int) -> Series:
        distances = []
        for lengths in choices:
            if tuple(lengths) not in clip.distance:
                self.reconstruct(clip, lengths)
            distances.append(clip.distance[tuple(lengths)])
        hints = [f"{self._named(k)}: {d:.3f}" for k, d in zip(choices, distances, strict=True)]
        return Series(name, list(zip(map(sum, choices), distances, strict=True)), hints, look=look)

    def _named(self, lengths: Sequence[int] | Tensor) -> str:
        return " + ".join(str(int(length)) for length in lengths)

    def _seen(self, video_BCTHW: Tensor) -> Tensor:
        """The frames that the distance looks at, [F, C, H, W]: those that the tree of curation scores."""
        in_block = self.tokenizer.config.patch_frames
        seen = [t * in_block + k for t in range(self.space.num_blocks) for k in self._scorer.seen_frames]
        return rearrange(video_BCTHW[:, :, seen], "B C F H W -> (B F) C H W")


# --- pictures as HTML ------------------------------------------------------------------------------------------------


def films_html(films: dict[str, np.ndarray], tokens: VideoTokens, longest: int) -> str:
    """Films (caption -> uint8 [T, H, W, 3]) and the tokens of each block, on one clock that the style sheet runs."""
    num_frames = len(next(iter(films.values())))
    seconds, lengths = num_frames / PLAYED_FPS, tokens.length_BN[0].tolist()
    clock = f"{seconds}s steps({num_frames}, jump-none) infinite"
    cells = []
    for caption, frames_THWC in films.items():
        film, (height, width) = _data_url(rearrange(frames_THWC, "T H W C -> H (T W) C")), frames_THWC.shape[1:3]
        shape = f"width:{round(SHOWN_SIDE * width / max(height, width))}px;aspect-ratio:{width}/{height}"
        style = (
            f"{shape};background-image:url({film});background-size:{100 * num_frames}% 100%;animation:ex-play {clock}"
        )
        cells.append(
            f'<figure><figcaption>{escape(caption)}</figcaption><div class="ex-film" style="{style}"></div></figure>'
        )
    blocks = []
    for t, code_L in enumerate(tokens.code_L.split(lengths)):
        begin = (t / len(lengths) - 1) * seconds  # negative: every block is on the clock from the start
        style = f"animation:ex-now {seconds}s step-end {begin}s infinite"
        picture = f'<img src="{_data_url(token_picture(code_L, longest))}" alt="codes of block {t + 1}">'
        blocks.append(f'<div class="ex-block" style="{style}"><b>{len(code_L)}</b>{picture}</div>')
    now = f"@keyframes ex-now{{0%{{opacity:1}}{100 / len(lengths):.3f}%{{opacity:.4}}}}"
    total = f"<figcaption>tokens of the {len(lengths)} blocks, {sum(lengths)} together</figcaption>"
    tokens_cell = f'<figure>{total}<div class="ex-blocks">{"".join(blocks)}</div></figure>'
    return f'<style>{now}</style><div class="ex-row">{"".join(cells)}{tokens_cell}</div>'


def token_picture(code_L: Tensor, longest: int, cell: int = 6) -> np.ndarray:
    """A square for each token that a block may have, column by column, coloured by its code; RGBA, uint8.

    Squares of unused tokens are grey and nearly transparent, for light and dark pages, the lines between all are clear.
    """
    columns = -(-longest // _SQUARES)
    rgba = np.full((columns * _SQUARES, 4), (0.5, 0.5, 0.5, 0.2))
    rgba[: len(code_L)] = colormaps["turbo"]((code_L.numpy() * 0.618034) % 1)  # neighbours differ in colour
    picture = rearrange(rgba, "(x y) c -> y x c", y=_SQUARES).repeat(cell, 0).repeat(cell, 1)
    picture[::cell], picture[:, ::cell] = 0, 0
    return (picture * 255).round().astype(np.uint8)


def view_html(clip: OpenClip, view: View, longest: int) -> str:
    """Original, reconstruction, error map and tokens, with the figures in the captions."""
    films = {
        "original": clip.frames_THWC,
        f"reconstruction, {view.psnr:.2f} dB, distance {view.distance:.3f}": view.frames_THWC,
        "error map": error_map(clip.frames_THWC, view.frames_THWC),
    }
    return films_html(films, view.tokens, longest)


def curve_html(explorer: Explorer, clip: OpenClip, view: View) -> str:
    """The chart of `Explorer.curve` as SVG."""
    y_title = f"{explorer.perceptual.name} of this clip, lower is better"
    return to_svg(line_chart(explorer.curve(clip, view), "tokens", y_title, log2_x=True), y_title)


def _data_url(picture_HWC: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(picture_HWC).save(data, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
