"""The sampling commands as users type them, with random debug models: files, resume, processes, and every mistake."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from autoregressive import sample_c2v, sample_frame_prediction
from autoregressive.class_names import names_of, parse_classes
from autoregressive.model import GPT, GPTConfig
from autoregressive.presets import PRESETS
from autoregressive.sample_grid import sample_grid
from autoregressive.sample_pictures import ShownClip, contact_sheet, grid_video, mark_given
from autoregressive.sampler import Request, Sampler, SamplingConfig
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.data.bundled_clips import FOLDER as BUNDLED
from tokenizer.data.ucf101 import ASCII_ORDER
from tokenizer.data.video_io import to_uint8, write_video
from tokenizer.presets import build_tokenizer, load_tokenizer
from tokenizer.tokens import VideoTokens

ROOT = Path(__file__).parents[1]
CLASSES = PRESETS["GPT-debug"]
FRAMES = replace(CLASSES, num_classes=0, condition_lengths=[8, 4])
CLASS_NAMES = ["square", "circle", "triangle", "star", "cross", "ring", "moon", "cube", "cone", "line", "real"]


def save_random_gpt(path: Path, config: GPTConfig, class_names: list[str]) -> None:
    torch.manual_seed(0)
    model = GPT(config)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    tokens = {"tokenizer_sha256": "", "class_names": class_names}
    save_model(path, model.state_dict(), {"model": to_dict(config), "tokens": tokens}, {"kind": "gpt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tok.safetensors, c2v.safetensors and fp.safetensors: random weights of debug size."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = build_tokenizer("VQ_debug")
    with torch.no_grad():
        for parameter in tokenizer.parameters():  # an untrained tokenizer hardly tells noise from noise
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = {"model": to_dict(tokenizer.config)}
    save_model(folder / "tok.safetensors", tokenizer.state_dict(), config, {"kind": "tokenizer"})
    save_random_gpt(folder / "c2v.safetensors", CLASSES, CLASS_NAMES)
    save_random_gpt(folder / "fp.safetensors", FRAMES, [])
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real videos, a wide one, one that is too short, and one that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("box_000.mp4", "bunny_000.mp4"):
        shutil.copy(BUNDLED / name, folder)
    rng = np.random.default_rng(0)
    write_video(folder / "wide.mp4", rng.integers(0, 255, (16, 32, 96, 3), np.uint8), 24)
    write_video(folder / "short.mp4", np.zeros((3, 32, 32, 3), np.uint8), 24)
    (folder / "text.mp4").write_text("no video")
    return folder


def common(models: Path, gpt: str, out: Path) -> list[str]:
    return [
        "--tok-config", str(ROOT / "configs/debug/final.yaml"), "--vq-ckpt", str(models / "tok.safetensors"),
        "--gpt-model", "GPT-debug", "--gpt-ckpt", str(models / f"{gpt}.safetensors"),
        "--sample-dir", str(out), "--per-proc-batch-size", "3", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture
def c2v(models: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the class-to-video command in this process -> samples.json."""

    def run(out: Path, *flags: str, mask: bool = True) -> dict:
        words = [*common(models, "c2v", out), *(["--check-special-token-mask"] if mask else []), *flags]
        monkeypatch.setattr(sys, "argv", ["sample_c2v", *words])
        sample_c2v.main()
        return json.loads((out / "samples.json").read_text())

    return run


@pytest.fixture
def frame_prediction(models: Path, monkeypatch: pytest.MonkeyPatch):
    """The same for frame prediction."""

    def run(out: Path, *flags: str) -> dict:
        words = [*common(models, "fp", out), "--check-special-token-mask", *flags]
        monkeypatch.setattr(sys, "argv", ["sample_frame_prediction", *words])
        sample_frame_prediction.main()
        return json.loads((out / "samples.json").read_text())

    return run


def contents(out: Path, pattern: str) -> dict[str, bytes]:
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob(pattern))}
    assert found
    return found


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


# --- class-to-video -------------------------------------------------------------------------------------------------


