"""Rendered scenes: the factors that are claimed are the ones that can be seen."""

import time

import numpy as np
import pytest

from tokenizer.data.files import BUNDLED, bundled_videos
from tokenizer.data.scenes import FAST_SPEED, KINDS, draw_scene, render, render_scene

SEEDS = range(120)


def change(frames_THWC: np.ndarray) -> np.ndarray:
    """Mean absolute difference to the frame before, in grey levels, for every frame but the first."""
    return np.abs(np.diff(frames_THWC.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))


@pytest.fixture(scope="module")
def change_by_kind() -> dict[str, list[np.ndarray]]:
    changes: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for seed in SEEDS:
        frames_THWC, kind = render_scene(seed, "train")
        changes[kind].append(change(frames_THWC))
    return changes


def test_a_seed_is_a_scene_and_splits_share_nothing() -> None:
    one, again = render_scene(4, "heldout", 32), render_scene(4, "heldout", 32)
    np.testing.assert_array_equal(one[0], again[0])
    assert one[0].shape == (16, 32, 32, 3) and one[0].dtype == np.uint8
    assert not np.array_equal(one[0], render_scene(4, "train", 32)[0])
    assert not np.array_equal(one[0], render_scene(10, "heldout", 32)[0])
    sources = [{video.label for video in bundled_videos(split)} for split in ("train", "heldout")]
    assert sources == [{"bbbtrailer", "box", "bunny"}, {"bottle", "tree"}]
    assert sum(len(bundled_videos(split)) for split in ("train", "heldout")) == len(list(BUNDLED.glob("*.mp4"))) == 126


def test_all_kinds_begin_with_one_picture_and_all_pictures_have_one_contrast() -> None:
    for number in range(4):
        scenes = [draw_scene(len(KINDS) * number + turn, "train") for turn in range(len(KINDS))]
        first = [render(scene, 64)[0] for scene in scenes]
        assert all(np.array_equal(first[0], frame) for frame in first)
    contrast = [render(draw_scene(seed, "train"), 64)[0].astype(float).std(axis=(0, 1)).mean() for seed in SEEDS[::6]]
    assert np.median(contrast) > 25


def test_kinds_are_balanced(change_by_kind: dict[str, list[np.ndarray]]) -> None:
    assert {len(changes) for changes in change_by_kind.values()} == {len(SEEDS) // len(KINDS)}


def test_still_does_not_change_at_all_and_motion_rises_with_the_kind(
    change_by_kind: dict[str, list[np.ndarray]],
) -> None:
    motion = {kind: float(np.median([c.mean() for c in changes])) for kind, changes in change_by_kind.items()}
    assert max(c.max() for c in change_by_kind["still"]) == 0
    assert 0 < 2 * motion["slow"] < min(motion[kind] for kind in ("shapes", "mixed", "fast", "cuts"))


def test_blocks_that_stand_still_do_so_to_the_bit() -> None:
    seen = set()
    for seed in (s for s in SEEDS if KINDS[s % len(KINDS)] == "mixed"):
        scene = draw_scene(seed, "train")
        moves_T = change(render(scene, 64)) > 0
        moves_N = np.insert(moves_T, 0, False).reshape(4, 4).any(axis=1)
        assert moves_N.tolist() == [speed > 0 for speed in scene.speed_N]
        seen.add(int(moves_N.sum()))
    assert seen == {1, 2, 3}


def test_cuts_happen_where_they_are_said_to() -> None:
    at_borders = []
    for seed in (s for s in SEEDS if KINDS[s % len(KINDS)] == "cuts"):
        scene = draw_scene(seed, "train")
        change_T = np.insert(change(render(scene, 64)), 0, 0.0)
        calm = [t for t in range(16) if t not in scene.cut_frames]
        assert change_T[list(scene.cut_frames)].min() > 2 * change_T[calm].max()
        at_borders.append(all(t % 4 == 0 for t in scene.cut_frames))
    assert any(at_borders) and not all(at_borders)


def test_speed_and_detail_are_what_the_scene_says() -> None:
    scenes = [draw_scene(seed, "train", num_frames=1) for seed in SEEDS]
    assert all(FAST_SPEED[0] <= s.speed_N[0] <= FAST_SPEED[1] for s in scenes if s.kind == "fast")
    texels = np.array([scene.texels_across for scene in scenes])
    steps = [np.abs(np.diff(render(s, 64)[0].astype(float), axis=1)).mean() for s in scenes]
    order = np.argsort(texels)
    assert np.mean([steps[i] for i in order[-20:]]) > 1.25 * np.mean([steps[i] for i in order[:20]])


def test_the_same_scene_at_every_size() -> None:
    small, large = (render_scene(2, "train", size)[0] for size in (32, 64))
    halved = large.reshape(16, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(halved - small).mean() < 6


def test_any_number_of_frames() -> None:
    for kind_seed in range(len(KINDS)):
        for num_frames in (1, 4, 17):
            assert len(render_scene(kind_seed, "train", 16, num_frames)[0]) == num_frames


def test_a_scene_is_cheap_once_the_photographs_are_decoded() -> None:
    costs = []
    for _ in range(2):
        for seed in range(12):
            begin = time.process_time()
            render_scene(seed, "train", 64)
            costs.append(time.process_time() - begin)
    assert np.median(costs[12:]) < 0.02  # 4 ms on an idle machine
