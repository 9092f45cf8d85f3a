"""Clips of other shapes than the paper's: height and width apart, any grid, 256 pixels, 8 blocks, another patch."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stages import HELD_OUT, ROOT, run_here
from torch import Tensor

from autoregressive import Request, Sampler, SamplingConfig, tokens_of
from autoregressive.model import GPT, GPTConfig
from autoregressive.sequence import length_rule
from autoregressive.token_archive import TokenArchive
from tokenizer import load_router, load_tokenizer
from tokenizer.blocks.patches import level_cells, most_queries, patchify, pooling_pyramid, sincos_3d, unpatchify
from tokenizer.common.clip_shape import plain_size
from tokenizer.common.config import from_dict
from tokenizer.common.errors import UserError
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.video_io import iter_video, random_resized_crop, resize, resize_center_crop, to_model_range
from tokenizer.model import TokenizerConfig, VideoTokenizer
from tokenizer.router.predict import check_router_fits
from tokenizer.router.train import RouterTrainConfig
from tokenizer.streaming import reconstruct_streaming
from tokenizer.token_file import TokenFile
from tokenizer.train import TokenizerTrainConfig

SHAPES = {"wide": (16, 48, 80), "px256": (16, 256, 256), "frames32": (32, 32, 32), "patch2": (8, 40, 40)}
grids = st.tuples(st.integers(1, 20), st.integers(1, 20))


def pyramid_of_the_paper(patch_RMD: Tensor, grid: int) -> Tensor:
    """On a square of a power of two, as it was before there were other grids."""
    plane = rearrange(patch_RMD, "R (h w) D -> R D h w", h=grid)
    sizes = [(1, 1)]
    while sizes[-1] != (grid, grid):
        rows, columns = sizes[-1]
        sizes.append((rows * 2, columns) if rows == columns else (rows, columns * 2))
    cells = [rearrange(F.avg_pool2d(plane, (grid // h, grid // w)), "R D h w -> R (h w) D") for h, w in sizes]
    return torch.cat([cells[0], *cells], dim=1)


@pytest.mark.parametrize("grid", [1, 2, 4, 8, 16, 32])
def test_the_papers_grids_pool_to_the_same_bits(grid: int) -> None:
    patch_RmD = torch.randn(2, grid**2, 3)
    assert torch.equal(pooling_pyramid(patch_RmD, (grid, grid)), pyramid_of_the_paper(patch_RmD, grid))


@settings(deadline=None, max_examples=40)
@given(grids)
def test_any_grid_has_a_pyramid_of_groups_that_double(grid: tuple[int, int]) -> None:
    rows, columns = grid
    patch_RmD = torch.randn(1, rows * columns, 2)
    cells = pooling_pyramid(patch_RmD, grid)[0]
    assert torch.equal(cells[0], cells[1])
    torch.testing.assert_close(cells[0], patch_RmD[0].mean(dim=0))
    whole = 1
    while whole < len(cells):  # a group averages to about the block: exactly if its cells are equally large
        group = cells[whole : 2 * whole]
        assert len(group) == whole and patch_RmD.amin() <= group.min() <= group.max() <= patch_RmD.amax()
        whole *= 2
    assert most_queries(grid) == 2 * rows * columns <= len(cells) < 4 * rows * columns + 1
    assert int(level_cells(most_queries(grid)).max()) < len(cells)
    table = sincos_3d(2, grid, 48)
    assert len(table) == 2 * rows * columns and (torch.cdist(table, table) + torch.eye(len(table))).min() > 1e-3
    video_BCTHW = torch.rand(1, 3, 4, 3 * rows, 3 * columns)
    assert torch.equal(unpatchify(patchify(video_BCTHW, 2, 3), 2, 3, grid), video_BCTHW)


sides_of_a_picture = st.tuples(st.integers(8, 60), st.integers(8, 60))


@settings(deadline=None, max_examples=30)
@given(sides_of_a_picture, sides_of_a_picture)
def test_a_picture_is_scaled_to_cover_the_wanted_size_and_the_middle_is_kept(
    shape: tuple[int, int], size: tuple[int, int]
) -> None:
    y, x = np.mgrid[: shape[0], : shape[1]]
    frames_THWC = np.stack([4 * y, 4 * x, 0 * x], axis=-1)[None].astype(np.uint8)  # brightness tells the place
    got_HWC = resize_center_crop(frames_THWC, size)[0].astype(float)
    assert got_HWC.shape == (*size, 3)
    per_pixel = [4 * min(shape[0] / size[0], shape[1] / size[1])] * 2  # the same along both sides: aspect is kept
    for axis, (length, wanted) in enumerate(zip(shape, size, strict=True)):
        ramp = got_HWC[..., axis].mean(axis=1 - axis)
        assert abs(ramp.mean() - 2 * (length - 1)) < 4 + 2 * per_pixel[axis]  # the middle stays in the middle
        if wanted > 12:
            slope = (ramp[-4] - ramp[3]) / (wanted - 7)
            assert slope == pytest.approx(per_pixel[axis], rel=0.2, abs=0.2)


def test_random_crops_have_the_shape_of_the_size() -> None:
    frames_THWC = np.random.default_rng(0).integers(0, 255, (2, 60, 100, 3), dtype=np.uint8)
    whole = random_resized_crop(frames_THWC, (30, 50), (1.0, 1.0), np.random.default_rng(0))
    assert np.array_equal(whole, resize(frames_THWC, 30, 50))
    clips = build_dataset(DataConfig(["bundled:train", "classed:train:3"], size=[24, 40], crop_scale=0.6), seed=1)
    for index in (0, len(clips) - 1):
        assert clips.get(index).frames_CTHW.shape == (3, 16, 24, 40)


@pytest.mark.parametrize(
    ("schema", "model", "words"),
    [
        (TokenizerTrainConfig, {"size": [48]}, "model.size = [48]: give one whole number"),
        (TokenizerTrainConfig, {"size": "wide"}, "[height, width]"),
        (TokenizerTrainConfig, {"size": [48, 81]}, "the nearest that is: [48, 80]"),
        (TokenizerTrainConfig, {"size": [48, 80], "levels": [8, 128]}, "128 is more than the 120 queries"),
        (
            TokenizerTrainConfig,
            {"size": [128, 256]},
            "128 pixels, but the model reads 16 frames of 128x256 pixels: set",
        ),
        (TokenizerTrainConfig, {"size": 16}, "stlpips_alex needs frames of at least 21 pixels a side, got 16"),
        (TokenizerTrainConfig, {"size": [32, 64]}, "read square clips, but model.size = [32, 64]"),
        (RouterTrainConfig, {"size": [48, 80], "stem": "vjepa2"}, "set stem=raw"),
        (RouterTrainConfig, {"size": [48, 80]}, "exchanges height and width, but model.size = [48, 80]"),
        (RouterTrainConfig, {"num_frames": 36, "levels": [1, 2, 3, 4, 5]}, "too many to score"),
    ],
)
def test_what_cannot_work_is_one_line_when_the_config_is_read(schema: type, model: dict[str, Any], words: str) -> None:
    config: dict[str, Any] = {"model": {"levels": [2, 4, 8]} | model}
    if "size" in model and "the model reads" not in words:
        config |= {name: {"size": model["size"]} for name in ("data", "val_data")}
    if schema is TokenizerTrainConfig:
        config["loss"] = {"perceptual_net": "stlpips_alex", "align": 0.7 if "square" in words else 0.0}
    else:
        config |= {"turns": "exchanges" in words, "table": "a", "val_table": "b"}
    with pytest.raises(UserError) as error:
        from_dict(schema, config, "a.yaml")
    assert words in str(error.value) and "\n" not in str(error.value)


def main_job(folder: Path, *flags: str | Path) -> dict[str, Any]:
    words = ["job", "--vid_path", HELD_OUT, "--save_dir", folder, "--perceptual", "none", "--device", "cpu", *flags]
    with mock.patch.object(sys, "argv", list(map(str, words))), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(ROOT / "tokenizer/router/reconstruction_qual_with_router.py"), run_name="job")["main"]()
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of the tokenizers of SHAPES, each after its two steps."""
    out = tmp_path_factory.mktemp("shapes")
    for name in SHAPES:
        run_here("tokenizer.train", f"configs/debug/{name}/proxy.yaml", f"run.dir={out}/{name}/proxy")
    return {name: out / name / "proxy" for name in SHAPES}


