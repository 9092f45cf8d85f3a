"""The evaluation commands as users type them: same numbers however the work is shared, resume, comparison, mistakes."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from evaluations import protocols, shards
from evaluations.protocols import PROTOCOLS
from evaluations.report import write_report
from evaluations.summary import csv_table, summarise
from tokenizer.assignment import AssignmentSpace
from tokenizer.budget import parse_budget
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.work_units import claim_folder, lock
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.video_io import iter_clips, to_uint8, write_video
from tokenizer.presets import build_tokenizer

MINI = Path(__file__).parents[1] / "ckpts" / "mini"
CLIPS = ("bundled:heldout",)
CLASSES = ("bottle", "tree", *(f"class {i}" for i in range(9)))
AS_PUBLISHED = dict(PROTOCOLS)
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of debug size: tok, c2v, fp."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = build_tokenizer("VQ_debug")
    save_model(folder / "tok.safetensors", tokenizer.state_dict(), {"model": to_dict(tokenizer.config)})
    for name, config, names in (
        ("c2v", PRESETS["GPT-debug"], CLASSES),
        ("fp", replace(PRESETS["GPT-debug"], num_classes=0, condition_lengths=[8, 4]), ()),
    ):
        model = GPT(config)
        torch.nn.init.normal_(model.head.weight, std=0.3)
        tokens = {"tokenizer_sha256": "", "class_names": list(names)}
        save_model(folder / f"{name}.safetensors", model.state_dict(), {"model": to_dict(config), "tokens": tokens})
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs one of the three commands in this process, two clips a shard; -> metrics.json."""
    monkeypatch.setattr(shards, "SHARD", 2)
    for name, size in (("mini-recon", 64), ("mini-c2v", 32), ("mini-fp", 32)):
        small = replace(PROTOCOLS[name], sources=CLIPS, size=size, count=5, draws=40)
        monkeypatch.setitem(protocols.PROTOCOLS, name, small)

    def command(module: str, out: Path, *flags: object, exit_code: int = 0, busy: Iterable[int] = ()) -> dict[str, Any]:
        """busy: shards that other processes hold while this one works."""
        words = ["--out", out, "--device", "cpu", "--cache", tmp_path / "cache", *flags]
        monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
        with ExitStack() as others, pytest.raises(SystemExit) as end:
            for shard in busy:
                (out / "shards").mkdir(parents=True, exist_ok=True)
                others.enter_context(lock(out / f"shards/{shard:06d}.lock"))
            runpy.run_module(f"evaluations.{module}", run_name="__main__")
        assert end.value.code == exit_code
        return json.loads((out / "metrics.json").read_text()) if (out / "metrics.json").exists() else {}

    return command


def of_mini(*flags: object) -> list[object]:
    router = ("--router-ckpt", MINI / "router.safetensors") if not flags else ()
    return ["--protocol", "mini-recon", "--vq-ckpt", MINI / "final.safetensors", *router, *flags]


# Who makes which of the three shards: one process after the other, in an order that is not the list's. A shard that
# occurs twice was lost with the process that made it first.
SHARED = {"two": ((2, 0), (0, 1)), "four": ((2,), (0,), (1,), ())}


