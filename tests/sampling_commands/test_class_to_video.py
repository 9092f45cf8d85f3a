"""Class-to-video as users type it: files, resume, processes, forced lengths, and every mistake."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling_files import CLASSES, ROOT, common, contents, num_frames, save_random_gpt

from autoregressive import sample_c2v, sample_folder, sample_frame_prediction
from autoregressive.condition import class_order, names_of, parse_classes
from autoregressive.sampler import Sampler
from tokenizer.common.errors import UserError
from tokenizer.data.datasets import ASCII_ORDER
from tokenizer.data.files import BUNDLED
from tokenizer.data.video_io import to_uint8
from tokenizer.presets import load_tokenizer
from tokenizer.tokens import VideoTokens


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
        return finish(*arguments)

    return stops


def test_resumed_or_divided_sampling_makes_the_same(c2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--qual-num", "3", "--class-idx", "square,cone")
    whole = c2v(tmp_path / "whole", *flags)
    wanted = contents(tmp_path / "whole", "frames.npy")

    with monkeypatch.context() as patch:
        patch.setattr(sample_c2v.SampleJob, "_write", interrupted_after(2, sample_c2v.SampleJob._write))
        with pytest.raises(KeyboardInterrupt, match="interrupted after 3 clips; rerun the same command to resume"):
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


def test_a_model_without_classes_samples_clips(models: Path, c2v, tmp_path: Path) -> None:
    save_random_gpt(models / "free.safetensors", replace(CLASSES, num_classes=0), [])
    free = ("--gpt-ckpt", str(models / "free.safetensors"))
    summary = c2v(tmp_path / "out", *free, "--qual-num", "2", "--cfg-scale", "1")
    assert [(s["name"], s["class"]) for s in summary["samples"]] == [("clips_00000", None), ("clips_00001", None)]
    with pytest.raises(UserError, match="--cfg-scale 1"):
        c2v(tmp_path / "a", *free)
    with pytest.raises(UserError, match="trained without classes"):
        c2v(tmp_path / "b", *free, "--class-idx", "0")


def test_a_full_disk_is_said(c2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written in a thread: what goes wrong there must come out here."""

    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_folder.SampleFolder, "add", full)
    with pytest.raises(OSError, match="No space left"):
        c2v(tmp_path / "out", "--class-idx", "0")


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


def test_numeric_labels_are_ordered_by_value() -> None:
    names = class_order(str(i) for i in range(12))
    assert names == [str(i) for i in range(12)]
    assert parse_classes("2,10", names) == [2, 10]
    assert class_order(["b", "10", "9"]) == ["10", "9", "b"], "not all are numbers"


def test_a_number_that_is_another_class_is_refused() -> None:
    """Labels 1..12, and the order of text that older archives hold: the number and the name are different classes."""
    for names, text in ((class_order(str(i) for i in range(1, 13)), "2"), (sorted(map(str, range(12))), "10")):
        with pytest.raises(UserError, match=f"--class-idx {text}: class {text} is named .* in double quotes"):
            parse_classes(text, names)
        assert parse_classes(f'"{text}"', names) == [names.index(text)]
    assert parse_classes("12", class_order(str(i) for i in range(1, 13))) == [11], "no such number: the name is meant"


def test_names_with_commas_and_of_equal_letters() -> None:
    names = ["Pull, then lift", "run", "Run", "walk"]
    assert parse_classes('walk,"Pull, then lift", Run', names) == [3, 0, 2]
    with pytest.raises(UserError, match="close the double quotes"):
        parse_classes('"Pull, then lift', names)
    with pytest.raises(UserError, match="double quotes keep a name with a comma whole"):
        parse_classes("Pull, then lift", names)
    with pytest.raises(UserError, match="2 classes have this name; use a number, 1 or 2"):
        parse_classes("RUN", names)


def test_a_gpt_of_ones_own_size_needs_no_name(
    models: Path, c2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = models / "own.safetensors"
    save_random_gpt(own, replace(CLASSES, layers=3), [])
    with pytest.raises(UserError, match=r"holds 3x32x2 .*leave --gpt-model out"):
        c2v(tmp_path / "a", "--gpt-ckpt", str(own), "--class-idx", "0")
    words = common(models, "own", tmp_path / "b")
    at = words.index("--gpt-model")
    monkeypatch.setattr(sys, "argv", ["sample_c2v", *words[:at], *words[at + 2 :], "--class-idx", "0"])
    sample_c2v.main()
    assert "3x32x2 (" in capsys.readouterr().out
    assert json.loads((tmp_path / "b" / "samples.json").read_text())["gpt_model"] == "3x32x2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 99.5}, "tokens = 99.5 is not int"),
        ({"tokens": 10**6}, "is not the sum of assignment"),
        ({"assignment": [True, 2, 2, 2]}, "assignment = .* is not list"),
        ({"broken": 0}, "broken = 0 is not str"),
        ({"skipped": 1}, "lacks 'file'"),
    ],
)
def test_an_edited_record_is_refused(c2v, tmp_path: Path, change: dict, words: str) -> None:
    c2v(tmp_path, "--class-idx", "0")
    (path,) = tmp_path.glob("samples/*/record.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"record.json: .*{words}.*run the same command again"):
        c2v(tmp_path, "--class-idx", "0")


def test_frames_that_are_no_frames_are_refused(c2v, tmp_path: Path) -> None:
    c2v(tmp_path, "--class-idx", "0")
    (path,) = tmp_path.glob("samples/*/frames.npy")
    for bad in (np.zeros((16, 32, 32, 3)), np.zeros(3, np.uint8)):
        np.save(path, bad)
        with pytest.raises(UserError, match="frames.npy: holds no uint8 frames"):
            c2v(tmp_path, "--class-idx", "0")
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match="frames.npy: damaged"):
        c2v(tmp_path, "--class-idx", "0")
