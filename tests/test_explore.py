"""The explorer: what it computes on a bundled clip, and that its server answers."""

from __future__ import annotations

import argparse
import socket
import urllib.request

import numpy as np
import pytest
import torch

from evaluations.clip_explorer import Explorer, films_html, token_picture, view_html
from evaluations.explore import POLICY, serve
from tokenizer.common.errors import UserError
from tokenizer.data.files import bundled_videos

MINI = "ckpts/mini"
PATH = str(bundled_videos("heldout")[0].path)


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return Explorer(
        argparse.Namespace(
            vq_ckpt=f"{MINI}/final.safetensors",
            router_ckpt=f"{MINI}/router.safetensors",
            gpt_ckpt=f"{MINI}/gpt_c2v.safetensors",
            perceptual="stlpips_alex",
            device="cpu",
            num_threads=1,
        )
    )


def test_lengths_and_picture_of_a_clip(explorer: Explorer) -> None:
    clip = explorer.open(PATH)
    assert explorer.open(PATH) is clip
    assert explorer.choose(clip, "uniform:32") == [32] * 4
    assert sum(explorer.choose(clip, "tokens:100")) <= 100
    assert sum(explorer.choose(clip, "average:100")) <= 100
    with pytest.raises(UserError, match="none of"):
        explorer.choose(clip, "half")

    few, many = (explorer.reconstruct(clip, [length] * 4) for length in (8, 128))
    error = (many.frames_THWC / 255.0 - clip.frames_THWC / 255.0) ** 2
    assert many.psnr == pytest.approx(-10 * np.log10(error.mean()), abs=0.05)  # rounding to 8 bits
    assert many.psnr > few.psnr and many.distance < few.distance
    html = view_html(clip, many, 128)
    assert html.count("ex-film") == 3 and html.count('class="ex-block"') == 4
    assert "http" not in html


def test_the_chart_scores_as_the_tree_of_curation_does(explorer: Explorer) -> None:
    clip = explorer.open(PATH)
    view = explorer.reconstruct(clip, [64, 8, 8, 128])
    assert [series.name for series in explorer.curve(clip, view)] == ["uniform", "router", "shown"]
    # The clip alone, with the two levels of each block that the test needs: the whole tree takes 14 s.
    generator = torch.Generator().manual_seed(0)
    distance_A = explorer._scorer.tree(clip.video_BCTHW, children=1, generator=generator)[0][0]
    row = int((~distance_A.isnan()).nonzero())
    lengths = explorer.space.table_AN[row].tolist()
    assert explorer.reconstruct(clip, lengths).distance == pytest.approx(distance_A[row].item(), abs=1e-3)

    clip.distance_A, clip.uniform = torch.linspace(1, 0, explorer.space.num_rows), None  # in place of the whole tree
    every, uniform, *_ = explorer.curve(clip, view)
    assert len(every.points) == 625 and every.points[0] == uniform.points[0] == (32, 1.0)
    clip.distance_A = clip.uniform = None


def test_a_sample_repeats(explorer: Explorer) -> None:
    name = explorer.class_names[0]
    (frames_THWC, tokens), (again_THWC, _) = (explorer.sample(name, 1.0, 3) for _ in range(2))
    assert frames_THWC.shape == (16, 64, 64, 3) and (frames_THWC == again_THWC).all()
    assert len(tokens.code_L) == tokens.length_BN.sum()
    assert name in films_html({name: frames_THWC}, tokens, 128)


def test_a_square_for_each_token() -> None:
    picture = token_picture(torch.tensor([0, 5, 9]), longest=16, cell=2)
    assert picture.shape == (16, 4, 3)
    pale = (picture[1::2, 1::2] == 230).all(axis=-1)
    assert (~pale).T.flatten().tolist() == [True] * 3 + [False] * 13  # column by column


def test_the_server_answers_this_machine_only_and_names_a_port_in_use(explorer: Explorer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*in use"):
            serve(explorer, port)
    page, address = serve(explorer, port)
    try:
        assert address == f"http://127.0.0.1:{port}/"
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.headers["content-security-policy"] == POLICY
            text = answer.read().decode()
        assert "EVATok explorer" in text and "fonts.googleapis" not in text
        assert not page.share and not page.analytics_enabled
    finally:
        page.close()