def run_shared(run: Run, parts: Sequence[Sequence[int]], module: str, out: Path, *flags: object) -> dict[str, Any]:
    """By as many processes as there are parts; the results may be there once every shard is."""
    made: set[int] = set()
    for mine in parts:
        for shard in made & set(mine):
            (out / f"shards/{shard:06d}.safetensors").unlink()
        result = run(module, out, *flags, busy=set(range(3)) - set(mine) - made)
        made |= set(mine)
        assert bool(result) == (len(made) == 3)
    return result


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "per_clip.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_reconstruction_with_the_shipped_weights(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "one"
    result = run("reconstruction", out, *of_mini(), "--force")
    assert result["num_clips"] == 5 and result["num_skipped"] == 0
    assert result["num_padded"] == 0 and result["without_padded"] is None
    assert result["notes"] == [
        "fcd_effnet FORCED on 5 clips, fewer than 256: not to be compared",
        "fcd_effnet_infinity not computed: it needs more clips than the 2560 features, not 5",
    ]
    metrics = result["metrics"]
    names = "psnr psnr_of_mean_mse ssim stlpips_alex tokens tokens_with_length_tokens fcd_effnet kcd_effnet"
    assert set(metrics) == set(names.split()), "5 clips are too few for fcd_effnet_infinity"
    for name in ("psnr", "ssim", "stlpips_alex", "tokens", "fcd_effnet"):
        assert metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    assert metrics["tokens_with_length_tokens"]["value"] == metrics["tokens"]["value"] + 4
    rows = rows_of(out)
    assert [row["index"] for row in rows] == list("01234") and len(rows[0]["lengths"].split()) == 4
    assert np.mean([float(row["psnr"]) for row in rows]) == pytest.approx(metrics["psnr"]["value"])
    assert {path.name.split("_")[0] for path in (out / "pictures").iterdir()} == {"best", "median", "worst"}
    assert (card := (out / "card.txt").read_text()) in capsys.readouterr().out
    for words in ("mini-recon", "fcd_effnet", "stlpips_alex", "router_sha256", "torch", "matmul ieee", "batch size"):
        assert words in card
    assert result["card"]["list"]["sha256"] in card

    for name, parts in SHARED.items():  # not a bit differs
        assert run_shared(run, parts, "reconstruction", tmp_path / name, *of_mini(), "--force")["metrics"] == metrics
        assert (tmp_path / name / "per_clip.csv").read_bytes() == (out / "per_clip.csv").read_bytes()


@pytest.mark.parametrize(
    ("module", "protocol", "gpt"), [("class_to_video", "mini-c2v", "c2v"), ("frame_prediction", "mini-fp", "fp")]
)
def test_generation_with_the_shipped_weights(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, protocol: str, gpt: str
) -> None:
    monkeypatch.setitem(protocols.PROTOCOLS, protocol, replace(AS_PUBLISHED[protocol], count=4, draws=20))
    weights = ["--vq-ckpt", MINI / "final.safetensors", "--gpt-ckpt", MINI / f"gpt_{gpt}.safetensors"]
    flags = ["--gpt-model", "GPT-mini", "--check-special-token-mask", "--force"]
    result = run(module, tmp_path / "out", "--protocol", protocol, *weights, *flags)
    assert result["num_clips"] == 4 and result["num_skipped"] == 0
    assert result["metrics"]["fcd_effnet"]["value"] > 0 and result["metrics"]["tokens"]["value"] >= 32
    assert ("stlpips_alex" in result["metrics"]) == (gpt == "fp"), "a sample of a class has no original"
    assert protocol in (tmp_path / "out/card.txt").read_text()


def test_too_few_clips_and_a_changed_protocol_are_said(run: Run, tmp_path: Path) -> None:
    flags = of_mini("--budget", "uniform:8", "--count", "2", "--perceptual", "none")
    result = run("reconstruction", tmp_path / "a", *flags)
    assert "fcd_effnet" not in result["metrics"] and "stlpips_alex" not in result["metrics"]
    assert result["notes"][0] == "not the protocol mini-recon: count, perceptual changed"
    assert "fewer than 256" in result["notes"][1]
    assert result["metrics"]["tokens"]["value"] == 32

    record = {"index": 0, "name": "a", "mse": 0.1, "psnr": 10.0, "ssim": 0.5}
    side = torch.zeros(1, dtype=torch.long), torch.zeros(1, 4)
    single = summarise(PROTOCOLS["mini-recon"].change(perceptual="none"), [record], side, side, force=True)
    assert "fcd_effnet" not in single["metrics"] and "at least 2 clips" in single["notes"][0]


def test_a_second_system_on_the_same_clips(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, many, other = (tmp_path / name for name in ("few", "many", "other"))
    run("reconstruction", few, *of_mini("--budget", "uniform:8", "--extractor", "none"))
    run("reconstruction", many, *of_mini("--budget", "uniform:128", "--extractor", "none"))
    compare(few, many, "--out", tmp_path / "compared")
    found = json.loads((tmp_path / "compared/comparison.json").read_text())
    assert found["tokens"]["difference"] == 480 and found["tokens"]["win_rate"] == 0
    assert found["psnr"]["interval"]["low"] <= found["psnr"]["difference"] <= found["psnr"]["interval"]["high"]
    assert (tmp_path / "compared/differences.csv").read_text().count("\n") == 6

    run("reconstruction", other, *of_mini("--budget", "uniform:8", "--extractor", "none", "--count", "3"))
    capsys.readouterr()
    compare(few, other, exit_code=2)
    compare(few, tmp_path / "none", exit_code=2)
    assert "not the same protocol" in (said := capsys.readouterr().err) and "finish the evaluation" in said


def compare(*words: object, exit_code: int = 0) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["compare", *map(str, words)])
        runpy.run_module("evaluations.compare", run_name="__main__")
    assert end.value.code == exit_code


