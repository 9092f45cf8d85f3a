"""Pixels as players show them: display matrix, pixel aspect, colour matrix, frame rate, and what is named instead."""

from __future__ import annotations

import importlib.util
import logging
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace

from tokenizer.data import cutting, video_io
from tokenizer.data.clip_stream import ClipRule, ClipWalk, find_sources
from tokenizer.data.files import fingerprint, list_videos
from tokenizer.data.readers import PyAvReader
from tokenizer.data.safe_decode import decode_clips
from tokenizer.data.video_io import VideoError, iter_clips, probe, read_clip_at
from tokenizer.router.results import ResultsFolder

BACKENDS = ("pyav", "decord") if importlib.util.find_spec("decord") else ("pyav",)
RATES = ("30000/1001", "24000/1001", "25", "9000000/299971", "119880/1001", "7.5")


def write(
    path: Path, frames_THWC: np.ndarray, codec: str = "libx264rgb", pixels: str = "rgb24", **settings: object
) -> Path:
    """One video. settings: of the stream or its codec context; `matrix` of display; `options` of the encoder."""
    options = {"qp": "0"} | dict(settings.pop("options", {}))
    rate, matrix, pts = settings.pop("rate", 10), settings.pop("matrix", None), settings.pop("pts", None)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], pixels
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, frame_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def noise(num_frames: int = 3, height: int = 24, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, height, width, 3), np.uint8)


