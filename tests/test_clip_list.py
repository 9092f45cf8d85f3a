"""Clip lists of protocols on small trees with the true layout and names; lossless files and the others."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from evaluations.clip_list import list_clips
from evaluations.given_clips import find_frames, read_frames, why_lossy
from evaluations.protocols import PROTOCOLS, Protocol
from tokenizer.common.errors import UserError
from tokenizer.data.video_io import DecodedClip, VideoError, write_video


def numbered(num: int, side: int = 32) -> np.ndarray:
    """Frame t is grey of level 4 t, so that a clip shows where it starts."""
    return np.broadcast_to((4 * np.arange(num, dtype=np.uint8))[:, None, None, None], (num, side, side, 3)).copy()


def video(path: Path, num: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, numbered(num), 25, lossless=True)
    return path


def first_frame(clip: DecodedClip) -> int:
    assert clip.frames_THWC.shape == (16, 32, 32, 3)
    return round(float(clip.frames_THWC[0].mean()) / 4)


def small(name: str, **fields: object) -> Protocol:
    return replace(PROTOCOLS[name], **{"size": 32, "listed": None, **fields})  # type: ignore[arg-type]


@pytest.fixture
def ucf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """UCF-101 as it is unpacked: class folders, lists beside them, HandStandPushups in the file name only."""
    root = tmp_path / "UCF-101"
    video(root / "YoYo/v_YoYo_g08_c01.avi", 40)
    video(root / "HandstandPushups/v_HandStandPushups_g08_c02.avi", 50)
    video(root / "YoYo/v_YoYo_g01_c01.avi", 20)  # of the test list
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    names = ("YoYo/v_YoYo_g08_c01.avi 101", "HandstandPushups/v_HandstandPushups_g08_c02.avi 37")
    (lists / "trainlist01.txt").write_text("\r\n".join([*names, "Punch/v_Punch_g09_c01.avi 71", ""]))
    monkeypatch.setenv("UCF_ROOT", str(root))
    return root


def test_ucf101_by_its_official_list(ucf: Path) -> None:
    clips = list_clips(small("ucf101-recon-train", listed=9537))
    assert [(clip.label, clip.start) for clip in clips.clips] == [("YoYo", 0), ("HandstandPushups", 0)]
    assert clips.notes == ["the list has 3 videos, the official one 9537", "1 of 3 listed videos are missing"]
    assert [first_frame(clip.read()) for clip in clips.clips] == [0, 0]
    assert clips.facts()["missing_videos"] == 1


def test_random_starts_are_the_same_every_time(ucf: Path) -> None:
    starts = [[first_frame(clip.read()) for clip in list_clips(small("ucf101-recon-train-larp")).clips] for _ in "ab"]
    assert starts[0] == starts[1] and any(starts[0])
    other = list_clips(small("ucf101-recon-train-larp", seed=1))
    assert [first_frame(clip.read()) for clip in other.clips] != starts[0]


def test_windows_do_not_overlap_and_carry_the_label(ucf: Path, tmp_path: Path) -> None:
    (ucf / "YoYo/v_YoYo_g08_c01.avi").write_bytes(b"damaged")
    video(ucf / "Punch/v_Punch_g09_c01.avi", 16)
    clips = list_clips(small("ucf101-c2v-10k"), cache=tmp_path / "cache")
    assert [(clip.label, clip.start) for clip in clips.clips] == [
        ("HandstandPushups", 0), ("HandstandPushups", 16), ("HandstandPushups", 32), ("Punch", 0)
    ]  # fmt: skip
    assert [first_frame(clip.read()) for clip in clips.clips] == [0, 16, 32, 0]
    assert clips.notes[0].startswith("1 videos cannot be read") and "asks for 10000" in clips.notes[1]

    video(ucf / "Punch/v_Punch_g09_c01.avi", 15)
    assert "1 videos have fewer than 16 frames and no window" in list_clips(small("ucf101-c2v-10k")).notes
    video(ucf / "HandstandPushups/v_HandStandPushups_g08_c02.avi", 3)
    with pytest.raises(UserError, match="not one of 3 videos"):
        list_clips(small("ucf101-c2v-10k"))
    video(ucf / "HandstandPushups/v_HandStandPushups_g08_c02.avi", 50)

    drawn = [list_clips(small("ucf101-c2v-10k", count=2), cache=tmp_path / "cache") for _ in "ab"]
    assert len({clip.name for clip in drawn[0].clips}) == 2 and drawn[0].sha256 == drawn[1].sha256 != clips.sha256


def test_a_smaller_count_is_drawn_from_the_whole_list(tmp_path: Path) -> None:
    """A list may be sorted by class: its first clips would be of one."""
    for i in range(12):
        video(tmp_path / f"in/class {i // 6}/{i:02d}.mp4", 16)
    labels = [
        {clip.label for clip in list_clips(small("folder-recon", count=6, seed=seed), tmp_path / "in").clips}
        for seed in (0, 1)
    ]
    assert {"class 0", "class 1"} in labels
    drawn = [[c.name for c in list_clips(small("folder-recon", count=6), tmp_path / "in").clips] for _ in "ab"]
    assert drawn[0] == drawn[1] == sorted(drawn[0])


def test_k600_list_against_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video(tmp_path / "val/-abc_000004_000014.mp4", 33)
    listed = tmp_path / "validate.csv"
    with open(listed, "w", newline="") as file:
        rows = [["label", "youtube_id", "time_start", "time_end", "split"], ["tai chi", "-abc", 4, 14, "val"]]
        csv.writer(file).writerows([*rows, ["yoga, hot", "gone", 1, 11, "val"]])
    protocol = small("k600-fp-50k-64px")
    for name, value in (("K600_ROOT", tmp_path / "val"), ("K600_VAL_FILE", listed)):
        with pytest.raises(UserError, match=name):
            list_clips(protocol)
        monkeypatch.setenv(name, str(value))
    clips = list_clips(protocol)
    assert [(clip.name, clip.label) for clip in clips.clips] == [
        ("-abc_000004_000014.mp4@0", "tai chi"), ("-abc_000004_000014.mp4@16", "tai chi")
    ]  # fmt: skip
    assert (protocol.condition_frames, protocol.score_size, clips.num_missing) == (5, 64, 1)


def test_folders_and_manifests(tmp_path: Path) -> None:
    for i in range(3):
        video(tmp_path / f"in/class {i}/a.mp4", 16 + i)
    protocol = small("folder-recon")
    assert [clip.label for clip in list_clips(protocol, tmp_path / "in").clips] == ["class 0", "class 1", "class 2"]
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,label\nin/class 1/a.mp4,x\ngone.mp4,y\nin/class 1/a.mp4,z\n")
    clips = list_clips(protocol, manifest)
    assert clips.notes[0] == "1 rows of the list repeat a video, which is taken once"
    assert [(clip.name, clip.label) for clip in clips.clips] == [("in/class 1/a.mp4", "x")] and clips.num_missing == 1
    assert len(list_clips(replace(protocol, count=2), tmp_path / "in").clips) == 2
    before = list_clips(protocol, tmp_path / "in")
    video(tmp_path / "in/class 1/a.mp4", 9)
    after = list_clips(protocol, tmp_path / "in")  # another video of the same name: the same list of other files
    assert after.sha256 == before.sha256 and after.files_sha256 != before.files_sha256
    assert [clip.read().num_padded for clip in after.clips] == [0, 7, 0]
    (tmp_path / "in/class 0/a.mp4").write_bytes(b"")
    with pytest.raises(VideoError):
        list_clips(protocol, tmp_path / "in").clips[0].read()
    given = list_clips(small("ucf101-recon-train"), tmp_path / "in")
    assert given.notes == ["the list is --data in, not looked up in the data set's own"]
    with pytest.raises(UserError, match="--data"):
        list_clips(protocol)
    with pytest.raises(UserError, match="brings its own clips"):
        list_clips(PROTOCOLS["mini-recon"], tmp_path)


def test_only_lossless_files_are_scored(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), np.uint8)
    write_video(tmp_path / "a_lossless.mp4", frames, 25, lossless=True)
    write_video(tmp_path / "b_lossy.mp4", frames, 25)
    np.save(tmp_path / "c.npy", frames)
    with av.open(str(tmp_path / "d.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    lossless, lossy, array, ffv1 = find_frames(tmp_path)
    for path in (lossless, array, ffv1):
        assert np.array_equal(read_frames(path, 16), frames)
    with pytest.raises(UserError, match="not lossless .*yuv420p"):
        read_frames(lossy, 16)
    assert not np.array_equal(read_frames(lossy, 16, force=True), frames)
    with av.open(str(tmp_path / "near.mp4"), "w") as container:  # RGB, but quantised
        stream = container.add_stream("libx264rgb", rate=25, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frames[0], format="rgb24")))
        container.mux(stream.encode())
    assert "quantiser" in str(why_lossy(tmp_path / "near.mp4"))

    (tmp_path / "text.npy").write_text("words")
    np.save(tmp_path / "float.npy", frames.astype(np.float32))
    np.save(tmp_path / "short.npy", frames[:8])
    write_video(tmp_path / "short.mp4", frames[:8], 25, lossless=True)
    for name, words in (
        ("text.npy", "array"),
        ("float.npy", "float32"),
        ("short.npy", "8 frames"),
        ("short.mp4", "8 fr"),
    ):
        with pytest.raises(UserError, match=words):
            read_frames(tmp_path / name, 16)