def of_gpt(models: Path, name: str, task: str) -> list[object]:
    weights = ["--vq-ckpt", models / "tok.safetensors", "--gpt-ckpt", models / f"{name}.safetensors"]
    flags = ["--gpt-model", "GPT-debug", "--per-proc-batch-size", "3", "--check-special-token-mask", "--force"]
    return ["--protocol", task, *weights, *flags]


@pytest.mark.parametrize(
    ("module", "name", "task"), [("class_to_video", "c2v", "mini-c2v"), ("frame_prediction", "fp", "mini-fp")]
)
def test_generation_is_scored_the_same_by_two_and_by_four_processes(
    module: str, name: str, task: str, run: Run, models: Path, tmp_path: Path
) -> None:
    result = run(module, tmp_path / "one", *of_gpt(models, name, task))
    assert result["num_clips"] == 5 and result["metrics"]["fcd_effnet"]["value"] > 0
    assert ("psnr" in result["metrics"]) == (name == "fp"), "a sample of a class has no original"
    assert len(list((tmp_path / "one/pictures").iterdir())) == 3
    assert len(list((tmp_path / "cache").glob("real-*.safetensors"))) == 1, "the real side is kept"
    for processes, parts in SHARED.items():
        flags = of_gpt(models, name, task)
        assert run_shared(run, parts, module, tmp_path / processes, *flags)["metrics"] == result["metrics"]
    if name == "fp":
        assert rows_of(tmp_path / "one")[0]["lengths"].startswith("8 4 ")


