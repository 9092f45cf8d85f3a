"""Scenes with a class show what their class says; dead leaves are pictures that never repeat."""

import numpy as np

from tokenizer.data.classed_scenes import CLASS_NAMES, draw_classed_scene, render_classed_scene, render_duotone_scene
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.scenes import dead_leaves

SEEDS = range(4 * len(CLASS_NAMES))


def motion(frames_THWC: np.ndarray) -> float:
    return float(np.abs(np.diff(frames_THWC.astype(np.float32), axis=0)).mean())


def test_motion_and_speed_are_those_of_the_class() -> None:
    by_motion: dict[str, list[float]] = {}
    for seed in SEEDS:
        frames_THWC, kind = render_classed_scene(seed, "train")
        scene = draw_classed_scene(seed, "train")
        contrast = np.abs(scene.colour_3 - scene.ground_3).mean()
        by_motion.setdefault(kind, []).append(motion(frames_THWC) / contrast)
    mean = {name: np.mean(values) for name, values in by_motion.items()}
    assert max(by_motion["still"]) == 0
    for kind in ("slide", "pulse"):
        assert min(by_motion[f"{kind} slow"]) > 0 and 2 * mean[f"{kind} slow"] < mean[f"{kind} fast"]


def test_a_bar_is_upright_and_fills_its_corners_and_a_disc_does_not() -> None:
    for seed, corner_is_shape in ((0, False), (5, True)):
        scene = draw_classed_scene(seed, "train")
        frame_HWC = render_classed_scene(seed, "train", 256)[0][0].astype(float)
        is_shape_HW = np.abs(frame_HWC - scene.colour_3).max(axis=2) < 2
        rows, columns = (np.flatnonzero(is_shape_HW.any(axis=axis)) for axis in (1, 0))
        corner_HW = is_shape_HW[rows[0] : rows[0] + 6, columns[0] : columns[0] + 6]
        height, width = (2.6, 1.0) if corner_is_shape else (2.0, 2.0)  # in radii
        assert abs(len(rows) / 256 - height * scene.radius) < 0.02
        assert abs(len(columns) / 256 - width * scene.radius) < 0.02
        assert corner_HW[2:, 2:].any() == corner_is_shape


def test_a_seed_is_a_scene_and_splits_differ() -> None:
    one, kind = render_classed_scene(3, "train", 32)
    again, _ = render_classed_scene(3, "train", 32)
    np.testing.assert_array_equal(one, again)
    assert one.shape == (16, 32, 32, 3) and one.dtype == np.uint8 and f"disc {kind}" == CLASS_NAMES[3]
    assert not np.array_equal(one, render_classed_scene(3, "heldout", 32)[0])
    assert len(render_classed_scene(2, "train", 16, num_frames=1)[0]) == 1


def test_a_duotone_scene_is_a_classed_one_in_the_same_two_colours_as_all_others() -> None:
    colours = set()
    for seed in range(6):
        frames_THWC, kind = render_duotone_scene(seed, "train", 64)
        other_THWC, other_kind = render_classed_scene(seed, "train", 64)
        scene = draw_classed_scene(seed, "train")
        ground_THW = (other_THWC == scene.ground_3).all(axis=-1)
        colours |= {tuple(colour) for colour in np.unique(frames_THWC[ground_THW], axis=0)}
        assert kind == other_kind
    assert len(colours) == 1


def test_as_a_source_every_epoch_shows_other_scenes_of_the_same_class() -> None:
    clips = build_dataset(DataConfig(sources=[f"classed:train:{len(CLASS_NAMES)}"], size=16))
    first, second = ([clips.get(i, epoch) for i in range(len(clips))] for epoch in (0, 1))
    assert [s.label for s in first] == [s.label for s in second] == list(CLASS_NAMES)
    assert all(not a.video_CTHW.equal(b.video_CTHW) for a, b in zip(first, second, strict=True))


def test_dead_leaves_are_pictures_of_their_seed() -> None:
    pictures = [dead_leaves(seed, 64) for seed in range(8)]
    assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 and p.std() > 15 for p in pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    dead_leaves.cache_clear()
    np.testing.assert_array_equal(pictures[0], dead_leaves(0, 64))
