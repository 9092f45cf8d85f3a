"""Protocols are frozen, say what they are, and cannot be changed without showing it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

import evaluations
from evaluations.protocols import PROTOCOLS, card_of, card_text, find_protocol
from tokenizer.common.errors import UserError
from tokenizer.data.classed_scenes import render_classed_scene, render_duotone_scene
from tokenizer.data.scenes import render_scene
from tokenizer.data.sources import SCENES

# A changed line here means that published numbers of that name no longer compare: give the new rule a new name.
HASHES = {
    "ucf101-recon-train": "53eb199c58c9060c",
    "ucf101-recon-train-larp": "d8fb8b78d69e06ce",
    "webvid-recon-val": "b67bddf41074d612",
    "folder-recon": "d46caa878c4d1606",
    "ucf101-c2v-10k": "1e7fcc78a81d5991",
    "k600-fp-50k-64px": "83c063583c80535c",
    "mini-recon": "1b4e9799de329933",
    "mini-c2v": "c44ed43488f254b9",
    "mini-fp": "fa286b6b0c883bd1",
}


def test_no_rule_has_changed() -> None:
    assert {name: protocol.hash for name, protocol in PROTOCOLS.items()} == HASHES


def test_rendered_scenes_are_those_of_their_version() -> None:
    """If a seed gives another scene, raise SCENES: hashes of the miniature change, and tables are refused."""
    grey = {
        render_scene: [124.9, 126.5, 128.9, 142.1, 151.4, 150.8],
        render_classed_scene: [142.2, 83.3, 109.3, 141.2, 140.4, 104.8],
        render_duotone_scene: [142.2, 141.0, 140.9, 141.2, 140.4, 142.1],
    }
    for render, means in grey.items():
        assert [render(seed, "heldout")[0].mean() for seed in range(6)] == pytest.approx(means, abs=0.2)
    assert SCENES == 5 and "scenes of version 5" in PROTOCOLS["mini-c2v"].split


def test_the_hash_covers_every_field_but_the_words() -> None:
    protocol = PROTOCOLS["k600-fp-50k-64px"]
    assert dataclasses.replace(protocol, about="better words").hash == protocol.hash
    others = {"seed": 1, "fps": 3.0, "size": 64, "score_size": None, "count": 5, "condition_scored": False,
              "extractor": "effnet", "perceptual": "lpips_alex", "covariance": "n-1", "clip_rule": "first"}  # fmt: skip
    hashes = {dataclasses.replace(protocol, **{name: value}).hash for name, value in others.items()}
    assert len(hashes | {protocol.hash}) == len(others) + 1


def test_a_change_is_marked() -> None:
    protocol = find_protocol("mini-recon", "reconstruction")
    assert protocol.change(count=None, extractor="effnet") is protocol
    changed = protocol.change(count=9, perceptual="none")
    assert changed.changed == ("count", "perceptual") and changed.hash != protocol.hash
    assert "CHANGED in count, perceptual" in card_text(card_of(changed))
    assert protocol.change(perceptual="none").real_side_hash == protocol.real_side_hash != changed.real_side_hash
    with pytest.raises(UserError, match="clip_rule is fixed"):
        protocol.change(clip_rule="random")


def test_cards_say_the_rules() -> None:
    text = card_text(card_of(PROTOCOLS["k600-fp-50k-64px"], list={"clips": 3}))
    for words in (
        "50,000 of them drawn, seed 42",
        "5 frames, scored too",
        "resized to 64",
        "fvd_i3d",
        "covariance over n",
        "lpips_vgg",
    ):
        assert words in text
    assert "no number of it compares with the paper" in card_text(card_of(PROTOCOLS["mini-recon"]))
    json.dumps([card_of(protocol) for protocol in PROTOCOLS.values()])


def test_wrong_names_are_one_line() -> None:
    for name, task, words in (
        ("ucf", None, "there are ucf101"),
        ("mini-fp", "reconstruction", "is for frame_prediction"),
    ):
        with pytest.raises(UserError, match=words):
            find_protocol(name, task)
    for field in ("task", "dataset", "clip_rule", "extractor", "covariance"):
        with pytest.raises(UserError, match=field):
            dataclasses.replace(PROTOCOLS["mini-recon"], **{field: "other"})


def test_the_face_of_the_package_hands_on_its_names() -> None:
    assert all(callable(getattr(evaluations, name)) for name in evaluations.__all__)
    with pytest.raises(AttributeError, match="'evaluations' has no attribute 'score'"):
        evaluations.score  # noqa: B018


def test_the_list_can_be_printed() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "evaluations.protocols", "--json"], capture_output=True, text=True, timeout=120
    )
    assert json.loads(result.stdout).keys() == PROTOCOLS.keys()