def test_a_folder_of_lossless_clips_is_scored(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Originals against themselves: nothing may differ; an mp4 among them is refused."""
    dataset = build_dataset(DataConfig(sources=list(CLIPS), size=64, augment=False))
    (ours := tmp_path / "ours").mkdir()
    for i in (3, 0, 4, 1, 2):
        np.save(ours / f"{Path(dataset.names[i]).stem}.npy", to_uint8(dataset.get(i).video_CTHW))
    result = run("reconstruction", tmp_path / "a", "--protocol", "mini-recon", "--ours", ours, "--force")
    metrics = result["metrics"]
    assert (metrics["psnr"]["value"], metrics["stlpips_alex"]["value"]) == (100, 0)
    assert metrics["fcd_effnet"]["value"] == pytest.approx(0, abs=1e-6)

    last = ours / f"{Path(dataset.names[4]).stem}.npy"
    write_video(last.with_suffix(".mp4"), np.load(last), 25)
    last.unlink()
    run("reconstruction", tmp_path / "b", "--protocol", "mini-recon", "--ours", ours, exit_code=2)
    assert "not lossless" in capsys.readouterr().err
    last.with_suffix(".mp4").unlink()
    run("reconstruction", tmp_path / "c", "--protocol", "mini-recon", "--ours", ours, exit_code=2)
    assert "4 clips for the 5" in capsys.readouterr().err


def test_samples_of_other_clips_are_not_compared(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clip by clip a sample is refused unless it continues that clip; for a distance of sets its class is noted."""
    for i in range(5):
        sample = tmp_path / f"samples/class_000_{i}"
        sample.mkdir(parents=True)
        np.save(sample / "frames.npy", np.full((16, 32, 32, 3), 40 * i, np.uint8))
        (sample / "record.json").write_text(json.dumps({"name": sample.name, "class": 0, "class_name": "disc still"}))
    run("reconstruction", tmp_path / "a", "--protocol", "mini-recon", "--ours", tmp_path, exit_code=2)
    assert "class_000_0 continues no clip" in capsys.readouterr().err
    few = ["--count", "5", "--force", "--perceptual", "none", "--ours", tmp_path]
    notes = run("class_to_video", tmp_path / "b", "--protocol", "mini-c2v", *few)["notes"]
    assert any("samples are of another class" in note for note in notes)


def lossless(folder: Path, *names: str, num: int = 16, seed: int = 0) -> list[np.ndarray]:
    """Different lossless clips of noise, 64 pixels wide."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    clips = [rng.integers(0, 255, (num, 64, 64, 3), np.uint8) for _ in names]
    for name, frames in zip(names, clips, strict=True):
        write_video(folder / f"{name}.mp4", frames, 25, lossless=True)
    return clips


@pytest.fixture
def of_folder(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """of_folder(name of the results, flags ..): folder-recon at 64 pixels, no networks unless asked for."""
    monkeypatch.setitem(protocols.PROTOCOLS, "folder-recon", replace(AS_PUBLISHED["folder-recon"], size=64, draws=20))

    def command(out: str, *flags: object, exit_code: int = 0) -> dict[str, Any]:
        words = ["--protocol", "folder-recon", "--perceptual", "none", "--extractor", "none", *flags]
        return run("reconstruction", tmp_path / out, *words, exit_code=exit_code)

    return command


def test_files_are_paired_by_name_or_in_natural_order(
    of_folder: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, padded = tmp_path / "real", tmp_path / "padded"
    names, numbers = [f"scene_{i:02d}" for i in range(12)], range(12)
    clips = lossless(real, *names)
    lossless(padded, *(f"clip_{i}" for i in numbers))  # listed 0, 1, 10, 11, 2, ..

    def given(name: str, *files: object) -> Path:
        (tmp_path / name).mkdir()
        for file, frames in zip(files, clips, strict=True):
            np.save(tmp_path / name / f"{file}.npy", frames)
        return tmp_path / name

    for name, files in (("stems", names), ("numbers", numbers), ("others", [f"out-{i + 7}" for i in numbers])):
        result = of_folder(f"out_{name}", "--data", real, "--ours", given(name, *files))
        assert result["metrics"]["psnr"]["low"] == 100, name
    exact = of_folder("exact", "--data", padded, "--ours", given("exact_stems", *(f"clip_{i}" for i in numbers)))
    assert exact["metrics"]["psnr"]["value"] == 100
    for name, files, data, words in (
        ("open", numbers, padded, "not in natural order"),
        ("some", ["scene_03", *range(11)], real, "1 files are named after clips"),
    ):
        of_folder(f"out_{name}", "--data", data, "--ours", given(name, *files), exit_code=2)
        assert words in capsys.readouterr().err


def test_longer_clips_are_refused_in_every_format(
    of_folder: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "arrays").mkdir()
    for frames, name in zip(lossless(tmp_path / "real", "a", "b", num=33), "ab", strict=True):
        np.save(tmp_path / f"arrays/{name}.npy", frames)
    for ours, words in (("real", "more than 16 frames"), ("arrays", "33 frames")):
        of_folder(f"out_{ours}", "--data", tmp_path / "real", "--ours", tmp_path / ours, exit_code=2)
        assert words in capsys.readouterr().err


def test_other_content_under_the_same_names_and_sizes_is_other_content(
    of_folder: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set is at distance 0 from itself, also after its files were replaced by others of the same size."""
    flags = ["--data", tmp_path / "real", "--ours", tmp_path / "ours", "--extractor", "effnet", "--force"]
    for side in ("real", "ours"):
        (tmp_path / side).mkdir()
    for version in range(2):
        rng = np.random.default_rng(version)
        for name in "abcd":
            with av.open(str(tmp_path / f"real/{name}.y4m"), "w") as container:
                stream = container.add_stream("wrapped_avframe", rate=25)
                stream.width = stream.height = 64
                stream.pix_fmt = "yuv444p"
                for image in np.kron(rng.integers(0, 255, (16, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8):
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv444p")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
            np.save(tmp_path / f"ours/{name}.npy", next(iter_clips(tmp_path / f"real/{name}.y4m", 16, 64)).frames_THWC)
        assert len({file.stat().st_size for file in (tmp_path / "real").iterdir()}) == 1
        result = of_folder(f"out{version}", *flags)
        assert result["metrics"]["fcd_effnet"]["value"] == pytest.approx(0, abs=1e-6)
    of_folder("out0", *flags, exit_code=2)
    assert "made from another" in capsys.readouterr().err, "a folder of the earlier clips is not continued"


def test_padded_clips_are_counted_and_left_out_of_a_second_mean(
    of_folder: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lossless(tmp_path / "real", "a", "b")
    lossless(tmp_path / "real", "c", num=9, seed=1)
    result = of_folder("out", "--data", tmp_path / "real", *of_mini("--budget", "uniform:8")[2:])
    assert (result["num_clips"], result["num_padded"]) == (3, 1) and "1 of 3 clips are padded" in result["notes"][1]
    psnr = [float(row["psnr"]) for row in rows_of(tmp_path / "out")]
    assert result["metrics"]["psnr"]["value"] == pytest.approx(np.mean(psnr))
    assert result["without_padded"]["psnr"]["value"] == pytest.approx(np.mean(psnr[:2]))
    assert "1 padded" in capsys.readouterr().out
    assert of_folder("other", "--data", tmp_path / "real", *of_mini("--budget", "uniform:64")[2:])["num_padded"] == 1
    compare(tmp_path / "out", tmp_path / "other", "--out", tmp_path / "compared")
    assert json.loads((tmp_path / "compared/comparison.json").read_text())["psnr"]["num_clips"] == 3


def test_a_second_process_may_join_but_not_overwrite(
    of_folder: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lossless(tmp_path / "real", "a", "b")
    flags = ["--data", tmp_path / "real", "--ours", tmp_path / "real"]
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out/.at_work.lock", shared=True):
        of_folder("out", *flags, "--overwrite", exit_code=2)
        assert "another process is at work" in capsys.readouterr().err
        assert of_folder("out", *flags)["num_clips"] == 2
    assert of_folder("out", *flags, "--overwrite")["num_clips"] == 2


def test_equal_shards_have_equal_bytes(tmp_path: Path) -> None:
    """safetensors writes two keys of metadata in a random order."""
    tensors, written = {"t": torch.arange(3), "u": torch.ones(2, 2)}, set()
    for _ in range(20):
        shards.write_shard(tmp_path / "s.safetensors", [{"file": "é\n"}], tensors)
        written.add((tmp_path / "s.safetensors").read_bytes())
    records, found = shards.read_shard(tmp_path / "s.safetensors")
    assert len(written) == 1 and records == [{"file": "é\n"}] and found.keys() == tensors.keys()


def test_damaged_results_are_one_line(of_folder: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards carry a digest; metrics.json and per_clip.csv are checked field by field."""
    lossless(tmp_path / "real", "a", "b", "c")
    flags = ["--data", tmp_path / "real", "--ours", tmp_path / "real"]
    of_folder("out", *flags)
    out, shard = tmp_path / "out", tmp_path / "out/shards/000000.safetensors"
    whole = shard.read_bytes()
    assert b'\\"psnr\\": 100' in whole
    for damaged in (whole.replace(b'\\"psnr\\": 100', b'\\"psnr\\": 999'), whole[:40], b""):
        shard.write_bytes(damaged)
        of_folder("out", *flags, exit_code=2)
        assert "damaged" in capsys.readouterr().err
    shard.write_bytes(whole)
    metrics, table = (out / "metrics.json").read_text(), (out / "per_clip.csv").read_text()
    for name, text, words in (
        ("metrics.json", metrics.replace('"num_clips": 3', '"num_clips": NaN'), "NaN is no finite number"),
        ("metrics.json", metrics.replace('"num_clips": 3', '"num_clips": true'), "num_clips = True is not int"),
        ("metrics.json", "[" * 100_000, "cannot be read as JSON"),
        ("metrics.json", '{"card": []}', "expected an object"),
        ("per_clip.csv", table.replace("100.0", "nan"), "psnr is 'nan'"),
        ("per_clip.csv", table.replace("b.mp4", "a.mp4"), "the name of another row"),
        ("per_clip.csv", table[: len(table) // 2], "scored clips"),
    ):
        (out / name).write_text(text)
        compare(out, out, exit_code=2)
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
        (out / "metrics.json").write_text(metrics)
        (out / "per_clip.csv").write_text(table)


def test_the_price_of_a_set_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another CPU finds another last digit: the first process's price is everybody's, and decides no identity."""
    from evaluations.reconstruction import Reconstruction  # other tests run it as a command

    router = SimpleNamespace(sha256="b", trade_off=lambda budget: None)
    for found in (0.25, 0.25000001):
        monkeypatch.setattr(Reconstruction, "_price_of_the_set", lambda self, clips, found=found: found)
        budget = parse_budget("average:40", AssignmentSpace((8, 16), 4))
        system = Reconstruction(SimpleNamespace(sha256="a"), router, budget)
        claim_folder(tmp_path, system.facts())
        system.settle_price(tmp_path, [])
        assert system.price == system.facts()["price"] == 0.25


def test_names_are_data(of_folder: Run, tmp_path: Path) -> None:
    """A name that a spreadsheet would run, and a class that is HTML."""
    lossless(tmp_path / "real/<img src=x onerror=alert(1)>", "=cmd|' 'C0", "b")
    of_folder("out", "--data", tmp_path / "real", *of_mini("--budget", "uniform:8")[2:])
    rows = rows_of(tmp_path / "out")
    assert all(row["name"].startswith("<img") for row in rows), "a folder name comes first"
    assert csv_table(["name", "value"], [{"name": "=1+1", "value": -1.5}]).decode() == "name,value\n'=1+1,-1.5\n"
    compare(tmp_path / "out", tmp_path / "out", "--out", tmp_path / "compared")
    page = write_report(tmp_path / "out", json.loads((tmp_path / "out/metrics.json").read_text())).read_text()
    assert "<img src=x" not in page


def test_budgets_of_generated_clips_are_kept_and_printed(run: Run, models: Path, tmp_path: Path) -> None:
    flags = of_gpt(models, "c2v", "mini-c2v")
    result = run("class_to_video", tmp_path / "a", *flags, "--tokens-per-block", "2,4,2,8", "--perceptual", "none")
    assert result["metrics"]["tokens"]["value"] == 16
    assert {row["lengths"] for row in rows_of(tmp_path / "a")} == {"2 4 2 8"}
    assert "tokens_per_block [2, 4, 2, 8]" in (tmp_path / "a/card.txt").read_text()
    run("class_to_video", tmp_path / "b", *flags, "--max-tokens", "10", "--perceptual", "none")
    assert max(int(row["tokens"]) for row in rows_of(tmp_path / "b")) <= 10
    assert "max_tokens 10" in (tmp_path / "b/card.txt").read_text()


def test_unreadable_clips_are_skipped_and_said(of_folder: Run, tmp_path: Path) -> None:
    lossless(tmp_path / "in", "a", "c")
    (tmp_path / "in/b.mp4").write_text("no video")
    flags = ["--data", tmp_path / "in", "--perceptual", "stlpips_alex", *of_mini("--budget", "uniform:8")[2:]]
    result = of_folder("a", *flags)
    assert (result["num_clips"], result["num_skipped"]) == (2, 1)
    assert [bool(row["skipped"]) for row in rows_of(tmp_path / "a")] == [False, True, False]


def test_mistakes_are_one_line(run: Run, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    run("reconstruction", out, *of_mini("--budget", "uniform:8", "--extractor", "none"))
    capsys.readouterr()
    cases: list[tuple[str, list[object], str]] = [
        ("reconstruction", of_mini("--budget", "uniform:16", "--extractor", "none"), "--overwrite"),
        ("reconstruction", of_mini("--budget", "router"), "--router-ckpt"),
        ("reconstruction", ["--protocol", "mini-recon"], "--vq-ckpt missing"),
        ("reconstruction", of_mini("--ours", tmp_path), "leave out --vq-ckpt"),
        ("reconstruction", of_mini("--router-config", "R.yaml"), "--router-ckpt"),
        ("reconstruction", of_mini("--extractor-weights", "i3d.pt"), "leave --extractor-weights"),
        ("reconstruction", [], "missing: --protocol"),
        ("reconstruction", ["--protocol", "mini-c2v"], "is for class_to_video"),
        ("reconstruction", of_mini("--extractor", "i3d", "--budget", "uniform:8"), "--extractor-weights"),
        ("reconstruction", ["--protocol", "mini-recon", "--vq-ckpt", models / "tok.safetensors"], "32 pixels"),
        ("class_to_video", of_gpt(models, "fp", "mini-c2v"), "eval_frame_pred.sh"),
        ("class_to_video", [*of_gpt(models, "c2v", "mini-c2v"), "--cfg-scale", "big"], "--cfg-scale"),
        ("frame_prediction", of_gpt(models, "c2v", "mini-fp"), "eval_c2v.sh"),
    ]
    for module, flags, words in cases:
        run(module, out, *flags, exit_code=2)
        said = capsys.readouterr().err
        assert words in said and said.splitlines()[-1].startswith("error: "), said
