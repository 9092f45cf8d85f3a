"""Data sources at any size: names that tell clips apart, tables of millions of rows, tar shards, any start method."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tarfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.common.errors import UserError
from tokenizer.data import sources, video_table
from tokenizer.data.clip_store import FrameCache
from tokenizer.data.clips import ClipDataset, DataConfig, build_dataset, build_datasets
from tokenizer.data.files import Span
from tokenizer.data.loader import batches, check_shared_memory
from tokenizer.data.video_io import VideoError, list_videos, write_video
from tokenizer.data.video_table import ManifestRow, Strings, VideoTable, write_rows
from tokenizer.router.reward import QualityTable
from tokenizer.router.train import TableClips

SMALL = {"num_frames": 4, "size": 16, "augment": False}


def grey(path: Path, level: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.full((6, 24, 32, 3), level, np.uint8), 8, lossless=True)
    return path


def level_of(dataset: ClipDataset, index: int) -> int:
    return int(dataset.get_this(index).frames_CTHW[0, 0, 8, 8])


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Two folders of one name whose clips have the same names."""
    for folder, level in (("a", 50), ("b", 150)):
        for number in range(2):
            grey(tmp_path / folder / f"clips/{number:04d}.mp4", level + number)
    return [str(tmp_path / "a/clips"), str(tmp_path / "b/clips")]


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=9), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_strings_come_back_and_hash_alike_only_if_equal(texts: list[str]) -> None:
    strings = Strings.of(texts)
    assert list(strings) == texts and strings[-1] == texts[-1] and strings[1:3] == texts[1:3]
    hashes = strings.hashes()
    assert len(set(hashes.tolist())) == len(set(texts))
    assert Strings.of(texts[::-1]).hashes().tolist() == hashes[::-1].tolist()


def test_hashes_do_not_depend_on_where_a_string_is(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"folder/{i:05d}.mp4" for i in range(50)]
    whole = Strings.of(texts).hashes()
    monkeypatch.setattr(video_table, "_HASHED_ROWS", 7)
    assert Strings.of(texts).hashes().tolist() == whole.tolist()


def test_clips_of_one_name_in_two_sources_are_told_apart(two: list[str]) -> None:
    dataset = build_dataset(DataConfig(two, repeat=[2, 1], **SMALL))
    names = ["clips/0000.mp4", "clips/0001.mp4"]
    assert dataset.names == [*names, *names, *(f"{name}#2" for name in names)]
    assert [level_of(dataset, i) for i in range(6)] == [50, 51, 50, 51, 150, 151]
    (Path(two[0]) / "0001.mp4").write_bytes(b"")
    assert dataset.get(1).name == "clips/0000.mp4" and list(dataset.quarantine) == ["clips/0001.mp4"]
    assert dataset.get(5).name == "clips/0001.mp4#2"
    assert [one.names[0] for one in build_datasets(DataConfig(two, **SMALL))] == ["clips/0000.mp4", "clips/0000.mp4#2"]
    assert build_dataset(DataConfig([two[0], two[0]], **SMALL)).names[2] == names[0], "the same clip has one name"


def test_every_kind_of_source_can_be_sent_to_another_process(two: list[str], tmp_path: Path) -> None:
    write_rows(tmp_path / "m.csv", [ManifestRow("a/clips/0001.mp4", "left")])
    _tar(tmp_path / "s.tar", {"x.mp4": Path(two[0], "0000.mp4").read_bytes()})
    every = [two[0], str(tmp_path / "m.csv"), str(tmp_path / "s.tar"), "bundled:heldout:2", "classed:train:3"]
    dataset = build_dataset(DataConfig(every, **SMALL))
    again = pickle.loads(pickle.dumps(dataset))
    assert again.names == dataset.names and again.labels == dataset.labels
    for index in range(len(dataset)):
        assert torch.equal(again.get(index).frames_CTHW, dataset.get(index).frames_CTHW)


