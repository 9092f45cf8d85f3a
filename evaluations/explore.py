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
    parser = Parser("Explore one clip in the browser: budget, lengths of single blocks, quality over tokens, samples.")
    add = parser.add_argument
    add("--vq-ckpt", metavar="T", default=f"{MINI}/final.safetensors", help="weights of the tokenizer (miniature)")
    add("--router-ckpt", metavar="R", default=f"{MINI}/router.safetensors", help="weights of its router (miniature)")
    add("--gpt-ckpt", metavar="G", default=f"{MINI}/gpt_c2v.safetensors", help="class-to-video GPT (miniature)")
    add("--perceptual", metavar="NAME", default="stlpips_alex", help="distance in the chart (default: stlpips_alex)")
    add("--port", type=at_least(1), default=7860, metavar="N", help="port on 127.0.0.1 (default: 7860)")
    threads = "threads of the models; more are slower on a busy machine (default: 1)"
    add("--num-threads", type=at_least(1), default=1, metavar="N", help=threads)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import functools
import math
import socket
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

from evaluations.clip_explorer import Explorer, curve_html, films_html, view_html
from tokenizer.common.errors import UserError, run_cli
from tokenizer.data.files import bundled_videos

MOST_SCORED = 4096  # assignments of a clip that the page offers to score
_STYLE = (files("tokenizer.viz") / "style.css").read_text(encoding="utf-8")
DARK_COLOURS = _STYLE.partition("dark) {\n  :root {")[2].partition("}")[0]  # of charts, here switched by gradio's class
CSS = """
.ex-row { display: flex; flex-wrap: wrap; gap: 12px; } .ex-row figure { margin: 0; }
.ex-row figcaption { font-size: 12px; height: 20px; opacity: .8; }
.ex-film { image-rendering: pixelated; }
.ex-blocks { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; } .ex-block img { width: 148px; margin: 0; }
@keyframes ex-play { from { background-position-x: 0%; } to { background-position-x: 100%; } }
.ex-level .tab-like-container, .ex-level .min_value, .ex-level .max_value { display: none; }
.chart { max-width: 640px; } .dark .chart { DARK }
""".replace("DARK", DARK_COLOURS)
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


