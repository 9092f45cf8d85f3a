"""Real files of many kinds, written with PyAV, through tokenizer/data/video_io.py with both decoders."""

import argparse
import importlib.util
import os
import tracemalloc
import wave
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from tokenizer.common.cli import frame_rate
from tokenizer.common.errors import UserError
from tokenizer.data import video_io
from tokenizer.data.video_io import VideoError, resize_center_crop

BACKENDS = tuple(name for name, module in (("pyav", "av"), ("decord", "decord")) if importlib.util.find_spec(module))


class Kind(NamedTuple):
    name: str
    codec: str
    pixels: str
    fps: int
    height: int
    width: int
    options: dict[str, str]


KINDS = (
    Kind("plain.mp4", "libx264", "yuv420p", 30, 48, 64, {}),
    Kind("portrait, short GOP.mov", "libx264", "yuv420p", 24, 80, 46, {"g": "5"}),
    Kind("kamera é.avi", "mpeg4", "yuv420p", 25, 48, 64, {"g": "6"}),
    Kind("b-frames.avi", "libx264", "yuv420p", 25, 48, 64, {"bf": "2"}),
    Kind("odd.mkv", "ffv1", "bgr0", 10, 51, 77, {}),
    Kind("web.webm", "libvpx-vp9", "yuv420p", 12, 48, 64, {"deadline": "realtime", "cpu-used": "8"}),
)
NUM_FRAMES = 37