@pytest.mark.parametrize("name", SHAPES)
def test_a_real_video_goes_through_every_shape(trained: dict[str, Path], name: str, tmp_path: Path) -> None:
    model = load_tokenizer(trained[name])
    num_frames, *size = SHAPES[name]
    least, most = model.config.levels[0], model.config.levels[-1]
    lengths = [most, *[least] * (model.config.num_blocks - 1)]
    with contextlib.closing(iter_video(HELD_OUT, num_frames, size)) as clips:
        video_BCTHW = torch.stack([to_model_range(clip.frames_THWC) for clip in clips])
    assert video_BCTHW.shape[1:] == (3, *SHAPES[name])
    tokens = model.encode(video_BCTHW, torch.tensor([lengths]).expand(len(video_BCTHW), -1))
    ours_BCTHW = model.decode(tokens)
    frames, codes = reconstruct_streaming(model, video_BCTHW, lengths)
    assert torch.equal(codes.flatten(), tokens.code_L)
    torch.testing.assert_close(frames, ours_BCTHW, rtol=1e-4, atol=1e-5)

    weights, budget = ("--vq_ckpt", trained[name]), "fixed:" + ",".join(map(str, lengths))
    run_here("tokenizer.tokenize", HELD_OUT, "--out", tmp_path, *weights, "--budget", budget, "--device", "cpu")
    (path,) = tmp_path.glob("*.safetensors")
    file = TokenFile(path)
    assert file.facts.size == plain_size(size, "") and torch.equal(file.clips(0, len(file)).code_L, tokens.code_L)
    shown = ["--side-by-side", "--source", HELD_OUT, "--display-size", "64", "--lossless"]
    run_here("tokenizer.detokenize", path, "--out", tmp_path / "a.mkv", *weights, *shown, "--device", "cpu")
    (clip, *_) = iter_video(tmp_path / "a.mkv", num_frames, None)
    height, width = (side * 64 // min(size) for side in size)
    assert clip.frames_THWC.shape == (num_frames, height, 2 * width, 3)

    metrics = main_job(tmp_path / "job", *weights, "--budget", budget)
    assert metrics["clips"][0]["assignment"] == lengths and metrics["tokenizer"]["size"] == file.facts.size
    page = (tmp_path / "job/report.html").read_text()
    assert f"aspect-ratio: {size[1]} / {size[0]}" in page or max(size) > 128
    assert "×".join(map(str, SHAPES[name])) in page


def test_the_other_stages_take_a_wide_clip(trained: dict[str, Path], tmp_path: Path) -> None:
    """Curation, router, packed clips, tokens, a sampled clip, evaluation."""
    proxy, configs = trained["wide"], "configs/debug/wide"
    packed = tmp_path / "packed.safetensors"
    run_here("tokenizer.data.pack", packed, "--sources", "synthetic:train:4", "--size", "48x80")
    data = f"data.sources=[{packed}]"
    run_here("tokenizer.router.curate", f"{configs}/curate.yaml", f"dir={tmp_path}/curate", f"proxy={proxy}", data)
    table = tmp_path / "curate/table.safetensors"
    tables = [f"table={table}", f"val_table={table}", data, f"val_{data}"]
    run_here("tokenizer.router.train", f"{configs}/router.yaml", f"run.dir={tmp_path}/router", *tables)
    pair = ["--router_ckpt", tmp_path / "router", "--vq_ckpt", proxy]
    assert main_job(tmp_path / "job", *pair, "--budget", "tokens:12", "--no-videos")["mean"]["tokens"] <= 12
    router, model = load_router(tmp_path / "router"), load_tokenizer(proxy)
    with pytest.raises(UserError, match="of 32 pixels, but .* of 48x80 pixels: use a router"):
        check_router_fits(router, TokenizerConfig(size=32, levels=[2, 4, 8]))

    check_sampling(model)
    check_frame_prediction(proxy, tmp_path, f"router={tmp_path}/router", data)

    given = ["--vq-ckpt", proxy, "--budget", "uniform:4", "--data", HELD_OUT.parent, "--count", "2"]
    flags = ["--protocol", "folder-recon", "--extractor", "none", "--perceptual", "stlpips_alex", "--draws", "20"]
    shape = ["--size", "48x80", "--out", tmp_path / "eval", "--cache", tmp_path / "cache", "--device", "cpu"]
    run_here("evaluations.reconstruction", *flags, *given, *shape)
    result = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert result["card"]["protocol"]["size"] == [48, 80] and "size changed" in result["notes"][0]


def check_sampling(model: VideoTokenizer) -> None:
    """A GPT has no shape of pictures: its tokens decode to those of the tokenizer."""
    gpt = GPT(GPTConfig(layers=1, width=32, heads=2, codebook_size=64, levels=[2, 4, 8], num_classes=2)).eval()
    sampler = Sampler(gpt, SamplingConfig(slots=1, seed=0, guidance=(1.0,)))
    samples = list(sampler.run([Request(("clip", 0), 1, rule=length_rule(gpt.layout))]))
    assert model.decode(tokens_of(samples, gpt.layout, model)).shape == (1, 3, 16, 48, 80)


def check_frame_prediction(proxy: Path, out: Path, *extract: str) -> None:
    """Tokens, a GPT on them, its samples, their evaluation; a GPT on tokens of another size is refused."""
    made_by = [f"tokenizer={proxy}", "data.size=[48,80]", *extract]
    run_here("autoregressive.extract_codes", "configs/debug/extract_fp.yaml", f"dir={out}/codes", *made_by)
    assert TokenArchive(out / "codes").facts.size == [48, 80]
    archives = [f"archive={out}/codes", f"val_archive={out}/codes", f"tokenizer={proxy}"]
    run_here("autoregressive.train", "configs/debug/gpt_fp.yaml", f"run.dir={out}/gpt", "run.steps=2", *archives)
    pair = ["--vq-ckpt", proxy, "--gpt-ckpt", out / "gpt", "--check-special-token-mask", "--device", "cpu"]
    flags = ["--tok-config", "configs/debug/wide/proxy.yaml", "--gpt-model", "GPT-debug", "--vid_path", HELD_OUT]
    flags += [
        "--sample-dir",
        out / "samples",
        "--sample-num",
        "1",
        "--fixed-prefix",
        "8,2",
        "--condition-mode",
        "padding",
    ]
    run_here("autoregressive.sample_frame_prediction", *flags, *pair)
    (frames,) = (out / "samples/samples").glob("*/frames.npy")
    assert np.load(frames).shape == (16, 48, 80, 3)
    flags = ["--protocol", "mini-fp", "--extractor", "none", "--count", "1", "--draws", "20", "--cache", out / "cache"]
    evaluate = ["evaluations.frame_prediction", *flags, *pair, "--out", out / "predicted"]
    with pytest.raises(UserError, match="gives clips of 16 frames of 64 pixels, but the tokenizer reads .* 48x80"):
        run_here(*evaluate)
    run_here(*evaluate, "--size", "48x80")
    assert json.loads((out / "predicted/metrics.json").read_text())["num_clips"] == 1
