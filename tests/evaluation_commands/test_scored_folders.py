"""Scores of a folder of clips: which file is which clip, what is refused, skipped or joined, damaged results."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from evaluation_files import CLIPS, Run, compare, lossless, of_mini, rows_of

from evaluations import shards
from evaluations.report import write_report
from evaluations.summary import csv_table
from tokenizer.common.work_units import lock
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.video_io import iter_clips, to_uint8, write_video


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


def test_unreadable_clips_are_skipped_and_said(of_folder: Run, tmp_path: Path) -> None:
    lossless(tmp_path / "in", "a", "c")
    (tmp_path / "in/b.mp4").write_text("no video")
    flags = ["--data", tmp_path / "in", "--perceptual", "stlpips_alex", *of_mini("--budget", "uniform:8")[2:]]
    result = of_folder("a", *flags)
    assert (result["num_clips"], result["num_skipped"]) == (2, 1)
    assert [bool(row["skipped"]) for row in rows_of(tmp_path / "a")] == [False, True, False]