def numbered_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frame t has the mean grey level 20 + 5 t over a gradient, so its number survives lossy compression."""
    ramp_HW = np.linspace(-15, 15, width)[None] * np.linspace(-1, 1, height)[:, None]
    level_T = 20 + 5 * np.arange(num_frames)
    return np.repeat((level_T[:, None, None] + ramp_HW)[..., None], 3, axis=3).round().astype(np.uint8)


def numbers_of(frames_THWC: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 20) / 5) for frame in frames_THWC]


def write(path: Path, kind: Kind, num_frames: int, rotation: int = 0, index_first: bool = False) -> Path:
    with av.open(str(path), "w", options={"movflags": "faststart"} if index_first else {}) as container:
        stream = container.add_stream(kind.codec, rate=kind.fps, options=kind.options)
        stream.height, stream.width, stream.pix_fmt = kind.height, kind.width, kind.pixels
        if rotation:
            stream.set_display_rotation(rotation)
        for frame_HWC in numbered_frames(num_frames, kind.height, kind.width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for kind in KINDS:
        write(root / kind.name, kind, NUM_FRAMES)
    return root


def all_frames(path: Path, backend: str = "pyav", **options: object) -> np.ndarray:
    clips = list(video_io.iter_clips(path, num_frames=1, size=None, all_clips=True, backend=backend, **options))
    return np.concatenate([clip.frames_THWC for clip in clips])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_file_streams_in_order_and_seeks_to_the_same_pixels(folder: Path, kind: Kind) -> None:
    path = folder / kind.name
    frames_THWC = all_frames(path)
    assert numbers_of(frames_THWC) == list(range(NUM_FRAMES))
    assert frames_THWC.shape == (NUM_FRAMES, kind.height, kind.width, 3)
    info = video_io.probe(path)
    assert (info.height, info.width, info.fps) == (kind.height, kind.width, kind.fps)
    assert info.num_frames in (None, NUM_FRAMES)
    for start in (0, 1, 7, 13, 24, 29):
        clip = video_io.read_clip(path, start, 8)
        assert (clip.start, clip.num_padded) == (start, 0)
        np.testing.assert_array_equal(clip.frames_THWC, frames_THWC[start : start + 8])


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_decoders_give_identical_pixels(folder: Path, kind: Kind, backend: str) -> None:
    path = folder / kind.name
    np.testing.assert_array_equal(all_frames(path, backend), all_frames(path))
    np.testing.assert_array_equal(all_frames(path, backend, fps=7), all_frames(path, fps=7))
    ours, theirs = (video_io.read_clip(path, 20, 16, 32, backend=name) for name in ("pyav", backend))
    np.testing.assert_array_equal(ours.frames_THWC, theirs.frames_THWC)
    assert (ours.start, ours.num_padded, ours.fps) == (theirs.start, theirs.num_padded, theirs.fps)


def test_rotated_phone_video_comes_out_upright(tmp_path: Path) -> None:
    kind = Kind("phone.mp4", "libx264rgb", "rgb24", 10, 48, 64, {"qp": "0"})
    path = write(tmp_path / kind.name, kind, 3, rotation=90)
    expected_THWC = np.rot90(numbered_frames(3, 48, 64), axes=(1, 2))
    np.testing.assert_array_equal(all_frames(path), expected_THWC)
    assert (video_io.probe(path).height, video_io.probe(path).width) == (64, 48)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_decord_refuses_what_it_would_get_wrong(tmp_path: Path, backend: str) -> None:
    with pytest.raises(VideoError, match="rotated, which decord decodes wrongly"):
        all_frames(write(tmp_path / "phone.mp4", KINDS[0], 3, rotation=90), backend)


@pytest.mark.parametrize(("name", "fps", "step"), [("plain.mp4", 3, 10), ("plain.mp4", 15, 2), ("odd.mkv", 20, 0.5)])
def test_requested_rate_shows_the_frame_on_screen(folder: Path, name: str, fps: float, step: float) -> None:
    numbers = numbers_of(all_frames(folder / name, fps=fps))
    assert numbers == [int(k * step) for k in range(len(numbers))]
    assert len(numbers) == -(-NUM_FRAMES // step)
    for start in (0, len(numbers) // 2):
        clip = video_io.read_clip(folder / name, start, 2, fps=fps)
        assert numbers_of(clip.frames_THWC) == numbers[start : start + 2]
        assert clip.fps == fps


def test_clips_of_a_file_and_the_rest_that_is_dropped(folder: Path) -> None:
    path = folder / "plain.mp4"
    assert [clip.start for clip in video_io.iter_clips(path, size=32, all_clips=True)] == [0, 16]
    assert [clip.start for clip in video_io.iter_clips(path, size=32)] == [0]
    starts = {video_io.read_clip_at(path, position, 16, 32).start for position in (0.0, 0.5, 0.999)}
    assert starts == {0, 11, 21}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_frames", [1, 5])
def test_short_file_repeats_its_last_frame_and_says_so(tmp_path: Path, num_frames: int, backend: str) -> None:
    path = write(tmp_path / "short.mp4", KINDS[0], num_frames)
    streamed = list(video_io.iter_clips(path, 16, 32, all_clips=True, backend=backend))
    for clip in [*streamed, video_io.read_clip_at(path, 0.7, 16, 32, backend=backend)]:
        assert clip.num_padded == 16 - num_frames
        assert numbers_of(clip.frames_THWC) == [min(t, num_frames - 1) for t in range(16)]
    assert len(streamed) == 1


def test_control_characters_of_a_name_are_printed_as_text() -> None:
    assert video_io.display_name("a\nb\x1b[31m\x7f é 漢.mp4") == r"a\nb\x1b[31m\x7f é 漢.mp4"


def test_a_video_is_written_into_a_new_folder_and_under_a_name_with_a_colon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    frames_THWC = numbered_frames(3, 32, 32)
    with video_io.VideoWriter("new:folder/12:30.mp4", 10) as writer:
        writer.add(frames_THWC, [0.0, 0.1, 0.2])
    video_io.write_video("12:30.mp4", frames_THWC, 10)
    for name in ("new:folder/12:30.mp4", "12:30.mp4"):
        assert numbers_of(all_frames(Path(name))) == [0, 1, 2]


def test_a_mistyped_frame_rate_is_refused() -> None:
    assert frame_rate("23.976") == 23.976
    for text in ("0", "-3", "nan", "inf", "1e9", "x"):
        with pytest.raises(argparse.ArgumentTypeError):
            frame_rate(text)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_file_name_can_be_read_and_printed(tmp_path: Path, backend: str) -> None:
    source = write(tmp_path / "source.mp4", KINDS[0], 2)
    for raw in (b"two words.mp4", "caf\u00e9 \u6620\u753b.mp4".encode(), b"caf\xe9 \xff.mp4", b"http:x%03d.mp4"):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + raw))
        path.write_bytes(source.read_bytes())
        assert len(all_frames(path, backend)) == 2
        video_io.display_name(path).encode("utf-8")
    assert len(video_io.list_videos(tmp_path)) == 5


def make_bad_file(root: Path, name: str) -> Path:
    path = root / name
    whole = write(root / "whole.mp4", KINDS[0], NUM_FRAMES).read_bytes()
    if name == "audio only.mp4":
        with wave.open(str(path), "wb") as audio:
            audio.setparams((1, 2, 8000, 0, "NONE", ""))
            audio.writeframes(bytes(8000))
    else:
        contents = {"empty.mp4": b"", "text.mp4": b"not a video, only words\n" * 40, "truncated.mp4": whole[:-600]}
        contents |= {
            "noise.avi": np.random.default_rng(0).bytes(5000),
            "playlist.mp4": b"#EXTM3U\n#EXTINF:1,\nwhole.mp4\n",
        }
        path.write_bytes(contents[name])
    return path


BAD_FILES = ("empty.mp4", "text.mp4", "truncated.mp4", "noise.avi", "playlist.mp4", "audio only.mp4")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line_naming_the_file(tmp_path: Path, name: str, backend: str) -> None:
    path = make_bad_file(tmp_path, name)
    for read in (video_io.probe, lambda p, backend: list(video_io.iter_clips(p, backend=backend))):
        with pytest.raises(VideoError) as caught:
            read(path, backend=backend)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert caught.value.path == path and caught.value.reason


def test_file_cut_off_in_the_middle_gives_what_is_whole_and_then_says_so(tmp_path: Path) -> None:
    kind = KINDS[0]._replace(options={"g": "4"}, height=240, width=320)
    whole = write(tmp_path / "whole.mp4", kind, NUM_FRAMES, index_first=True).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    clips = video_io.iter_clips(tmp_path / "cut.mp4", 8, 32, all_clips=True)
    assert next(clips).start == 0
    with pytest.raises(VideoError, match="cut.mp4"):
        list(clips)


def test_missing_things_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="does not exist"):
        video_io.probe(tmp_path / "absent.mp4")
    with pytest.raises(UserError, match="absent"):
        video_io.list_videos(tmp_path / "absent")
    with pytest.raises(UserError, match="no video under this folder"):
        video_io.list_videos(tmp_path)
    with pytest.raises(UserError, match="'ffmpeg' is not a video backend; choose one of pyav, decord"):
        video_io.probe(write(tmp_path / "a.mp4", KINDS[0], 1), "ffmpeg")
    with pytest.raises(VideoError, match="has 1 frames"):
        video_io.read_clip(tmp_path / "a.mp4", 1)


def test_linked_folders_are_searched_and_a_loop_ends(tmp_path: Path) -> None:
    (tmp_path / "data/one").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    (tmp_path / "far/a.mp4").touch()
    (tmp_path / "data/linked").symlink_to(tmp_path / "far")
    (tmp_path / "data/one/back").symlink_to(tmp_path / "data")
    found = video_io.list_videos(tmp_path / "data")
    assert [path.name for path in found] == ["a.mp4"]


def test_list_videos_is_recursive_and_sorted(tmp_path: Path) -> None:
    for name in ("b/2.MP4", "b/10.webm", "a.avi", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(p.relative_to(tmp_path)) for p in video_io.list_videos(tmp_path)] == ["a.avi", "b/10.webm", "b/2.MP4"]
    assert video_io.list_videos(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]  # named by the user: let it try


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_lossless_file_comes_back_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    frames_THWC = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), np.uint8)
    video_io.write_video(tmp_path / f"exact{suffix}", frames_THWC, fps=12, lossless=True)
    np.testing.assert_array_equal(all_frames(tmp_path / f"exact{suffix}"), frames_THWC)


def test_ordinary_mp4_plays_everywhere_and_keeps_rate_and_odd_sizes(tmp_path: Path) -> None:
    frames_THWC = numbered_frames(6, 33, 47)
    video_io.write_video(tmp_path / "looking.mp4", frames_THWC, fps=29.97)
    with av.open(str(tmp_path / "looking.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    back_THWC = all_frames(tmp_path / "looking.mp4")
    assert back_THWC.shape == (6, 34, 48, 3)
    assert np.abs(back_THWC[:, :33, :47].astype(int) - frames_THWC).mean() < 3
    assert video_io.probe(tmp_path / "looking.mp4").fps == pytest.approx(29.97, abs=0.01)


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept.mp4"
    path.write_bytes(b"the old one")
    with pytest.raises(ValueError):
        video_io.write_video(path, np.zeros((3, 32, 32, 5), np.uint8), fps=10, lossless=True)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_model_range_and_back_is_exact() -> None:
    frames_THWC = np.arange(2 * 16 * 8 * 3, dtype=np.uint8).reshape(2, 16, 8, 3)
    video_CTHW = video_io.to_model_range(frames_THWC)
    assert video_CTHW.shape == (3, 2, 16, 8) and video_CTHW.dtype == torch.float32 and video_CTHW.is_contiguous()
    assert (video_CTHW.min(), video_CTHW.max()) == (0, 1)
    np.testing.assert_array_equal(video_io.to_uint8(video_CTHW), frames_THWC)
    assert video_io.to_uint8(torch.tensor([-3.0, 0.5, 9.0]).view(3, 1, 1, 1)).ravel().tolist() == [0, 128, 255]


@pytest.mark.parametrize("shape", [(48, 64), (77, 51), (32, 32), (9, 200)])
def test_resize_center_crop_equals_torchvision(shape: tuple[int, int]) -> None:
    frames_THWC = np.random.default_rng(1).integers(0, 256, (2, *shape, 3), np.uint8)
    reference = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32)])
    expected_TCHW = reference(torch.from_numpy(frames_THWC).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(resize_center_crop(frames_THWC, 32), expected_TCHW.permute(0, 2, 3, 1).numpy())


def test_memory_does_not_grow_with_the_length_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "long.mp4", KINDS[0], 400)
    tracemalloc.start()
    num_clips = sum(1 for _ in video_io.iter_clips(path, 16, 48, all_clips=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_clips == 25
    assert peak < 6 * 16 * 48 * 48 * 3  # a few clips; the whole file would be 25
