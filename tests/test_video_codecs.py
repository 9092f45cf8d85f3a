"""The codecs as a baseline: what is counted is what is decoded, and the rate is met from below."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from autoregressive.model import GPT, GPTConfig
from evaluations.quality_cost import video_codecs
from evaluations.quality_cost.sweep import gpt_bits, plain_bits
from evaluations.quality_cost.video_codecs import CODECS, Codec, RateSearch, decode, encode, find_codecs, pick_codecs
from tokenizer.common.errors import UserError
from tokenizer.data.scenes import render_scene
from tokenizer.data.video_io import iter_clips
from tokenizer.tokens import VideoTokens

CLIP = Path(__file__).parents[1] / "tokenizer/data/bundled/tree_000.mp4"


@pytest.fixture(scope="module")
def frames_THWC() -> np.ndarray:
    return next(iter_clips(CLIP, num_frames=16, size=64)).frames_THWC


def decibel(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * math.log10(((a.astype(float) - b) ** 2).mean() / 255**2)


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_is_there_and_meets_the_rate(name: str, frames_THWC: np.ndarray) -> None:
    (codec,) = pick_codecs([name])
    search = RateSearch(codec, frames_THWC, fps=25.0)
    found = {}
    for budget in (1258, 700):
        coded, reached = search.at_most(budget)
        assert reached and 0.85 * budget < coded.num_bytes <= budget
        found[budget] = decibel(decode(coded), frames_THWC)
        assert decode(coded).shape == frames_THWC.shape
    assert found[1258] > found[700] > 20
    num_made = len(search.made)
    assert search.at_most(1258)[0].num_bytes <= 1258 and len(search.made) == num_made, "nothing is encoded twice"


def test_a_codec_gets_the_exact_frame_rate(frames_THWC: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of some DV files is 9000000/299971; with a denominator of up to 1001 it would become 30003/1000."""
    made: list[av.VideoCodecContext] = []
    create = av.CodecContext.create
    monkeypatch.setattr(av.CodecContext, "create", lambda *words: made.append(create(*words)) or made[-1])
    encode(CODECS["h264"], frames_THWC[:2], fps=9000000 / 299971, quality=40)
    assert made[0].framerate == 1 / made[0].time_base == Fraction(9000000, 299971)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("side", [32, 64])
def test_the_same_clip_gives_the_same_bytes(name: str, side: int) -> None:
    scene_THWC, _ = render_scene(4, "heldout", side, 16)
    first, *others = (encode(CODECS[name], scene_THWC, 25.0, 30).packets for _ in range(4))
    assert all(packets == first for packets in others)


def test_a_codec_that_cannot_go_so_low_says_so(frames_THWC: np.ndarray) -> None:
    coded, reached = RateSearch(CODECS["h264"], frames_THWC, fps=25.0).at_most(40)
    assert not reached and coded.quality == CODECS["h264"].coarsest and coded.num_bytes > 40


def test_the_encoders_name_is_not_counted_and_not_needed(
    frames_THWC: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = encode(CODECS["h264"], frames_THWC, 25.0, 30)
    monkeypatch.setattr(video_codecs, "_without_information", lambda packet: packet)
    told = encode(CODECS["h264"], frames_THWC, 25.0, 30)
    assert told.num_bytes - bare.num_bytes > 500
    assert b"x264" in told.packets[0] and b"x264" not in bare.packets[0]
    assert np.array_equal(decode(told), decode(bare))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "h266", Codec("h266", "libnone", ("none",), {}, 0, 63))
    find_codecs.cache_clear()
    try:
        there, missing = find_codecs()
        assert "h266" not in [codec.name for codec in there]
        assert any("h266" in line and "libnone" in line for line in missing)
        with pytest.raises(UserError, match="libnone"):
            pick_codecs(["h266"])
    finally:
        find_codecs.cache_clear()
    with pytest.raises(UserError, match="vvc"):
        pick_codecs(["vvc"])


def test_tokens_in_plain_bits() -> None:
    length_BN = torch.tensor([[256, 256, 256, 6], [32, 32, 32, 32]])
    assert plain_bits(length_BN, 8192).tolist() == [774 * 13, 128 * 13]  # 774 tokens: 1258 bytes
    assert plain_bits(length_BN, 8192, num_levels=4).tolist() == [774 * 13 + 8, 128 * 13 + 8]


def test_a_gpt_that_knows_nothing_codes_tokens_plainly() -> None:
    """Its head starts at 0, so all ids that the grammar allows are equally probable."""
    config = GPTConfig(1, 64, 2, codebook_size=32, levels=[1, 2, 4, 8], num_blocks=2, num_classes=3)
    model = GPT(config).eval()
    length_BN = torch.tensor([[1, 8], [4, 2]])
    tokens = VideoTokens(torch.arange(15), length_BN, num_frames=8, size=16, codebook_size=32)
    assert gpt_bits(model, tokens).tolist() == pytest.approx(plain_bits(length_BN, 32, 4).tolist(), abs=1e-4)

    with torch.no_grad():  # a head that favours id 0: code 0 gets cheaper, every other code dearer
        model.head.weight[0] = 0.1 * model.norm(model.embedding.weight.mean(dim=0))
    biased = gpt_bits(model, tokens, label=2)
    assert not torch.allclose(biased, gpt_bits(model, tokens, label=0)), "the condition is read"
    assert torch.equal(biased[1], gpt_bits(model, tokens.clip(1), label=2)[0]), "clips do not depend on each other"
    with pytest.raises(UserError, match="64"):
        gpt_bits(model, VideoTokens(tokens.code_L, length_BN, 8, 16, codebook_size=64))


@pytest.mark.parametrize("codec", find_codecs()[0], ids=lambda codec: codec.name)
def test_an_encoder_leaves_the_priority_of_its_caller(codec: Codec) -> None:
    before = os.sched_getscheduler(0)
    encode(codec, np.zeros((2, 64, 64, 3), np.uint8), fps=8, quality=40)
    assert os.sched_getscheduler(0) == before
