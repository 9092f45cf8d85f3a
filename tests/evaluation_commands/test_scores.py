"""Scores of models as users ask for them: the same numbers however the work is shared, comparison, mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_files import AS_PUBLISHED, MINI, SHARED, Run, compare, of_gpt, of_mini, rows_of, run_shared

from evaluations import protocols
from evaluations.protocols import PROTOCOLS
from evaluations.summary import summarise
from tokenizer.assignment import AssignmentSpace
from tokenizer.budget import parse_budget
from tokenizer.common.work_units import claim_folder


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


def test_budgets_of_generated_clips_are_kept_and_printed(run: Run, models: Path, tmp_path: Path) -> None:
    flags = of_gpt(models, "c2v", "mini-c2v")
    result = run("class_to_video", tmp_path / "a", *flags, "--tokens-per-block", "2,4,2,8", "--perceptual", "none")
    assert result["metrics"]["tokens"]["value"] == 16
    assert {row["lengths"] for row in rows_of(tmp_path / "a")} == {"2 4 2 8"}
    assert "tokens_per_block [2, 4, 2, 8]" in (tmp_path / "a/card.txt").read_text()
    run("class_to_video", tmp_path / "b", *flags, "--max-tokens", "10", "--perceptual", "none")
    assert max(int(row["tokens"]) for row in rows_of(tmp_path / "b")) <= 10
    assert "max_tokens 10" in (tmp_path / "b/card.txt").read_text()


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
