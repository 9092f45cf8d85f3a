"""ClipDataset and loader: names, reproducible draws, unreadable files, the same batches with any number of workers."""

import collections
import itertools
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenizer.common.device import epoch_order
from tokenizer.common.errors import UserError
from tokenizer.data import video_io
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.export import export_clips
from tokenizer.data.loader import batches

SMALL = {"num_frames": 4, "size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos whose grey level tells file and frame, and between them two files that are none."""
    root = tmp_path_factory.mktemp("clips") / "my videos"
    (root / "deeper").mkdir(parents=True)
    for number, name in enumerate(("a.mp4", "c.mkv", "deeper/e.mp4")):
        levels_T = 50 * number + 4 * np.arange(12)
        frames_THWC = np.broadcast_to(levels_T[:, None, None, None], (12, 24, 32, 3)).astype(np.uint8)
        video_io.write_video(root / name, frames_THWC, fps=12, lossless=True)
    (root / "b.mp4").write_bytes(b"")
    (root / "d.mp4").write_text("words")
    return root


def test_sources_and_their_names(folder: Path) -> None:
    manifest = folder / "list.csv"
    raw = os.fsencode(folder) + b"/caf\xe9.mp4"
    Path(os.fsdecode(raw)).write_bytes((folder / "a.mp4").read_bytes())
    manifest.write_bytes(b"path,label\na.mp4,juggling\ncaf\xe9.mp4,\n")
    dataset = build_dataset(
        DataConfig(sources=[str(manifest), "bundled:heldout", "synthetic:train:3"], repeat=[2, 1, 1], **SMALL)
    )
    assert len(dataset) == len(dataset.names) == 2 * 2 + 30 + 3
    assert dataset.names[:5] == ["a.mp4", "caf\\xe9.mp4", "a.mp4", "caf\\xe9.mp4", "bundled/bottle_000.mp4"]
    assert dataset.names[-1] == "synthetic/train/000002"
    samples = [dataset.get(index) for index in (0, 1, 4, 36)]
    assert [s.label for s in samples] == ["juggling", None, "bottle", None]
    assert [s.kind for s in samples] == [None, None, None, "shapes"]
    assert all(s.video_CTHW.shape == (3, 4, 16, 16) and s.video_CTHW.dtype == torch.float32 for s in samples)
    assert all(s.video_CTHW.min() >= 0 and s.video_CTHW.max() <= 1 for s in samples)
    Path(os.fsdecode(raw)).unlink()
    manifest.unlink()


def test_plain_clips_depend_on_the_index_alone(folder: Path) -> None:
    sources = [str(folder / "c.mkv"), "bundled:train", "synthetic:heldout:6"]
    first, second = (build_dataset(DataConfig(sources=sources, augment=False, **SMALL), seed) for seed in (1, 2))
    for index in (0, 1, len(first) - 1):
        assert torch.equal(first.get(index, 0).video_CTHW, second.get(index, 7).video_CTHW)
    levels_T = (first.get(0).video_CTHW[0, :, 8, 8] * 255).round().tolist()
    assert levels_T == [50, 54, 58, 62]


def test_random_clips_depend_on_seed_epoch_and_index(folder: Path) -> None:
    cfg = DataConfig(sources=[str(folder / "c.mkv"), "bundled:train", "synthetic:train:6"], crop_scale=0.7, **SMALL)
    one, same, other = (build_dataset(cfg, seed) for seed in (1, 1, 2))
    for index in (0, 1, len(one) - 1):
        assert torch.equal(one.get(index, 3).video_CTHW, same.get(index, 3).video_CTHW)
    for index in (1, len(one) - 1):
        assert not torch.equal(one.get(index, 3).video_CTHW, one.get(index, 4).video_CTHW)
        assert not torch.equal(one.get(index, 3).video_CTHW, other.get(index, 3).video_CTHW)
        assert one.get(index, 3).kind == one.get(index, 4).kind
    starts = {round(float(one.get(0, epoch).video_CTHW[0, 0, 0, 0]) * 255) for epoch in range(40)}
    assert starts == {50 + 4 * start for start in range(9)}  # every start of 4 frames out of 12


def test_flip_and_crop_do_what_they_say(tmp_path: Path) -> None:
    ramp_HW = np.arange(32, dtype=np.uint8)[:, None] * 2 + np.arange(32, dtype=np.uint8)[None] * 4
    frames_THWC = np.broadcast_to(ramp_HW[None, ..., None], (4, 32, 32, 3))
    video_io.write_video(tmp_path / "ramp.mp4", frames_THWC, fps=10, lossless=True)

    def slopes(**options: object) -> np.ndarray:
        """Growth per pixel down and to the right, for 12 epochs: [12, 2]."""
        dataset = build_dataset(DataConfig(sources=[str(tmp_path)], num_frames=4, size=32, **options))
        image_EHW = np.stack([dataset.get(0, epoch).video_CTHW[0, 0].numpy() * 255 for epoch in range(12)])
        return np.stack([np.diff(image_EHW, axis=axis).mean(axis=(1, 2)) for axis in (1, 2)], axis=1)

    np.testing.assert_allclose(slopes(augment=False), [[2, 4]] * 12, atol=1e-4)
    flipped = slopes()
    np.testing.assert_allclose(np.abs(flipped), [[2, 4]] * 12, atol=1e-4)
    assert {float(sign) for sign in np.sign(flipped[:, 1])} == {-1, 1} and (flipped[:, 0] > 0).all()
    zoom = slopes(flip=False, crop_scale=0.5)[:, 1] / 4  # side of the crop as a part of the short side
    assert 0.45 < zoom.min() < 0.75 < zoom.max() < 1.02


def test_unreadable_files_are_named_once_and_replaced_by_the_next(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = build_dataset(DataConfig(sources=[str(folder)], augment=False, **SMALL))
    assert dataset.names == [f"my videos/{name}" for name in ("a.mp4", "b.mp4", "c.mkv", "d.mp4", "deeper/e.mp4")]
    order = [dataset.get(index).name for index in range(5)]
    assert order == [f"my videos/{name}" for name in ("a.mp4", "c.mkv", "c.mkv", "deeper/e.mp4", "deeper/e.mp4")]
    assert list(dataset.quarantine) == ["my videos/b.mp4", "my videos/d.mp4"]
    assert "empty" in dataset.quarantine["my videos/b.mp4"]
    dataset.get(1, epoch=1)
    skipped = [record for record in caplog.records if "unreadable so far" in record.getMessage()]
    assert len(skipped) == 2 and "2 unreadable so far" in caplog.text

    with_workers = build_dataset(DataConfig(sources=[str(folder)], augment=False, **SMALL))
    list(batches(with_workers, 5, seed=0, num_workers=1, steps=1))
    assert set(with_workers.quarantine) == set(dataset.quarantine)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_signal_to_the_whole_process_group_leaves_the_workers_at_work() -> None:
    stream = batches(
        build_dataset(DataConfig(sources=["bundled:train:8"], augment=False, **SMALL)), 2, 0, num_workers=2
    )
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker.pid or 0, number)
    for _ in range(12):  # more than were read ahead
        next(stream)
    stream.close()
    assert not any(worker.is_alive() for worker in workers)


def test_exported_clips_come_back_and_unreadable_ones_are_named(folder: Path, tmp_path: Path) -> None:
    sources = [str(folder), "classed:heldout:2"]
    dataset = build_dataset(DataConfig(sources=sources, augment=False, **SMALL))
    assert export_clips(dataset, tmp_path / "out", rate=8, lossless=True) == 5
    assert set(dataset.quarantine) == {"my videos/b.mp4", "my videos/d.mp4"}
    videos = video_io.list_videos(tmp_path / "out")
    assert [video.name for video in videos[-2:]] == ["00005_disc_still.mp4", "00006_disc_slide_slow.mp4"]
    for number, video in zip((0, 2, 4, 5, 6), videos, strict=True):
        again = video_io.to_model_range(video_io.read_clip(video, 0, SMALL["num_frames"]).frames_THWC)
        assert torch.equal(again, dataset.get_this(number).video_CTHW)


def test_a_range_of_numbers_is_a_part_of_the_source() -> None:
    for kind, count in (("bundled", 96), ("synthetic", 30), ("classed", 30), ("duotone", 30)):
        whole, part = (
            build_dataset(DataConfig(sources=[f"{kind}:train:{numbers}"], augment=False, **SMALL))
            for numbers in (count, f"20-{count}")
        )
        assert part.names == whole.names[20:]
        assert torch.equal(part.get(1).video_CTHW, whole.get(21).video_CTHW)


def test_a_set_without_one_readable_clip_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").touch()
    dataset = build_dataset(DataConfig(sources=[str(tmp_path)], **SMALL))
    with pytest.raises(UserError, match="not one of 1 clips can be read .*bad.mp4: is empty"):
        dataset.get(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ["bundled:all"]}, "expected bundled:train, bundled:heldout or bundled:train:A-B"),
        ({"sources": ["synthetic:train"]}, "expected synthetic:train:N"),
        ({"sources": ["classed:train:9-9"]}, "number A up to B - 1"),
        ({"sources": ["nowhere/at/all"]}, "no such file or folder"),
        ({"sources": ["nowhere.csv"]}, "no such manifest"),
        ({"sources": []}, "holds no clip"),
        ({"repeat": [1, 2]}, "one count >= 0 for each of the 1 sources"),
        ({"crop_scale": 0.0}, "data.crop_scale=0.0"),
        ({"fps": -3.0}, "data.fps=-3.0"),
        ({"size": 0}, "data.size = 0"),
    ],
)
def test_mistakes_in_the_config_name_key_and_value(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_dataset(DataConfig(**changes))


def test_an_epoch_shows_every_clip_once_and_a_batch_may_span_two() -> None:
    dataset = build_dataset(DataConfig(sources=["synthetic:train:10"], augment=False, num_frames=1, size=8))
    names = [name for batch in batches(dataset, 4, seed=3, steps=5) for name in batch.names]
    assert [dataset.names.index(name) for name in names] == [*epoch_order(10, 3, 0), *epoch_order(10, 3, 1)]
    orders = [tuple(epoch_order(10, *key)) for key in ((3, 0), (3, 1), (4, 1))]
    assert len(set(orders)) == 3
    assert collections.Counter(names) == dict.fromkeys(dataset.names, 2)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores is the point here
def test_batches_do_not_depend_on_workers_or_on_where_the_run_resumes() -> None:
    cfg = DataConfig(sources=["bundled:train", "synthetic:train:20"], crop_scale=0.8, **SMALL)
    reference = list(batches(build_dataset(cfg, 7), 6, seed=1, start_step=17, steps=5))
    assert reference[0].video_BCTHW.shape == (6, 3, 4, 16, 16)
    for num_workers in (1, 4):
        again = list(batches(build_dataset(cfg, 7), 6, seed=1, start_step=17, num_workers=num_workers, steps=5))
        for one, other in zip(reference, again, strict=True):
            assert torch.equal(one.video_BCTHW, other.video_BCTHW)
            assert (one.names, one.labels, one.kinds) == (other.names, other.labels, other.kinds)
    resumed = next(itertools.islice(batches(build_dataset(cfg, 7), 6, seed=1, start_step=20), 1))
    assert torch.equal(resumed.video_BCTHW, reference[3].video_BCTHW)


def test_loading_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(batches(build_dataset(DataConfig(sources=["synthetic:train:4"], **SMALL)), 2, seed=1))
    assert torch.equal(torch.rand(1), expected)
