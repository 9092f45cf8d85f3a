"""Draw the figure at the top of README.md with the weights in ckpts/mini.

    python scripts/mini/readme_figure.py                      # writes ckpts/mini/idea.png
    python scripts/mini/readme_figure.py --video FILE --out OUT.png

Shows one clip three times: the original, what the router's assignment keeps of it, and the same clip under half that
budget. Each square is one token; its colour shows its code. Rerun it whenever the weights change.

Letters: T frames, N temporal blocks, L tokens of one block.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenizer.common.errors import run_cli
from tokenizer.data.files import bundled_videos
from tokenizer.data.video_io import iter_clips, to_model_range, to_uint8
from tokenizer.model import VideoTokenizer
from tokenizer.presets import load_tokenizer
from tokenizer.router.predict import load_router
from tokenizer.tokens import VideoTokens

_MINI = Path("ckpts/mini")
_ROWS = 8  # rows of token squares in a block
_INK, _SOFT, _EMPTY = "#1d1b19", "#6f6a64", (0.93, 0.92, 0.90)
_COLOURS = "viridis"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figure at the top of README.md.")
    parser.add_argument("--video", type=Path, help="a video file; default: the bundled clip of --name")
    parser.add_argument("--name", default="bottle_006", help="a bundled held-out clip (default: bottle_006)")
    parser.add_argument("--vq-ckpt", type=Path, default=_MINI / "final.safetensors")
    parser.add_argument("--router-ckpt", type=Path, default=_MINI / "router.safetensors")
    parser.add_argument("--out", type=Path, default=_MINI / "idea.png")
    args = parser.parse_args()
    path = args.video or next(video.path for video in bundled_videos("heldout") if video.path.stem == args.name)
    tokenizer, router = load_tokenizer(args.vq_ckpt), load_router(args.router_ckpt)
    config = tokenizer.config
    real_THWC = next(iter_clips(path, num_frames=config.num_frames, size=config.size)).frames_THWC
    video_BCTHW = to_model_range(real_THWC)[None]
    with torch.inference_mode():
        full = tokenizer.encode(video_BCTHW, router=router, budget="router")
        half = tokenizer.encode(video_BCTHW, router=router, budget=f"tokens:{len(full.code_L) // 2}")
        clips = [_decoded(tokenizer, tokens) for tokens in (full, half)]
    draw(real_THWC, list(zip(("router", "half the budget"), (full, half), clips, strict=True)), tokenizer, args.out)
    print(f"{args.out}: {path.name}, {len(full.code_L)} and {len(half.code_L)} tokens")


def _decoded(tokenizer: VideoTokenizer, tokens: VideoTokens) -> np.ndarray:
    """Frames of the only clip, uint8 [T, H, W, C]."""
    return to_uint8(tokenizer.decode(tokens)[0])


def draw(
    real_THWC: np.ndarray, sides: list[tuple[str, VideoTokens, np.ndarray]], tokenizer: VideoTokenizer, out: Path
) -> None:
    """Write the PNG. `sides`: a title, the tokens and the reconstruction of each budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_blocks = tokenizer.config.num_blocks
    frames_per_block = tokenizer.config.num_frames // num_blocks
    heights = [1.0] + [0.5, 1.0] * len(sides)
    figure = plt.figure(figsize=(8.4, 4.7), dpi=100)
    grid = figure.add_gridspec(
        len(heights), num_blocks, height_ratios=heights, left=0.135, right=0.995, top=0.935, bottom=0.01,
        wspace=0.05, hspace=0.22,
    )  # fmt: skip

    def row(index: int, label: str, pictures: list[np.ndarray], captions: list[str]) -> None:
        for t, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[index, t])
            axes.imshow(picture, aspect="auto")
            axes.set_axis_off()
            axes.set_title(captions[t], fontsize=8, color=_SOFT, pad=2)
        box = grid[index, 0].get_position(figure)
        figure.text(0.008, (box.y0 + box.y1) / 2, label, fontsize=9, color=_INK, va="center", linespacing=1.35)

    def films(frames_THWC: np.ndarray) -> list[np.ndarray]:
        """Per block its first and last frame side by side."""
        ends = [(t * frames_per_block, (t + 1) * frames_per_block - 1) for t in range(num_blocks)]
        return [np.concatenate([frames_THWC[first], frames_THWC[last]], axis=1) for first, last in ends]

    row(0, "clip", films(real_THWC), [f"block {t + 1}: {frames_per_block} frames" for t in range(num_blocks)])
    longest = max(tokenizer.space.levels)
    for number, (title, tokens, frames_THWC) in enumerate(sides):
        blocks = tokens.code_L.split(tokens.length_BN[0].tolist())
        squares = [_squares(codes, longest, plt.get_cmap(_COLOURS)) for codes in blocks]
        row(
            1 + 2 * number,
            f"{title}\n{len(tokens.code_L)} tokens",
            squares,
            [f"{len(codes)} tokens" for codes in blocks],
        )
        row(2 + 2 * number, "decoded", films(frames_THWC), [""] * num_blocks)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(256).save(out, optimize=True)  # a third of the bytes


def _squares(code_L: Tensor, longest: int, colours: Any, cell: int = 12) -> np.ndarray:
    """One square for each token the block may have, column by column; unused ones stay pale. RGB in [0, 1]."""
    columns = -(-longest // _ROWS)
    rgb = np.full((columns * _ROWS, 3), _EMPTY)
    scattered_L = (code_L.numpy() * 0.618034) % 1  # neighbouring codes get different colours
    rgb[: len(code_L)] = colours(scattered_L)[:, :3]
    picture = rgb.reshape(columns, _ROWS, 3).swapaxes(0, 1).repeat(cell, 0).repeat(cell, 1)
    picture[::cell], picture[:, ::cell] = 1, 1  # white lines between the squares
    return picture


if __name__ == "__main__":
    run_cli(main)