class Events:
    """What the page computes when a control moves. A user's mistake is a warning on the page."""

    def __init__(self, explorer: Explorer, gr: ModuleType) -> None:
        self.explorer, self.gr = explorer, gr
        self.levels = explorer.space.levels

    def safe(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with a UserError shown as a warning."""

        @functools.wraps(function)
        def run(*values: Any) -> Any:
            try:
                return function(*values)
            except UserError as error:
                self.gr.Warning(escape(str(error)), title="Not possible")  # gradio takes HTML, and names are data
                return self.gr.skip()  # leaves what is shown; gr.Error would cover the sliders

        return run

    def take(self, file: str) -> tuple[str, int, None]:
        """A video that was dropped, if it can be read; else the clip before it stays."""
        try:
            self.explorer.open(file)
        except UserError as error:
            raise UserError(str(error).replace(file, Path(file).name)) from error  # not gradio's copy of it
        return file, 0, None

    def show(self, path: str, place: float, lengths: list[int]) -> list[Any]:
        """Films, chart and block sliders of a clip under these lengths."""
        clip = self.explorer.open(path, place / 100)
        view = self.explorer.reconstruct(clip, lengths)
        named = [
            self.gr.update(value=self.levels.index(k), label=f"block {t + 1}: {k} tokens")
            for t, k in enumerate(lengths)
        ]
        return [view_html(clip, view, self.levels[-1]), curve_html(self.explorer, clip, view), *named]

    def by_budget(self, path: str, place: float, budget: str) -> list[Any]:
        return self.show(path, place, self.explorer.choose(self.explorer.open(path, place / 100), budget))

    def by_tokens(self, path: str, place: float, tokens: float) -> list[Any]:
        return [f"tokens:{int(tokens)}", *self.by_budget(path, place, f"tokens:{int(tokens)}")]

    def by_blocks(self, path: str, place: float, *digits: float) -> list[Any]:
        lengths = [self.levels[int(digit)] for digit in digits]
        return ["fixed:" + ",".join(map(str, lengths)), *self.show(path, place, lengths)]

    def by_table(self, path: str, place: float, *digits: float) -> str:
        clip = self.explorer.open(path, place / 100)
        self.explorer.score_all(clip)
        view = self.explorer.reconstruct(clip, [self.levels[int(digit)] for digit in digits])
        return curve_html(self.explorer, clip, view)

    def by_trade_off(self, path: str, place: float, weight: float) -> list[Any]:
        self.explorer.router.quality_weight = weight
        return ["router", *self.by_budget(path, place, "router")]

    def draw(self, class_name: str, guidance: float, seed: float | None) -> str:
        if seed is None or not 0 <= seed < 2**32:
            raise UserError("seed: give a whole number from 0 to 4294967295")
        frames_THWC, tokens = self.explorer.sample(class_name, guidance, int(seed))
        return films_html({class_name: frames_THWC}, tokens, self.levels[-1])


def build_page(explorer: Explorer, gr: ModuleType) -> Any:
    """All of the page: components, and which event computes what."""
    events = Events(explorer, gr)
    with gr.Blocks(title="EVATok explorer", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        with gr.Tab("Reconstruct"):
            reconstruct_tab(page, events)
        with gr.Tab("Sample a class"):
            sample_tab(events)
    return page


def reconstruct_tab(page: Any, events: Events) -> None:
    """Choose a clip and a budget, or the lengths of single blocks."""
    gr, space = events.gr, events.explorer.space
    bundled = [(f"{v.path.stem} ({s})", str(v.path)) for s in ("heldout", "train") for v in bundled_videos(s)]
    path = gr.State(bundled[0][1])
    with gr.Row():
        choice = gr.Dropdown(bundled, value=bundled[0][1], label="bundled clip")
        place = gr.Slider(0, 99, 0, step=1, label="place in the video, %", buttons=[])
        drop = gr.File(label="or drop a video", file_types=["video"], height=140)
    with gr.Row():
        half, wide = space.max_tokens // 2, (space.min_tokens, space.max_tokens)
        tokens = gr.Slider(*wide, half, step=math.gcd(*space.levels), label="budget, tokens", buttons=[])
        budget = gr.Textbox("router", label="any budget, then Enter", info=BUDGET_FORMS)
    weight = events.explorer.router.quality_weight
    label, seen = "trade-off, w_q of the router", weight is not None
    trade_off = gr.Slider(0, 2, weight or 0, step=0.1, label=label, buttons=[], visible=seen)
    films = gr.HTML()
    with gr.Row():
        with gr.Column(scale=3):
            chart = gr.HTML()
            label, few = f"Score all {space.num_rows} assignments of this clip", space.num_rows <= MOST_SCORED
            every = gr.Button(label + (" (miniature: 10 to 20 s)" if few else ": too many"), interactive=few)
        with gr.Column(scale=2):
            top, numbers = len(space.levels) - 1, range(1, space.num_blocks + 1)
            blocks = [
                gr.Slider(0, top, 0, step=1, label=f"block {t}", buttons=[], elem_classes="ex-level") for t in numbers
            ]

    shown, by_budget = [films, chart, *blocks], (events.safe(events.by_budget), [path, place, budget])
    latest: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
    page.load(*by_budget, shown)
    choice.input(lambda name: (name, 0), choice, [path, place]).then(*by_budget, shown)
    drop.upload(events.safe(events.take), drop, [path, place, choice]).then(*by_budget, shown)
    place.input(*by_budget, shown, **latest)
    budget.submit(*by_budget, shown)
    tokens.input(events.safe(events.by_tokens), [path, place, tokens], [budget, *shown], **latest)
    trade_off.input(events.safe(events.by_trade_off), [path, place, trade_off], [budget, *shown], **latest)
    for block in blocks:
        block.input(events.safe(events.by_blocks), [path, place, *blocks], [budget, *shown], **latest)
    every.click(events.safe(events.by_table), [path, place, *blocks], chart)


def sample_tab(events: Events) -> None:
    gr, classes = events.gr, events.explorer.class_names
    with gr.Row():
        name = gr.Dropdown(list(classes), value=classes[0], label="class")
        guidance = gr.Slider(1, 5, 2.25, step=0.25, label="guidance", buttons=[])
        seed = gr.Number(0, label="seed", precision=0, minimum=0)
    sample = gr.Button("Sample")
    sampled = gr.HTML()
    sample.click(events.safe(events.draw), [name, guidance, seed], sampled)


def check_port(port: int) -> None:
    """Raises UserError if the port is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just closed is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"--port {port}: cannot be opened ({error.strerror}); give another") from error


def serve(explorer: Explorer, port: int) -> tuple[Any, str]:
    """Start the server in a thread -> (page, its address). UserError if the port is in use."""
    check_port(port)
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
    check_port(args.port)  # before the models are loaded
    page, address = serve(Explorer(args), args.port)
    print(f"{address} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_cli(main)