def test_class_to_video_as_in_the_readme(models: Path, tmp_path: Path) -> None:
    """The script itself, with its own process."""
    out = tmp_path / "out"
    flags = ["--cfg-scale", "2.25", "--qual-num", "2", "--class-idx", "1,Star", "--check-special-token-mask"]
    command = ["bash", "scripts/test/sample_c2v_visualization.sh", *common(models, "c2v", out), *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "3 slots x 2 streams x 37 places" in result.stdout and "4 samples" in result.stdout

    summary = json.loads((out / "samples.json").read_text())
    assert summary["complete"] and summary["num_broken"] == 0
    assert [(s["class"], s["class_name"]) for s in summary["samples"]] == [(1, "circle")] * 2 + [(3, "star")] * 2
    tokenizer = load_tokenizer(models / "tok.safetensors")
    for sample in summary["samples"]:
        assert sample["seed"] == 0
        assert sample["tokens"] == sum(sample["assignment"]) == sample["tokens_with_length_tokens"] - 4
        folder = out / "samples" / sample["name"]
        tokens = VideoTokens.load(folder / "tokens.safetensors")
        assert tokens.length_BN.tolist() == [sample["assignment"]]
        frames_THWC = np.load(folder / "frames.npy")
        assert np.array_equal(frames_THWC, to_uint8(tokenizer.decode(tokens)[0])), "lossless, for scoring"
        assert num_frames(folder / "sample.mp4") == 16
    for title in ("class_001_circle", "class_003_star"):
        assert num_frames(out / "grids" / f"{title}.mp4") == 16
        assert (out / "grids" / f"{title}.png").is_file()
    page = (out / "report.html").read_text()
    assert "<h2>circle</h2>" in page and "<h2>star</h2>" in page and page.count("data:image/jpeg;base64,") == 4


def interrupted_after(num: int, finish):
    calls = 0

    def stops(*arguments) -> None:
        nonlocal calls
        calls += 1
        if calls > num:
            raise KeyboardInterrupt
        finish(*arguments)

    return stops


def test_resumed_or_divided_sampling_makes_the_same(c2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--qual-num", "3", "--class-idx", "square,cone")
    whole = c2v(tmp_path / "whole", *flags)
    wanted = contents(tmp_path / "whole", "frames.npy")

    with monkeypatch.context() as patch:
        patch.setattr(sample_c2v.SampleJob, "_finish", interrupted_after(2, sample_c2v.SampleJob._finish))
        with pytest.raises(KeyboardInterrupt, match="interrupted after 3 clips; the same command goes on"):
            c2v(tmp_path / "parts", *flags)
    done = contents(tmp_path / "parts", "frames.npy")
    first = min(path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("frames.npy"))
    assert len(done) == 2 and done.items() <= wanted.items()
    assert c2v(tmp_path / "parts", *flags) == whole
    assert contents(tmp_path / "parts", "frames.npy") == wanted
    assert first in {path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("frames.npy")}, "kept, not redone"

    for rank in ("1", "0"):
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            patch.setenv("RANK", rank)
            summary = c2v(tmp_path / "two", *flags)
            assert summary["complete"] == (rank == "0"), "the last to end finds all samples there"
    assert contents(tmp_path / "two", "frames.npy") == wanted
    assert len(contents(tmp_path / "two", "*.png")) == 2


def test_lengths_are_forced_and_limited(c2v, tmp_path: Path) -> None:
    forced = c2v(tmp_path / "a", "--class-idx", "0,1", "--tokens-per-block", "8,4,2,2")
    assert [s["assignment"] for s in forced["samples"]] == [[8, 4, 2, 2]] * 2
    limited = c2v(tmp_path / "b", "--class-idx", "0,1", "--tokens-per-block", "8", "--max-tokens", "15")
    assert all(s["assignment"][0] == 8 and s["tokens"] <= 15 for s in limited["samples"])


def test_without_the_mask_broken_sequences_are_counted(c2v, tmp_path: Path, capsys) -> None:
    summary = c2v(tmp_path / "out", "--class-idx", "0,1,2", "--top-k", "5", mask=False)
    assert summary["num_broken"] == 3 and summary["mean_tokens"] is None
    assert "grammar wants" in summary["samples"][0]["broken"]
    assert "3 broke the grammar and have no video (--check-special-token-mask)" in capsys.readouterr().out


def test_other_settings_in_the_same_folder_are_refused(c2v, tmp_path: Path) -> None:
    c2v(tmp_path / "out", "--class-idx", "0")
    with pytest.raises(UserError, match="other settings .*temperature: 1.0 / 0.5"):
        c2v(tmp_path / "out", "--class-idx", "0", "--temperature", "0.5")
    c2v(tmp_path / "out", "--class-idx", "0,1", "--per-proc-batch-size", "1")  # more clips, fewer slots: goes on
    assert c2v(tmp_path / "out", "--class-idx", "1", "--temperature", "0.5", "--overwrite")["num_samples"] == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--class-idx", "squar"], "no such class; the nearest are square"),
        (["--class-idx", "11"], "--class-idx 11: this model has the classes 0 .. 10"),
        (["--tokens-per-block", "3,2,2,2"], "length 3 is none of the levels"),
        (["--tokens-per-block", "2,2,2,2,2"], "5 lengths .* a clip has 4 blocks"),
        (["--tokens-per-block", "two"], "--tokens-per-block 'two'"),
        (["--max-tokens", "7"], "7 tokens are below the smallest clip"),
        (["--cfg-scale", "much"], "--cfg-scale 'much'"),
        (["--cfg-scale", "1,2"], "2 guidance scales"),
        (["--precision", "half"], "precision='half'"),
        (["--gpt-model", "GPT-L"], "but GPT-L is 24x1024x16"),
        (["--per-proc-batch-size", "1000000000"], "slots would fit"),
        (["--top-p", "2"], "top_p = 2.0"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_mistakes_of_class_to_video(c2v, tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        c2v(tmp_path / "out", *flags)


def test_lengths_without_the_mask_are_refused(c2v, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need --check-special-token-mask"):
        c2v(tmp_path / "out", "--max-tokens", "20", mask=False)


def test_compiling_without_a_compiler_is_refused(c2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--compile for cpu needs a C.. compiler, and there is no 'no-such-compiler'"):
        c2v(tmp_path / "out", "--class-idx", "0", "--compile")


def test_missing_flags_and_wrong_models(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sample_c2v", "--gpt-model", "GPT-B"])
    with pytest.raises(UserError, match="missing: --tok-config, --vq-ckpt, --gpt-ckpt, --sample-dir"):
        sample_c2v.main()
    monkeypatch.setattr(sys, "argv", ["sample_c2v", *common(models, "fp", tmp_path / "out"), "--cfg-scale", "1"])
    with pytest.raises(UserError, match="is a model of frame prediction; use scripts/test/frame_pred"):
        sample_c2v.main()
    words = [*common(models, "c2v", tmp_path / "out"), "--vid_path", str(BUNDLED / "box_000.mp4")]
    monkeypatch.setattr(sys, "argv", ["sample_frame_prediction", *words])
    with pytest.raises(UserError, match="is a class-to-video model; use scripts/test/sample_c2v"):
        sample_frame_prediction.main()
    save_random_gpt(tmp_path / "other.safetensors", replace(CLASSES, codebook_size=32), [])
    words = [*common(models, "c2v", tmp_path / "out"), "--gpt-ckpt", str(tmp_path / "other.safetensors")]
    monkeypatch.setattr(sys, "argv", ["sample_c2v", *words])
    with pytest.raises(UserError, match=r"other\.safetensors has codebook_size = 32, but the tokenizer's is 64"):
        sample_c2v.main()


def test_out_of_memory_says_how_to_go_on(c2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(sampler: Sampler) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Sampler, "_step", full)
    with pytest.raises(UserError, match=r"cpu is out of memory with --per-proc-batch-size 3 and .* GiB .*; try 1$"):
        c2v(tmp_path / "out", "--class-idx", "0")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (sample_c2v, "--cfg-scale --qual-num --class-idx"),
        (
            sample_frame_prediction,
            "--dataset --vid_path --orig-aspect-ratio --sample-num --fixed-prefix --condition-mode",
        ),
    ],
)
def test_every_promised_flag_is_explained(command, flags: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    shared = (
        "--tok-config --vq-ckpt --gpt-model --gpt-ckpt --sample-dir --per-proc-batch-size --check-special-token-mask "
        "--seed --temperature --top-k --top-p --precision --device --tokens-per-block --compile"
    )
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.parse_arguments()
    usage = capsys.readouterr().out.split()
    assert {*flags.split(), *shared.split()} <= set(usage)


def test_classes_by_name_and_number() -> None:
    names = names_of((), 101)
    assert names == ASCII_ORDER
    assert parse_classes("1, jumprope,HammerThrow,46", names) == [1, 46, 34]
    assert parse_classes(None, ["a", "b"]) == [0, 1]
    assert names_of((), 3) == ("class_0", "class_1", "class_2")
    with pytest.raises(UserError, match="nearest are JumpRope"):
        parse_classes("JumpRobe", names)


# --- frame prediction -----------------------------------------------------------------------------------------------


def test_frame_prediction_of_a_folder(frame_prediction, models: Path, videos: Path, tmp_path: Path) -> None:
    """Real decoded files; what cannot be used is named; a second run only tries those again."""
    out = tmp_path / "out"
    flags = ("--vid_path", str(videos), "--fixed-prefix", "8,4", "--condition-mode", "padding", "--orig-aspect-ratio")
    summary = frame_prediction(out, *flags)
    assert summary["complete"] and summary["num_samples"] == 3
    reasons = {skipped["file"]: skipped["reason"] for skipped in summary["skipped"]}
    assert reasons.keys() == {"short.mp4", "text.mp4"}
    assert reasons["short.mp4"] == "has 3 frame(s), and the condition needs 5"
    for sample in summary["samples"]:
        assert sample["assignment"][:2] == [8, 4] and sample["given_frames"] == 5
        folder = out / "samples" / sample["name"]
        real_THWC = np.load(folder / "original.npy")
        assert real_THWC.shape == np.load(folder / "frames.npy").shape == (16, 32, 32, 3)
        assert num_frames(folder / "side_by_side.mp4") == num_frames(folder / "original.mp4") == 16
    assert num_frames(out / "grids/frame_prediction.mp4") == 16 and (out / "grids/frame_prediction.png").is_file()
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and "Framed in blue" in page

    before = contents(out, "frames.npy")
    assert frame_prediction(out, *flags) == summary
    assert contents(out, "frames.npy") == before


def test_only_the_given_frames_are_seen(frame_prediction, tmp_path: Path) -> None:
    """Videos that differ from the sixth frame on are continued alike; a change in the fifth is seen."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 255, (16, 32, 32, 3), np.uint8)
    (tmp_path / "in").mkdir()
    for name, place in (("a", None), ("b", 5), ("c", 4)):
        frames = first.copy()
        if place is not None:
            frames[place] = 255 - frames[place]
        write_video(tmp_path / "in" / f"{name}.mp4", frames, 24, lossless=True)
    likeliest = frame_prediction(tmp_path / "out", "--vid_path", str(tmp_path / "in"), "--top-k", "1")
    names = [sample["name"] for sample in likeliest["samples"]]
    a, b, c = (VideoTokens.load(tmp_path / "out/samples" / name / "tokens.safetensors").code_L for name in names)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_kinetics_is_found_by_its_environment(
    frame_prediction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--dataset", "k600_val", "--sample-num", "1")
    for name in ("K600_ROOT", "K600_VAL_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="K600_ROOT is not set: .* give --vid_path DIR"):
        frame_prediction(tmp_path / "out", *flags)
    root, listed = tmp_path / "k600", tmp_path / "val.csv"
    (root / "juggling").mkdir(parents=True)
    listed.write_text("label,youtube_id,time_start,time_end\njuggling,abcdefghijk,3,13\njuggling,gone,1,11\n")
    monkeypatch.setenv("K600_ROOT", str(root))
    monkeypatch.setenv("K600_VAL_FILE", str(tmp_path / "none.csv"))
    with pytest.raises(UserError, match=r"K600_VAL_FILE=.*none\.csv: does not exist"):
        frame_prediction(tmp_path / "out", *flags)
    monkeypatch.setenv("K600_VAL_FILE", str(listed))
    shutil.copy(BUNDLED / "tree_000.mp4", root / "juggling" / "abcdefghijk_000003_000013.mp4")
    summary = frame_prediction(tmp_path / "out", *flags)
    assert [sample["name"] for sample in summary["samples"]] == ["abcdefghijk_000003_000013_000000"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "either --dataset k600_val or --vid_path"),
        (["--vid_path", "nowhere"], "nowhere: no such file"),
        (["--vid_path", "{videos}", "--fixed-prefix", "16,4"], "16 is none of the levels"),
        (["--vid_path", "{videos}", "--fixed-prefix", "8,4,4,4,4"], "longer than the 4 blocks"),
        (["--vid_path", "{videos}", "--fixed-prefix", "8,8"], "was trained with 8,4"),
        (["--vid_path", "{videos}", "--condition-frames", "9"], "takes 5 to 8"),
        (["--vid_path", "{videos}", "--tokens-per-block", "4,4"], "this model's clips begin with"),
        (["--vid_path", "{videos}/short.mp4"], "short.mp4: has 3 frame.s., and the condition needs 5"),
    ],
)
def test_mistakes_of_frame_prediction(
    frame_prediction, videos: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        frame_prediction(tmp_path / "out", *(flag.format(videos=videos) for flag in flags))


# --- pictures and the grid of a validation --------------------------------------------------------------------------


def test_grid_of_a_validation(models: Path, tmp_path: Path) -> None:
    """The model comes back in the mode it had, whatever happens."""
    model = GPT(CLASSES)
    requests = [Request(("validation", label), label) for label in range(3)]
    samples = sample_grid(
        tmp_path / "grid.png", model, load_tokenizer(models / "tok.safetensors"), requests, SamplingConfig(slots=2)
    )
    assert [sample.request.label for sample in samples] == [0, 1, 2]
    assert (tmp_path / "grid.png").is_file() and model.training


def test_given_frames_are_marked() -> None:
    clip = ShownClip(np.zeros((16, 64, 64, 3), np.uint8), (8, 16, 32, 8), np.zeros((16, 64, 64, 3), np.uint8), 5)
    marked = mark_given(clip.frames_THWC, 5)
    assert marked[:5, 0].any(axis=(1, 2)).all() and not marked[5:].any() and not marked[:, 2:-2, 2:-2].any()
    assert grid_video([clip] * 3, longest=32).shape[0] == 16
    assert contact_sheet([clip] * 3, longest=32).width == 16 * 64
    wide = ShownClip(np.zeros((16, 512, 512, 3), np.uint8), (8, 16, 32, 8))
    assert contact_sheet([wide], longest=32).width == 4 * 512
