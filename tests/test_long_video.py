"""Videos of any length as files of tokens: there and back, stopped and resumed, by range, with sound, as a stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from tokenizer import detokenize, tokenize
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.data.video_io import VideoWriter, iter_clips, iter_video, to_model_range, to_uint8
from tokenizer.model import VideoTokenizer
from tokenizer.presets import build_tokenizer, load_tokenizer
from tokenizer.token_file import TokenFile
from tokenizer.tokens import VideoTokens

NUM_FRAMES, RATE = 57, 48_000
SECONDS = [k / 25 + (0.02 if k % 3 else 0.0) for k in range(NUM_FRAMES)]  # no constant rate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """film.mp4: 57 frames of 48x64 at uneven times, with 2.3 seconds of sound; two tokenizers."""
    folder = tmp_path_factory.mktemp("long")
    t, y, x = np.mgrid[:NUM_FRAMES, :48, :64]
    frames_THWC = np.stack([3 * x + 5 * t, 4 * y - 2 * t, x + y + 7 * t], axis=-1).astype(np.uint8)
    with av.open(str(folder / "sound.mkv"), "w") as container:  # a picture is what the sound is counted from
        picture, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=RATE)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        container.mux(picture.encode(av.VideoFrame.from_ndarray(frames_THWC[0], format="rgb24")))
        wave = np.sin(np.arange(int(2.3 * RATE)) / 20).astype(np.float32)[None]
        for start in range(0, wave.shape[1], 1024):
            chunk = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, start : start + 1024]), "fltp", "mono")
            chunk.sample_rate, chunk.pts = RATE, start
            container.mux(sound.encode(chunk))
        container.mux(sound.encode(None))
        container.mux(picture.encode(None))
    with VideoWriter(folder / "film.mp4", 25, sound=folder / "sound.mkv") as writer:
        writer.add(frames_THWC, SECONDS)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build_tokenizer("VQ_debug")
        path = folder / f"tokenizer{seed}.safetensors"
        save_model(path, model.state_dict(), {"model": to_dict(model.config)}, {"kind": "tokenizer"})
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(entry: object, *args: object, weights: int = 0) -> None:
        weights_of = ["--vq_ckpt", str(folder / f"tokenizer{weights}.safetensors"), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args), *weights_of])
        entry.main()  # type: ignore[attr-defined]

    return run


@pytest.fixture(scope="module")
def model(folder: Path) -> VideoTokenizer:
    return load_tokenizer(folder / "tokenizer0.safetensors")


def film(folder: Path) -> torch.Tensor:
    """The film as its tokenizer sees it: [4, 3, 16, 32, 32], the last clip padded."""
    clips = list(iter_video(folder / "film.mp4", size=32))
    return torch.stack([to_model_range(clip.frames_THWC) for clip in clips])


@pytest.fixture
def tokens_path(folder: Path, run: Callable[..., None], tmp_path: Path) -> Path:
    run(tokenize, folder / "film.mp4", "--out", tmp_path, "--budget", "fixed:2,8,4,2", "--batch-size", 3)
    (path,) = tmp_path.glob("film-*.safetensors")
    return path


def test_a_whole_video_is_read_with_its_times(folder: Path) -> None:
    clips = list(iter_video(folder / "film.mp4", size=32))
    assert [clip.num_padded for clip in clips] == [0, 0, 0, 7]
    np.testing.assert_allclose([second for clip in clips for second in clip.seconds], SECONDS, atol=1e-4)
    for one, other in zip(iter_clips(folder / "film.mp4", size=32, all_clips=True), clips, strict=False):
        np.testing.assert_array_equal(one.frames_THWC, other.frames_THWC)
    later = list(iter_video(folder / "film.mp4", size=32, skip=2))
    assert [(clip.start, clip.seconds) for clip in later] == [(clip.start, clip.seconds) for clip in clips[2:]]
    np.testing.assert_array_equal(later[1].frames_THWC, clips[3].frames_THWC)
    slow = list(iter_video(folder / "film.mp4", size=32, fps=5.0))
    assert [second for clip in slow for second in clip.seconds] == [k / 5 for k in range(12)]


def test_the_file_holds_what_encode_gives(folder: Path, tokens_path: Path, model: VideoTokenizer) -> None:
    file, expected = TokenFile(tokens_path), model.encode(film(folder), budget="fixed:2,8,4,2")
    for tokens in (file.clips(0, 4), VideoTokens.load(tokens_path)):
        assert torch.equal(tokens.code_L, expected.code_L) and torch.equal(tokens.length_BN, expected.length_BN)
        assert tokens.tokenizer_sha256 == model.sha256
    assert torch.equal(file.clips(1, 3).code_L, expected.code_L[16:48])
    np.testing.assert_allclose(file.second_F, SECONDS, atol=1e-4)


@pytest.mark.parametrize("cut", [0, 5])
def test_a_killed_run_resumes_to_the_same_file(
    folder: Path,
    tokens_path: Path,
    run: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cut: int,
) -> None:
    out, encode, calls = tmp_path / "again", VideoTokenizer.encode, []

    def dies_at_the_third(self: VideoTokenizer, *args: object, **more: object) -> VideoTokens:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(VideoTokenizer, "encode", dies_at_the_third)
    command = (tokenize, folder / "film.mp4", "--out", out, "--budget", "fixed:2,8,4,2", "--batch-size", 1)
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    partial = out / f".{tokens_path.name}.partial"
    assert not (out / tokens_path.name).exists()
    (partial / "codes.bin").write_bytes((partial / "codes.bin").read_bytes()[: 64 - cut])  # 32 codes of 2 bytes
    with open(partial / "seconds.bin", "ab") as file:
        file.write(b"torn")
    with pytest.raises(UserError, match="other settings .*fixed:2,8,4,2.*uniform:4"):
        run(tokenize, folder / "film.mp4", "--out", out, "--budget", "uniform:4")
    run(*command)
    assert len(calls) == 3 + (2 if cut == 0 else 3)  # what was complete is not encoded again
    assert (out / tokens_path.name).read_bytes() == tokens_path.read_bytes()
    assert not partial.exists()
    run(*command)
    assert "done before" in capsys.readouterr().out
    with pytest.raises(UserError, match="made by other weights, budget or fps"):
        run(tokenize, folder / "film.mp4", "--out", out, "--budget", "uniform:4")


def test_a_range_equals_that_of_the_whole(
    folder: Path, tokens_path: Path, run: Callable[..., None], tmp_path: Path, model: VideoTokenizer
) -> None:
    run(detokenize, tokens_path, "--out", tmp_path / "whole.mkv", "--lossless")
    run(detokenize, tokens_path, "--out", tmp_path / "part.mkv", "--lossless", "--from", 0.7, "--to", 1.5)
    (whole,) = iter_video(tmp_path / "whole.mkv", num_frames=NUM_FRAMES, size=None)
    assert whole.num_padded == 0  # the true number of frames
    video_BCTHW = model.decode(model.encode(film(folder), budget="fixed:2,8,4,2"))
    expected = np.concatenate([to_uint8(video) for video in video_BCTHW])[:NUM_FRAMES]
    np.testing.assert_array_equal(whole.frames_THWC, expected)
    np.testing.assert_allclose(whole.seconds, SECONDS, atol=2e-3)
    inside = [k for k, second in enumerate(SECONDS) if 0.7 <= second < 1.5]
    (part,) = iter_video(tmp_path / "part.mkv", num_frames=len(inside), size=None)
    np.testing.assert_array_equal(part.frames_THWC, expected[inside])


def test_side_by_side_with_the_sound_of_the_source(
    folder: Path, tokens_path: Path, run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.mp4"
    sized = ("--source", folder / "film.mp4", "--side-by-side", "--display-size", 48)
    run(detokenize, tokens_path, "--out", out, *sized, "--from", 0.5)
    assert "dB over all frames" in capsys.readouterr().out
    with av.open(str(out)) as container:
        assert (container.streams.video[0].height, container.streams.video[0].width) == (48, 96)
        assert container.streams.audio[0].codec_context.name == "aac"
        sound = [frame.time for frame in container.decode(container.streams.audio[0])]
    with av.open(str(out)) as container:
        picture = [frame.time for frame in container.decode(container.streams.video[0])]
    assert len(picture) == sum(second >= 0.5 for second in SECONDS)
    assert abs(sound[0] - picture[0]) < 0.05 and abs(sound[-1] - 1.8) < 0.1


def test_a_stream_gives_each_block_with_its_own_frames(folder: Path, model: VideoTokenizer) -> None:
    frames = [frame for video in film(folder) for frame in video.unbind(1)][:22]
    read = []

    def camera() -> Iterator[torch.Tensor]:
        for k, frame in enumerate(frames):
            read.append(k)
            yield frame

    blocks, num_read = [], []
    for block in model.stream(camera(), budget="fixed:2,8,4,2"):
        blocks.append(block)
        num_read.append(len(read))
    assert num_read == [4, 8, 12, 16, 20, 22]  # without look-ahead
    assert [block.num_frames for block in blocks] == [4, 4, 4, 4, 4, 2]
    padded = torch.stack(frames + frames[-1:] * 10).unflatten(0, (2, 16)).transpose(1, 2)
    tokens = model.encode(padded, budget="fixed:2,8,4,2")
    codes = torch.cat([block.code_K for block in blocks])
    assert torch.equal(codes, tokens.code_L[: len(codes)])

    class Router:
        def assign(self, video_BCTHW: torch.Tensor, budget: str = "router", price: float | None = None) -> torch.Tensor:
            return torch.tensor([[2, 8, 4, 2]])

        def live(self, budget: str) -> None:
            return None

    later = list(model.stream(iter(frames), router=Router()))
    assert all(torch.equal(a.code_K, b.code_K) for a, b in zip(blocks, later, strict=True))
    assert [block.num_frames for block in later] == [4, 4, 4, 4, 4, 2]

    played = torch.cat(list(model.play(blocks)), dim=1)
    expected = torch.cat(list(model.decode(tokens)), dim=1)[:, :22]
    torch.testing.assert_close(played, expected, rtol=1e-4, atol=1e-5)
    assert sum(1 for _ in model.play(tokens)) == 8
    with pytest.raises(UserError, match="block 2 of a clip came in place of block 1"):
        list(model.play([blocks[0], blocks[2]]))


def test_a_damaged_file_shows(tokens_path: Path, tmp_path: Path) -> None:
    """Another code, time, length or fact, and nonsense; a file of before the sha256 is read."""
    path = tmp_path / "x.safetensors"
    with safe_open(tokens_path, "np") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name, tensor in tensors.items():
        other = tensor.copy()
        other[-1] = tensor[-1] + 1
        save_file(tensors | {name: other}, path, meta)
        with pytest.raises(UserError, match=r"x\.safetensors: is damaged"):
            TokenFile(path)
    old = {key: {k: v for k, v in json.loads(text).items() if k != "sha256"} for key, text in meta.items()}
    for change in ({"fps": 0}, {"fps": None}, {"num_frames": 0}, {"later": 1}, {"budget": 3}):
        for facts, kind in ((json.loads(meta["evatok.video"]), meta["evatok.tokens"]), (old["evatok.video"], "{}")):
            save_file(tensors, path, {"evatok.tokens": kind, "evatok.video": json.dumps(facts | change)})
            with pytest.raises(UserError, match=r"x\.safetensors: ") as refused:
                TokenFile(path)
            assert "\n" not in str(refused.value)
    save_file(tensors, path, {key: json.dumps(facts) for key, facts in old.items()})
    assert len(TokenFile(path)) == len(TokenFile(tokens_path))


def test_mistakes_are_one_line(folder: Path, tokens_path: Path, run: Callable[..., None], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x.mp4")
    with pytest.raises(UserError, match=r"the range 3 .. 4 s is not inside of the video, which lasts from 0 to 2.30 s"):
        run(detokenize, tokens_path, *out, "--from", 3, "--to", 4)
    with pytest.raises(UserError, match="made by tokenizer .* cannot be read by"):
        run(detokenize, tokens_path, *out, weights=1)
    with pytest.raises(UserError, match="is not the video that .* was made from"):
        run(detokenize, tokens_path, *out, "--source", folder / "sound.mkv")
    with pytest.raises(UserError, match="--side-by-side needs the original"):
        run(detokenize, tokens_path, *out, "--side-by-side")
    with pytest.raises(UserError, match="needs all clips before the first"):
        run(tokenize, folder / "film.mp4", "--out", tmp_path, "--budget", "average:16")
    with pytest.raises(UserError, match="needs a router: give --router_ckpt"):
        run(tokenize, folder / "film.mp4", "--out", tmp_path)
    assert not (tmp_path / "x.mp4").exists() and not list(tmp_path.glob(".writing*"))
