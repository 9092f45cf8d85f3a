"""The explorer: what it computes on a bundled clip, and that its server answers."""

from __future__ import annotations

import argparse
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    picked = explorer.reconstruct(clip, explorer.choose(clip, "router"))
    assert [series.name for series in explorer.curve(clip, picked)] == ["uniform", "router, shown"]
    # The clip alone, with the two levels of each block that the test needs: the whole tree takes 14 s.
    generator = torch.Generator().manual_seed(0)
    distance_A = explorer._scorer.tree(clip.video_BCTHW, children=1, generator=generator)[0][0]
    row = int((~distance_A.isnan()).nonzero())
    lengths = explorer.space.table_AN[row].tolist()
    assert explorer.reconstruct(clip, lengths).distance == pytest.approx(distance_A[row].item(), abs=1e-3)

    clip.distance_A = torch.linspace(1, 0, explorer.space.num_rows)  # in place of the whole tree
    every, uniform, *_ = explorer.curve(clip, view)
    assert len(every.points) == 625 and every.points[0] == (32, 1.0) and uniform.points[0][0] == 32
    clip.distance_A = None


def test_a_sample_repeats(explorer: Explorer) -> None:
    name = explorer.class_names[0]
    (frames_THWC, tokens), (again_THWC, _) = (explorer.sample(name, 1.0, 3) for _ in range(2))
    assert frames_THWC.shape == (16, 64, 64, 3) and (frames_THWC == again_THWC).all()
    assert len(tokens.code_L) == tokens.length_BN.sum()
    assert name in films_html({name: frames_THWC}, tokens, 128)


def test_a_square_for_each_token() -> None:
    picture = token_picture(torch.tensor([0, 5, 9]), longest=16, cell=2)
    assert picture.shape == (16, 4, 4)
    pale = picture[1::2, 1::2, 3] == 51
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


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium, by selenium: `pip install -e .[browser]`, Debian's chromium and chromium-driver."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e .[browser]")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("needs chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1400,1200"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


def until(fact: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "the page did not change"
        time.sleep(0.1)


def test_the_page_in_a_browser(explorer: Explorer, browser: Any, tmp_path: Path) -> None:
    """Each control changes the pictures; mistakes are warnings; what a file is called is text."""
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    page, address = serve(explorer, port)

    def run(script: str, *values: Any) -> Any:
        return browser.execute_script(script, *values)

    def captions() -> list[str]:
        return run("return [...document.querySelectorAll('.ex-row figcaption')].map(e => e.textContent)")

    def warnings() -> str:
        return run("return [...document.querySelectorAll('.toast-body')].map(e => e.textContent).join()")

    def slide(index: int, value: int) -> None:
        run(
            "const slider = document.querySelectorAll('input[type=range]')[arguments[0]];"
            "slider.value = arguments[1]; slider.dispatchEvent(new Event('input', {bubbles: true}))",
            index,
            value,
        )

    def sums_to(tokens: int) -> bool:
        return f"tokens of the 4 blocks, {tokens} together" in captions()

    try:
        browser.get(address)
        until(lambda: len(captions()) == 4 and run("return document.querySelector('svg.chart')"))
        assert captions()[0] == "original" and " dB, distance 0." in captions()[1]
        slide(1, 32)  # the budget
        until(lambda: sums_to(32))
        slide(3, 4)  # the second block
        until(lambda: sums_to(8 + 128 + 8 + 8))

        budget = browser.find_element("css selector", "textarea")
        budget.clear()
        budget.send_keys("<i>half</i>\n")
        until(lambda: "budget '<i>half</i>' is none of" in warnings())
        bad = tmp_path / "bad.mp4"
        bad.write_bytes(b"no video" * 99)
        before = captions()
        browser.find_element("css selector", "input[type=file]").send_keys(str(bad))
        until(lambda: "bad.mp4: cannot be decoded" in warnings())
        assert str(Path("/gradio/")) not in warnings() and captions() == before
        slide(1, 64)  # still of the clip before it
        until(lambda: captions() != before)

        run("document.querySelectorAll('button[role=tab]')[1].click()")
        click = "[...document.querySelectorAll('button')].find(e => e.textContent.trim() == 'Sample').click()"
        until(lambda: "Sample" in run("return document.body.innerText"))
        run(click)
        until(lambda: explorer.class_names[0] in captions())
        errors = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
        assert not errors and not run(
            "return performance.getEntriesByType('resource').map(e => e.name)"
            ".filter(e => !e.startsWith(arguments[0]) && !e.startsWith('data:'))",
            address,
        )
    finally:
        page.close()
