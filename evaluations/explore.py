"""An explorer in the browser: move a slider, watch what the tokens of one clip buy.

    python -m evaluations.explore                                    # the miniature, http://127.0.0.1:7860
    python -m evaluations.explore --vq-ckpt T --router-ckpt R --gpt-ckpt G --port 8000

Original, reconstruction, error map and tokens play in step under any budget, or under lengths set block by block; the
chart places them among all assignments of this clip. A second tab samples a class. The page is served to this machine
only, and its content policy keeps the browser from asking any other.

Letters: B clips, C T H W, N temporal blocks, A assignments (rows), L tokens.
"""

from __future__ import annotations

import argparse
import os

from tokenizer.common.cli import BUDGET_FORMS, Parser, answer_help, at_least

MINI = "ckpts/mini"


def parse_arguments() -> argparse.Namespace:
    """The command line; weights are spelt as in the other evaluations."""
    parser = Parser("Explore one clip in the browser: budget, lengths of single blocks, quality over tokens, samples.")
    add = parser.add_argument
    add("--vq-ckpt", metavar="T", default=f"{MINI}/final.safetensors", help="weights of the tokenizer (miniature)")
    add("--router-ckpt", metavar="R", default=f"{MINI}/router.safetensors", help="weights of its router (miniature)")
    add("--gpt-ckpt", metavar="G", default=f"{MINI}/gpt_c2v.safetensors", help="class-to-video GPT (miniature)")
    add("--perceptual", metavar="NAME", default="stlpips_alex", help="quality of the chart (default: stlpips_alex)")
    add("--port", type=at_least(1), default=7860, metavar="N", help="of 127.0.0.1 (default: 7860)")
    threads = "of the models; more are slower on a machine that is busy (default: 1)"
    add("--num-threads", type=at_least(1), default=1, metavar="N", help=threads)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import base64
import functools
import io
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

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
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.image_quality import psnr_of_mse
from tokenizer.data.bundled_clips import bundled_videos
from tokenizer.data.video_io import read_clip_at, to_model_range, to_uint8
from tokenizer.losses.perceptual import load_perceptual
from tokenizer.presets import load_tokenizer
from tokenizer.router.curate import Scorer
from tokenizer.router.predict import check_router_fits, load_router
from tokenizer.tokens import VideoTokens
from tokenizer.viz.frames import error_map
from tokenizer.viz.page import PLAYED_FPS
from tokenizer.viz.plots import Series, line_chart, to_svg

FRAMES_PER_BLOCK = 1  # that the chart's distance looks at: a quarter of the time of all four
_MOST_CLIPS = 8  # kept open with their charts
_SQUARES = 8  # rows of the picture of a block's tokens
_SHOWN_SIDE = 256  # CSS pixels of a film


# --- what is computed: no page, no server ----------------------------------------------------------------------------