@pytest.mark.parametrize("flip_columns", [False, True])
@pytest.mark.parametrize("flip_rows", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_all_eight_display_matrices(tmp_path: Path, transposed: bool, flip_rows: bool, flip_columns: bool) -> None:
    down, across = (-1 if flip else 1 for flip in (flip_rows, flip_columns))
    a, b, c, d = (0, down, across, 0) if transposed else (across, 0, 0, down)  # p' = a p + c q, q' = b p + d q
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    expected_THWC = noise().transpose(0, 2, 1, 3) if transposed else noise()
    expected_THWC = expected_THWC[:, ::down, ::across]
    path = write(tmp_path / "turned.mp4", noise(), matrix=matrix)
    clip = next(iter_clips(path, 3, None))
    np.testing.assert_array_equal(clip.frames_THWC, expected_THWC)
    assert (probe(path).height, probe(path).width) == expected_THWC.shape[1:3] and not clip.notes


def test_a_tilted_display_matrix_is_named(tmp_path: Path) -> None:
    matrix = [60000, 26000, 0, -26000, 60000, 0, 0, 0, 1 << 30]
    clip = next(iter_clips(write(tmp_path / "tilted.mp4", noise(), matrix=matrix), 3, None))
    np.testing.assert_array_equal(clip.frames_THWC, noise())
    assert "display matrix" in clip.notes[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aspect", [Fraction(64, 45), Fraction(12, 11), Fraction(10, 11), Fraction(2, 3)])
def test_a_circle_stays_a_circle(tmp_path: Path, aspect: Fraction, backend: str) -> None:
    y, x = (np.mgrid[0:960, 0:1280] + 0.5) / 4
    inside = ((x - 160) * float(aspect)) ** 2 + (y - 120) ** 2 < 79**2
    inside_HW = inside.reshape(240, 4, 320, 4).mean(axis=(1, 3))  # an edge as smooth as a camera's
    frames_THWC = np.repeat((255 * inside_HW).astype(np.uint8)[None, ..., None], 3, axis=3)
    path = write(tmp_path / "wide.mkv", frames_THWC, sample_aspect_ratio=aspect)
    for size in (96, 128):
        seen_HW = next(iter_clips(path, 1, size, backend=backend)).frames_THWC[0, ..., 0] / 255.0
        across, down = seen_HW[size // 2].sum(), seen_HW[:, size // 2].sum()  # diameters, to a part of a pixel
        assert across == pytest.approx(down, rel=0.006) and seen_HW[:, 0].max() < 0.1 > seen_HW[0].max()
        assert (seen_HW * np.arange(size)).sum() / seen_HW.sum() == pytest.approx((size - 1) / 2, abs=0.1)
    whole = next(iter_clips(path, 1, None, backend=backend)).frames_THWC
    info = probe(path, backend)
    assert whole.shape[1:3] == (info.height, info.width) == video_io.resize(frames_THWC, *whole.shape[1:3]).shape[1:3]
    assert info.width / info.height == pytest.approx(320 * float(aspect) / 240, abs=0.01)


@pytest.mark.parametrize(("height", "matrix"), [(720, Colorspace.ITU709), (480, Colorspace.ITU601)])
def test_untagged_video_has_the_matrix_that_players_take(tmp_path: Path, height: int, matrix: Colorspace) -> None:
    """Colours stored with the matrix of their size and no tag come back; the other matrix is 20 levels off."""
    colours = np.array([[200, 30, 40], [20, 180, 60], [30, 60, 220], [230, 200, 20]], np.uint8)
    frames_THWC = np.broadcast_to(colours.repeat(16, axis=0)[None, None], (1, height, 64, 3))
    path = tmp_path / "hd.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = height, 64, "yuv444p"
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frames_THWC[0]), format="rgb24")
        frame = rgb.reformat(format="yuv444p", dst_colorspace=matrix)
        frame.colorspace = 2  # unspecified
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    back_THWC = next(iter_clips(path, 1, None)).frames_THWC
    assert np.abs(back_THWC.astype(int) - frames_THWC).max() <= 4


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_named_and_reaches_the_record(
    tmp_path: Path, transfer: int, name: str, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/hdr.mp4", noise(), "libx264", "yuv420p", color_trc=transfer)
    walk = ClipWalk(find_sources(tmp_path / "in", lambda path: False), ClipRule(3, 16), num_readers=0)
    (clip,) = walk("reading")
    assert clip.decoded is not None and name in clip.decoded.notes[0]
    assert (
        walk.notes == {"hdr.mp4": list(clip.decoded.notes)}
        and f"note on hdr.mp4: HDR: {name}" in capfd.readouterr().err
    )


def test_decord_refuses_ten_bits(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    path = write(tmp_path / "ten.mkv", noise(), "ffv1", "yuv420p10le", options={"qp": "0"})
    next(iter_clips(path, 3))
    with pytest.raises(VideoError, match="more than 8 bits a colour, which decord decodes wrongly; use backend='pyav'"):
        next(iter_clips(path, 3, backend="decord"))


@pytest.mark.parametrize("rate", RATES)
def test_frame_rates_are_exact_in_written_files(tmp_path: Path, rate: str) -> None:
    exact = Fraction(rate)
    video_io.write_video(tmp_path / "out.mp4", noise(8), float(exact))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].average_rate == exact


def test_raw_dv_has_its_own_rate_not_that_of_the_clock(tmp_path: Path) -> None:
    frames_THWC = np.full((4, 480, 720, 3), 90, np.uint8)
    write(tmp_path / "tape.dv", frames_THWC, "dvvideo", "yuv411p", rate=Fraction(30000, 1001), options={})
    info = probe(tmp_path / "tape.dv")
    assert info.fps == pytest.approx(29.97, abs=0.01)
    assert (info.height, info.width) == (round(480 * 9 / 8), 720)  # the pixels of DV are 8:9


def test_a_file_with_fewer_pictures_than_its_header_counts_is_noted(tmp_path: Path) -> None:
    path = write(tmp_path / "whole.avi", noise(20), "ffv1", "bgr0", options={})
    with av.open(str(path)) as container:
        end = list(container.streams.video[0].index_entries)[12].pos
    (tmp_path / "cut.avi").write_bytes(path.read_bytes()[:end])
    clips = iter_clips(tmp_path / "cut.avi", 4, 16, all_clips=True)
    notes = []
    try:
        while True:
            next(clips)
    except StopIteration as end:
        notes += end.value.notes
    assert len(notes) == 1 and notes[0].startswith("truncated: the header counts 20 pictures, the file holds 12")
    whole = iter_clips(path, 4, 16, all_clips=True)
    assert len(list(whole)) == 5
    assert any("truncated" in note for note in read_clip_at(tmp_path / "cut.avi", 0.0, 4, 16).notes)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_random_clip_reads_a_part_of_the_file_and_opens_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"long{suffix}"
    write(path, noise(240, 96, 128), "libx264", "yuv420p", options={"g": "12", "qp": "10"})
    every = np.concatenate([clip.frames_THWC for clip in iter_clips(path, 1, 32, all_clips=True)])
    opened = []
    original = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(a) or original(*a, **k))
    before = _bytes_read()
    clip = read_clip_at(path, 0.8, 8, 32, any_phase=True)
    read = _bytes_read() - before
    assert clip.start == int(0.8 * 233) and len(opened) == 1
    assert read < path.stat().st_size / 3, (read, path.stat().st_size)
    np.testing.assert_array_equal(clip.frames_THWC, every[clip.start : clip.start + 8])
    for position in (0.0, 0.37, 0.999):
        fine, coarse = (read_clip_at(path, position, 8, 32, fps, any_phase=True) for fps in (20.0, 3.0))
        assert fine.num_padded == coarse.num_padded == 0
        first = position * (24 - 1e-3 - 7 / 3)
        shown = [int((first + k / 3 + 1e-3) * 10) for k in range(8)]
        np.testing.assert_array_equal(coarse.frames_THWC, every[shown])


@pytest.mark.parametrize(
    ("name", "codec", "options", "irregular"),
    [
        ("b.mkv", "libx264", {"bf": "3"}, True),
        ("open.ts", "libx264", {"bf": "3", "x264-params": "open-gop=1"}, False),
        ("b.mpg", "mpeg2video", {"bf": "2"}, False),
        ("b.flv", "libx264", {"bf": "3"}, False),
        ("plain.wmv", "wmv2", {}, False),
        ("open.mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1"}, True),
        ("raw.h264", "libx264", {"bf": "3"}, False),
    ],
)
def test_a_clip_at_a_place_equals_the_full_decode(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], irregular: bool
) -> None:
    """Containers without a list of their pictures, and MP4 with a variable rate and pictures out of order."""
    steps = np.random.default_rng(1).integers(20, 90, 72)
    timing = {"pts": (np.cumsum(steps) - steps[0]).tolist()} if irregular else {}
    options |= {"g": "9"} | ({"qp": "10"} if codec == "libx264" else {"b": "2M"})
    path = write(tmp_path / name, noise(72, 48, 64), codec, "yuv420p", rate=25, options=options, **timing)
    for fps in (7.0, None):
        every = np.concatenate([clip.frames_THWC for clip in iter_clips(path, 1, None, fps, all_clips=True)])
        for start in (0, 1, len(every) // 2, len(every) - 5):
            clip = video_io.read_clip(path, start, 5, fps=fps)
            np.testing.assert_array_equal(clip.frames_THWC, every[start : start + 5])
        with pytest.raises(video_io.VideoError, match=f"has {len(every)} frames, so none can start at"):
            video_io.read_clip(path, len(every), 5, fps=fps)
    for position in (0.0, 0.37, 0.999):
        found = read_clip_at(path, position, 5, any_phase=True).frames_THWC
        assert any(np.array_equal(found, every[k : k + 5]) for k in range(len(every) - 4))
    is_listed = name.endswith(".mp4")
    assert clip.notes == () if is_listed else "read whole: the pictures of" in clip.notes[0]


def test_a_clip_at_the_start_reads_the_start_and_an_irregular_mp4_its_header(tmp_path: Path) -> None:
    pts = np.arange(240) * 40 + np.arange(240) % 7
    settings = {"pts": pts.tolist(), "options": {"g": "12", "bf": "3", "qp": "10"}}
    for name, start in (("a.mkv", 0), ("a.mp4", 150)):
        path = write(tmp_path / name, noise(240, 48, 64), "libx264", "yuv420p", **settings)
        before = _bytes_read()
        assert video_io.read_clip(path, start, 8).notes == ()
        assert _bytes_read() - before < path.stat().st_size * 0.4


def test_a_clip_that_time_alone_does_not_find_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header may promise more time than there are pictures."""
    path = write(tmp_path / "long.mkv", noise(40), "libx264", "yuv420p", options={"g": "8", "qp": "10"})
    expected = read_clip_at(path, 0.9, 8, 16, any_phase=True)
    near = cutting._near

    def promised_too_much(reader: PyAvReader, *rest: float) -> None:
        reader.duration = 8.0
        assert near(reader, *rest) is None

    monkeypatch.setattr(cutting, "_near", promised_too_much)
    found = read_clip_at(path, 0.9, 8, 16, any_phase=True)
    assert found.start == expected.start and found.num_padded == 0
    np.testing.assert_array_equal(found.frames_THWC, expected.frames_THWC)


def _bytes_read() -> int:
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


@pytest.mark.parametrize("bframes", ["0", "3"])
def test_variable_frame_rate_has_the_same_clips_by_seek_and_by_stream(tmp_path: Path, bframes: str) -> None:
    pts = np.cumsum(np.random.default_rng(1).integers(20, 90, 60))
    options = {"g": "10", "bf": bframes, "qp": "4"}
    path = write(tmp_path / "phone.mp4", noise(60), "libx264", "yuv420p", pts=(pts - pts[0]).tolist(), options=options)
    for fps in (None, 7.0):
        frames = np.concatenate([c.frames_THWC for c in iter_clips(path, 1, None, fps, all_clips=True)])
        for start in (0, 9, len(frames) - 5):
            np.testing.assert_array_equal(
                video_io.read_clip(path, start, 5, fps=fps).frames_THWC, frames[start : start + 5]
            )


def test_at_a_given_rate_every_frame_of_the_file_is_seen_in_training(tmp_path: Path) -> None:
    levels_T = np.arange(75) * 3
    frames_THWC = np.broadcast_to(levels_T[:, None, None, None], (75, 16, 16, 3)).astype(np.uint8)
    path = write(tmp_path / "count.mp4", frames_THWC, rate=25)

    def seen(any_phase: bool) -> set[int]:
        positions = np.random.default_rng(0).random(600)
        clips = (read_clip_at(path, position, 4, None, 3.0, any_phase=any_phase) for position in positions)
        return {int(level) // 3 for clip in clips for level in clip.frames_THWC[:, 0, 0, 0]}

    assert seen(any_phase=False) == {int(k * 25 / 3) for k in range(9)}
    assert seen(any_phase=True) == set(range(75))


def test_special_files_are_refused_without_reading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    (tmp_path / "itself.mp4").symlink_to("itself.mp4")
    assert not ResultsFolder(tmp_path / "out").holds(tmp_path / "itself.mp4")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    for path in list_videos(tmp_path):
        reasons = {"gone.mp4": "does not exist", "itself.mp4": "Too many levels of symbolic links"}
        reason = reasons.get(path.name, "is not a regular file")
        for read in (lambda p: list(iter_clips(p)), lambda p: list(decode_clips(p)), fingerprint):
            with pytest.raises(VideoError, match=reason):
                read(path)
    skipped = ClipWalk(find_sources(tmp_path, lambda path: False), ClipRule(4, 16), num_readers=2)
    assert not list(skipped("reading")) and len(skipped.skipped) == 4


def test_what_a_folder_holds_besides_videos_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("._a.mp4", "a.mp4", "b.qt", "c.HEVC", "notes.txt", "x.json", "y.json", "README"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in list_videos(tmp_path)] == ["a.mp4", "b.qt", "c.HEVC"]
    (line,) = caplog.messages
    assert "passed over 5 entries" in line and all(
        part in line for part in ("2 .json", "1 .txt", "1 ._ files", "1 without")
    )


def test_a_path_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="File name too long"):
        probe(tmp_path / ("x" * 300 + ".mp4"))