def test_batches_are_the_same_under_spawn() -> None:
    dataset = build_dataset(DataConfig(["bundled:train:4", "classed:train:4"], num_frames=4, size=16))
    (expected,) = batches(dataset, 8, seed=0, steps=1)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        (batch,) = batches(dataset, 8, seed=0, steps=1, num_workers=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert torch.equal(batch.frames_BCTHW, expected.frames_BCTHW) and batch.names == expected.names


def test_a_large_manifest_is_read_once_then_mapped(
    two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "KEPT_BYTES", 0)
    manifest = tmp_path / "m.csv"
    write_rows(manifest, [ManifestRow(f"a/clips/{i:04d}.mp4", "left" if i else "") for i in range(2)])
    first = build_dataset(DataConfig([str(manifest)], **SMALL))
    monkeypatch.setattr(sources, "read_rows", lambda path: pytest.fail("the list was read again"))
    second = build_dataset(DataConfig([str(manifest)], **SMALL))
    assert second.names == first.names == ["a/clips/0000.mp4", "a/clips/0001.mp4"] and second.labels == [None, "left"]
    assert isinstance(second._parts[0].source.table.paths.block, np.memmap)
    assert len(pickle.dumps(second)) < 2000 and pickle.loads(pickle.dumps(second)).names == first.names
    monkeypatch.undo()
    monkeypatch.setattr(sources, "KEPT_BYTES", 0)
    write_rows(manifest, [ManifestRow("a/clips/0001.mp4", "rght")])  # another content
    assert build_dataset(DataConfig([str(manifest)], **SMALL)).labels == ["rght"]
    assert len(list(tmp_path.glob(".m.csv.index-*"))) == 1, "the outdated index is gone"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be refused nothing")
def test_an_index_that_cannot_be_kept_is_built_in_memory(two: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Path("/proc/none/m.csv")
    table = video_table.kept_table(manifest, "x", lambda: VideoTable.of([("a.mp4", "", "", None)]))
    assert table.path(0) == "a.mp4"


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_shards_give_the_pixels_of_the_files_in_them(two: list[str], tmp_path: Path) -> None:
    a, b = (Path(source, "0000.mp4").read_bytes() for source in two)
    up = b'{"label": "up"}'
    _tar(
        tmp_path / "c-00.tar",
        {"001.mp4": a, "001.cls": b"7", "d/002.json": up, "d/002.mp4": b},
    )
    _tar(tmp_path / "c-01.tar", {"001.mp4": b, "readme.txt": b"words"})
    dataset = build_dataset(DataConfig([str(tmp_path / "c-{00..01}.tar")], **SMALL))
    assert dataset.names == ["c-00.tar/001.mp4", "c-00.tar/d/002.mp4", "c-01.tar/001.mp4"]
    assert dataset.labels == ["7", "up", None]
    assert [level_of(dataset, i) for i in range(3)] == [50, 150, 150]
    path, span = dataset.file(1)
    assert path.read_bytes()[span.offset : span.offset + span.size] == b
    assert dataset.fingerprint(1) == dataset.fingerprint(2) != dataset.fingerprint(0)
    (tmp_path / "broken.tar").write_bytes(b"words" * 300)
    for source, message in (("c-{00..05}.tar", "no such shard .4 of 6"), ("broken.tar", "is no tar file")):
        with pytest.raises(UserError, match=message):
            build_dataset(DataConfig([str(tmp_path / source)], **SMALL))


def test_a_table_takes_few_bytes_a_video() -> None:
    table = VideoTable.of((f"train/{i:08d}.mp4", f"class {i % 10}", "", None) for i in range(10_000))
    assert table.num_bytes < 10_000 * (len("train/00000000.mp4") + 12) + 500
    assert (table.path(9999), table.label(9999), table.span(9999)) == ("train/00009999.mp4", "class 9", None)
    shard = VideoTable.of(("/x/s.tar", "", f"{i:08d}.mp4", Span(512 * i, 100)) for i in range(10_000))
    assert shard.num_bytes < 10_000 * (len("00000000.mp4") + 36) + 500 and shard.span(3) == Span(1536, 100)


def test_small_shared_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat = namedtuple("stat", "f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda folder: stat(64, 2**20))
    check_shared_memory(2**20, 31, str(tmp_path))
    with pytest.raises(UserError, match=r"64 MiB free, and 32 data workers may fill 65 MiB: .*shm-size"):
        check_shared_memory(2**20, 32, str(tmp_path))


def test_batches_travel_as_bytes() -> None:
    (batch,) = batches(build_dataset(DataConfig(["bundled:train:2"], **SMALL)), 2, seed=0, steps=1)
    assert batch.frames_BCTHW.dtype == torch.uint8
    video_BCTHW = batch.video("cpu")
    assert torch.equal(video_BCTHW, batch.frames_BCTHW.float() / 255) and torch.equal(batch.video_BCTHW, video_BCTHW)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.txt", "clips/a.mp4\nclips/b.mp4\n", "this is a list of videos; a list must be a manifest: a .csv"),
        ("tab.tsv", "path\tlabel\nclips/a.mp4\tx\n", "this is a list of videos"),
        ("spaces.csv", "clips/a.mp4 0\nclips/b.mp4 1\n", "separated by spaces"),
        ("semi.csv", "path;label\nclips/a.mp4;x\n", "separated by ';'"),
        ("tabs.csv", "path\tlabel\nclips/a.mp4\tx\n", "separated by tabs"),
        (
            "other.csv",
            "video_path,label\nclips/a.mp4,x\n",
            "the column path and at least one row; found 'video_path, label'",
        ),
    ],
)
def test_lists_of_other_forms_are_called_what_they_are(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        build_dataset(DataConfig([str(tmp_path / name)], **SMALL))
    with pytest.raises(UserError, match="this is a list of videos"):
        list_videos(tmp_path / name)


def _table(dataset: ClipDataset, with_files: bool = True) -> QualityTable:
    score = torch.rand(len(dataset), 9, generator=torch.Generator().manual_seed(0))
    files = [dataset.fingerprint(i) for i in range(len(dataset))] if with_files else []
    return QualityTable(score, score.clone(), score.clone(), dataset.names, (2, 4, 8), 2, {}, files)


def test_a_table_finds_its_own_clips_among_others_of_their_names(two: list[str], tmp_path: Path) -> None:
    config = DataConfig(two, **SMALL)
    _table(build_dataset(config)).save(tmp_path / "table.safetensors")
    table = QualityTable.load(tmp_path / "table.safetensors")
    clips = TableClips(config, 0, table, "table")
    clips.keep_in(tmp_path / "kept")
    assert [level_of(clips, i) for i in range(4)] == [50, 51, 150, 151]
    grey(Path(two[1]) / "0000.mp4", 99)
    assert [level_of(clips, i) for i in range(4)] == [50, 51, 150, 151], "kept clips are the ones that were rated"
    with pytest.raises(VideoError, match="not the file that was rated"):
        TableClips(config, 0, table, "table").get_this(2)
    assert level_of(TableClips(config, 0, _table(build_dataset(config), with_files=False), "old table"), 2) == 99


def test_kept_frames_come_back_and_damage_is_decoded_again(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 5), np.uint8)
    cache = pickle.loads(pickle.dumps(FrameCache(tmp_path, 3, clip.shape, {"a": 1})))
    assert cache.get(1) is None
    cache.put(1, clip)
    again = FrameCache(tmp_path, 3, clip.shape, {"a": 1})
    np.testing.assert_array_equal(again.get(1), clip)
    assert (
        again.get(0) is None and again.get(2) is None and FrameCache(tmp_path, 3, clip.shape, {"a": 2}).get(1) is None
    )
    with open(cache.path, "r+b") as file:
        file.seek(cache.path.stat().st_size - 1)
        file.write(bytes([clip.flat[-1] ^ 1]))
    assert cache.get(1) is None