@dataclass(eq=False)
class OpenClip:
    """A clip that is being explored, and what is known of it."""

    frames_THWC: np.ndarray  # uint8
    video_BCTHW: Tensor  # [1, 3, T, H, W] in [0, 1], on the device
    real: list[Tensor]  # perceptual features of the frames that the distance looks at
    distance_A: Tensor | None = None  # of every assignment, once it was asked for


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
            price = find_price(score_BA, self.space, budget.average_tokens)
        return self.space.lengths_of(choose_rows(budget, score_BA, self.space, price))[0].tolist()

    @torch.inference_mode()
    def reconstruct(self, clip: OpenClip, lengths: Sequence[int]) -> View:
        """Encode and decode under `lengths`. UserError for a length that is none of the levels."""
        tokens = self.tokenizer.encode(clip.video_BCTHW, torch.tensor([lengths]))
        ours_BCTHW = self.tokenizer.decode(tokens)
        psnr = psnr_of_mse((ours_BCTHW - clip.video_BCTHW).square().mean()).item()
        distance_F = self.perceptual.distance(self.perceptual.features(self._seen(ours_BCTHW)), clip.real)
        return View(to_uint8(ours_BCTHW[0]), tokens, psnr, distance_F.mean().item())

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
        uniform = [self._point(clip, [level] * self.space.num_blocks) for level in self.space.levels]
        series.append(Series("uniform", [point for point, _ in uniform], [hint for _, hint in uniform], look=0))
        point, hint = self._point(clip, self.choose(clip, "router"))
        series.append(Series("router", [point], [hint], look=2))
        now = (sum(chosen.lengths), chosen.distance), f"{self._named(chosen.lengths)}: {chosen.distance:.3f}"
        return [*series, Series("shown", [now[0]], [now[1]], look=1)]

    @torch.inference_mode()
    def sample(self, class_name: str, guidance: float, seed: int) -> tuple[np.ndarray, VideoTokens]:
        """A new clip of a class, uint8 [T, H, W, 3], and its tokens; equal arguments give equal clips."""
        layout, label = self.gpt.model.layout, self.class_names.index(class_name)
        sampler = Sampler(self.gpt.model, SamplingConfig(slots=1, seed=seed, guidance=(guidance,)))
        samples = list(sampler.run([Request(("class", label, 0), label, rule=length_rule(layout))]))
        tokens = tokens_of(samples, layout, self.tokenizer)
        return to_uint8(self.tokenizer.decode(tokens)[0]), tokens

    def _point(self, clip: OpenClip, lengths: list[int]) -> tuple[tuple[float, float], str]:
        if clip.distance_A is not None:
            distance = clip.distance_A[self.space.rows_of(torch.tensor(lengths))].item()
        else:
            distance = self.reconstruct(clip, lengths).distance
        return (sum(lengths), distance), f"{self._named(lengths)}: {distance:.3f}"

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
        film = _data_url(rearrange(frames_THWC, "T H W C -> H (T W) C"))
        style = f"background-image:url({film});background-size:{100 * num_frames}% 100%;animation:ex-play {clock}"
        cells.append(f'<figure><figcaption>{caption}</figcaption><div class="ex-film" style="{style}"></div></figure>')
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
    """A square for each token that a block may have, column by column, coloured by its code; unused ones are pale."""
    columns = -(-longest // _SQUARES)
    rgb = np.full((columns * _SQUARES, 3), 0.9)
    rgb[: len(code_L)] = colormaps["turbo"]((code_L.numpy() * 0.618034) % 1)[:, :3]  # neighbours differ in colour
    picture = rearrange(rgb, "(x y) c -> y x c", y=_SQUARES).repeat(cell, 0).repeat(cell, 1)
    picture[::cell], picture[:, ::cell] = 1, 1  # white lines between the squares
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


# --- the page --------------------------------------------------------------------------------------------------------

CSS = f"""
.ex-row {{ display: flex; flex-wrap: wrap; gap: 12px; }} .ex-row figure {{ margin: 0; }}
.ex-row figcaption {{ font-size: 12px; height: 20px; opacity: .8; }}
.ex-film {{ width: {_SHOWN_SIDE}px; height: {_SHOWN_SIDE}px; image-rendering: pixelated; }}
.ex-blocks {{ display: grid; grid-template-columns: 1fr 1fr; gap: 10px; }} .ex-block img {{ width: 148px; margin: 0; }}
@keyframes ex-play {{ from {{ background-position-x: 0%; }} to {{ background-position-x: 100%; }} }}
.chart {{ max-width: 640px; }}
"""
# Fonts, scripts and pictures come from this server or from the page itself; the browser refuses all others.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def import_gradio() -> ModuleType:
    """gradio with its analytics off. UserError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read on import
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise UserError("the explorer needs gradio: run `pip install -e .[demo]`") from error
    return gradio


def build_page(explorer: Explorer, gr: ModuleType) -> Any:
    """All of the page: components, and which event computes what."""
    space, longest = explorer.space, explorer.space.levels[-1]
    bundled = [(f"{v.path.stem} ({s})", str(v.path)) for s in ("heldout", "train") for v in bundled_videos(s)]

    def safe(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*values: Any) -> Any:
            try:
                return function(*values)
            except UserError as error:
                gr.Warning(str(error), title="Not possible")
                return gr.skip()  # leaves what is shown; gr.Error would cover the sliders

        return run

    def show(path: str, place: float, lengths: list[int]) -> list[Any]:
        clip = explorer.open(path, place / 100)
        view = explorer.reconstruct(clip, lengths)
        named = [
            gr.update(value=space.levels.index(k), label=f"block {t + 1}: {k} tokens") for t, k in enumerate(lengths)
        ]
        return [view_html(clip, view, longest), curve_html(explorer, clip, view), *named]

    def by_budget(path: str, place: float, budget: str) -> list[Any]:
        return show(path, place, explorer.choose(explorer.open(path, place / 100), budget))

    def by_tokens(path: str, place: float, tokens: float) -> list[Any]:
        return [f"tokens:{int(tokens)}", *by_budget(path, place, f"tokens:{int(tokens)}")]

    def by_blocks(path: str, place: float, *digits: float) -> list[Any]:
        lengths = [space.levels[int(digit)] for digit in digits]
        return ["fixed:" + ",".join(map(str, lengths)), *show(path, place, lengths)]

    def by_table(path: str, place: float, *digits: float) -> str:
        clip = explorer.open(path, place / 100)
        explorer.score_all(clip)
        return curve_html(explorer, clip, explorer.reconstruct(clip, [space.levels[int(digit)] for digit in digits]))

    def by_trade_off(path: str, place: float, weight: float) -> list[Any]:
        explorer.router.quality_weight = weight
        return ["router", *by_budget(path, place, "router")]

    def draw(class_name: str, guidance: float, seed: float) -> str:
        frames_THWC, tokens = explorer.sample(class_name, guidance, int(seed))
        return films_html({class_name: frames_THWC}, tokens, longest)

    with gr.Blocks(title="EVATok explorer", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Tab("Reconstruct"):
            path = gr.State(bundled[0][1])
            with gr.Row():
                choice = gr.Dropdown(bundled, value=bundled[0][1], label="bundled clip")
                place = gr.Slider(0, 99, 0, step=1, label="place in the video, %", buttons=[])
                drop = gr.File(label="or drop a video", file_types=["video"], height=110)
            with gr.Row():
                tokens = gr.Slider(
                    space.min_tokens,
                    space.max_tokens,
                    space.max_tokens // 2,
                    step=8,
                    label="budget, tokens",
                    buttons=[],
                )
                budget = gr.Textbox("router", label="any budget, then Enter", info=BUDGET_FORMS)
            weight = explorer.router.quality_weight
            trade_off = gr.Slider(
                0,
                2,
                weight or 0,
                step=0.1,
                label="trade-off, w_q of the router",
                buttons=[],
                visible=weight is not None,
            )
            films = gr.HTML()
            with gr.Row():
                with gr.Column(scale=3):
                    chart = gr.HTML()
                    every = gr.Button(f"Score all {space.num_rows} assignments of this clip (10 to 20 s)")
                with gr.Column(scale=2):
                    top = len(space.levels) - 1
                    blocks = [
                        gr.Slider(0, top, 0, step=1, label=f"block {t + 1}", buttons=[])
                        for t in range(space.num_blocks)
                    ]
            shown = [films, chart, *blocks]
            latest: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
            page.load(safe(by_budget), [path, place, budget], shown)
            choice.input(lambda name: (name, 0), choice, [path, place]).then(
                safe(by_budget), [path, place, budget], shown
            )
            drop.upload(lambda file: (file, 0), drop, [path, place]).then(safe(by_budget), [path, place, budget], shown)
            place.release(safe(by_budget), [path, place, budget], shown)
            budget.submit(safe(by_budget), [path, place, budget], shown)
            tokens.input(safe(by_tokens), [path, place, tokens], [budget, *shown], **latest)
            trade_off.input(safe(by_trade_off), [path, place, trade_off], [budget, *shown], **latest)
            for block in blocks:
                block.input(safe(by_blocks), [path, place, *blocks], [budget, *shown], **latest)
            every.click(safe(by_table), [path, place, *blocks], chart)
        with gr.Tab("Sample a class"):
            with gr.Row():
                name = gr.Dropdown(list(explorer.class_names), value=explorer.class_names[0], label="class")
                guidance = gr.Slider(1, 5, 2.25, step=0.25, label="guidance", buttons=[])
                seed = gr.Number(0, label="seed", precision=0, minimum=0)
            sample = gr.Button("Sample")
            sampled = gr.HTML()
            sample.click(safe(draw), [name, guidance, seed], sampled)
    return page


def serve(explorer: Explorer, port: int) -> tuple[Any, str]:
    """Start the server in a thread -> (page, its address). UserError if the port is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just closed is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"--port {port}: cannot be opened ({error.strerror}); give another") from error
    gr = import_gradio()
    from starlette.middleware import Middleware

    page = build_page(explorer, gr)
    # gradio's own themes with a named font would load it from elsewhere
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
        footer_links=[], css=CSS, theme=theme, app_kwargs={"middleware": [Middleware(ContentPolicy)]},
    )  # fmt: skip
    return page, address


class ContentPolicy:
    """ASGI middleware: every answer carries POLICY."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, with_policy)


def main() -> None:
    args = parse_arguments()
    for path in (args.vq_ckpt, args.router_ckpt, args.gpt_ckpt):
        if path.startswith(MINI) and not Path(path).exists():
            raise UserError(
                f"{path} is not there: run this in the repository's folder, or give --vq-ckpt and the others"
            )
    page, address = serve(Explorer(args), args.port)
    print(f"{address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_cli(main)
