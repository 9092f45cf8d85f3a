"""Walks through textured rooms: a seed gives one walk in any process, levels are split, motion is as labelled."""

from __future__ import annotations

import sys
from multiprocessing import get_context

import numpy as np
import pytest

from tokenizer.common.errors import UserError
from tokenizer.data import doom
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.doom import LEVELS, MOTIONS, SPLITS, draw_steps, draw_walk, levels_of
from tokenizer.data.loader import batches


def test_levels_of_the_splits_are_disjoint_and_complete():
    assert sorted(level for split in SPLITS for level in levels_of(split)) == sorted(LEVELS)
    assert len(levels_of("train")) == 51 and len(levels_of("validation")) == 8 and len(levels_of("test")) == 9


@pytest.mark.parametrize("motion", MOTIONS)
def test_steps_are_of_the_motion_and_rest_in_between(motion):
    rng = np.random.default_rng(0)
    walks = [draw_steps(motion, 16, rng) for _ in range(60)]
    moving = [step for walk in walks for step in walk if not step.rests]
    uses = {part for step in moving for part in ("forward", "right", "turn") if getattr(step, part)}
    wanted = {"still": set(), "walk": {"forward"}, "turn": {"turn"}, "strafe": {"right"}}
    assert uses == wanted.get(motion, {"forward", "turn"} | ({"right"} if motion == "mixed" else set()))
    assert all(any(not step.rests for step in walk) for walk in walks) or motion == "still"
    changes = [t + 1 for walk in walks for t in range(1, 15) if walk[t] != walk[t - 1]]  # the frame after a change
    at_borders = sum(frame in (4, 8, 12) for frame in changes)
    assert motion == "still" or 0.4 < at_borders / len(changes) < 0.9
    steady = draw_steps(motion, 16, rng, steady=True)
    assert len(set(steady)) == 1


def test_a_missing_engine_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    monkeypatch.setattr(doom, "_engines", {})
    with pytest.raises(UserError, match=r"pip install 'evatok\[scenes\]'"):
        draw_walk(0, "test", 32)


@pytest.mark.parametrize("source", ["doom:heldout:3", "doom:train", "steady_doom:test"])
def test_a_misspelt_source_names_the_splits(source):
    with pytest.raises(UserError, match="doom:validation:N"):
        build_dataset(DataConfig([source], size=32))


class TestRendered:
    """With the engine, where it is installed."""

    @pytest.fixture(autouse=True)
    def engine(self):
        pytest.importorskip("vizdoom")

    def test_a_seed_gives_one_walk_in_any_order_and_process(self):
        seeds = [2, 13, 9]
        here = [draw_walk(seed, "test", 32).frames_THWC for seed in seeds]
        with get_context("spawn").Pool(1) as pool:
            there = pool.starmap(_frames, [(seed, "test", 32) for seed in reversed(seeds)])
        for ours, theirs in zip(here, reversed(there), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def test_walks_move_as_their_steps_say(self):
        for seed in range(6):
            walk = draw_walk(seed, "validation", 64)
            assert walk.frames_THWC.shape == (16, 64, 64, 3) and walk.motion == MOTIONS[seed]
            assert walk.level in levels_of("validation")
            assert walk.frames_THWC.mean() >= doom.DARKEST - 4 and walk.frames_THWC[0].std() >= 8
            change = np.abs(np.diff(walk.frames_THWC.astype(int), axis=0)).mean(axis=(1, 2, 3))
            for moved, step in zip(change, walk.steps, strict=True):
                assert (moved == 0) if step.rests else (0 < moved < 60)

    def test_workers_render_and_their_engines_end_with_them(self):
        data = build_dataset(DataConfig(["steady_doom:train:5"], size=32, augment=False))
        batch = next(iter(batches(data, 5, 0, num_workers=2, steps=1)))
        assert sorted(batch.labels) == sorted(doom.STEADY_MOTIONS)
        assert batch.video_BCTHW.shape == (5, 3, 16, 32, 32)


def _frames(seed: int, split: str, size: int) -> np.ndarray:
    return draw_walk(seed, split, size).frames_THWC
