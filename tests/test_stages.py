"""All training stages and the main job, one after the other, by the commands that a user types."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from autoregressive.presets import check_tokenizer_fits, load_gpt
from autoregressive.token_archive import TokenArchive
from tokenizer import load_router, load_tokenizer
from tokenizer.common.checkpoint import read_model
from tokenizer.common.errors import UserError
from tokenizer.data.clip_stream import ClipRule, ClipWalk, find_sources
from tokenizer.data.video_io import to_model_range
from tokenizer.router.reward import QualityTable, reward_of_quality, table_stats
from tokenizer.token_file import TokenFile

ROOT = Path(__file__).parents[1]
HELD_OUT = ROOT / "tokenizer" / "data" / "bundled" / "tree_000.mp4"


def run(*command: str | Path, **variables: str) -> str:
    environment = os.environ | {"PYPATH": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_here(module: str, *arguments: str | Path) -> str:
    """`python -m MODULE ARGUMENTS` in this process, which has torch already; its standard output."""
    printed, words = io.StringIO(), [module, *map(str, arguments)]
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(printed), mock.patch.object(sys, "argv", words):
        assert not importlib.import_module(module).main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all four stages of configs/debug have run, started by their scripts."""
    return all_stages("configs/debug", tmp_path_factory.mktemp("debug"), by_scripts=True)


@pytest.fixture(scope="module")
def full_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of configs/debug/full: both discriminators, alignment, a router on V-JEPA 2; its encoders are random."""
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("full")
    return all_stages("configs/debug/full", out, f"feature_cache={out}/features", by_scripts=False)


MODULES = {
    "1_proxy_tokenizer.sh": "tokenizer.train",
    "2_curate_router_data.sh": "tokenizer.router.curate",
    "3_router.sh": "tokenizer.router.train",
    "4_final_tokenizer.sh": "tokenizer.train",
}


def all_stages(configs: str, out: Path, *router_overrides: str, by_scripts: bool) -> Path:
    def stage(script: str, config: str, *overrides: str) -> None:
        if by_scripts and config != "curate_heldout":  # a second table by the same script shows nothing new
            run("bash", f"scripts/train/{script}", f"{configs}/{config}.yaml", *overrides)
        else:
            run_here(MODULES[script], f"{configs}/{config}.yaml", *overrides)

    stage("1_proxy_tokenizer.sh", "proxy", f"run.dir={out}/proxy")
    for table in ("curate_train", "curate_heldout"):
        stage("2_curate_router_data.sh", table, f"dir={out}/{table}", f"proxy={out}/proxy")
    tables = [f"table={out}/curate_train/table.safetensors", f"val_table={out}/curate_heldout/table.safetensors"]
    stage("3_router.sh", "router", f"run.dir={out}/router", *tables, *router_overrides)
    stage("4_final_tokenizer.sh", "final", f"run.dir={out}/final", f"policy.router_ckpt={out}/router")
    return out


def test_every_stage_leaves_what_the_next_one_reads(results: Path) -> None:
    for name in ("proxy", "router", "final"):
        for part in ("config.yaml", "metrics.jsonl", "checkpoints", "final/model.safetensors"):
            assert (results / name / part).exists(), f"{name}/{part}"
    assert list((results / "final" / "samples").glob("*.png"))
    table = QualityTable.load(results / "curate_train" / "table.safetensors")
    assert table.lpips_BA.shape == (12, 81) and table.lpips_BA.isfinite().all()
    assert load_tokenizer(results / "final").space.levels == load_router(results / "router").space.levels == (2, 4, 8)


def test_main_job_with_the_trained_pair(results: Path) -> None:
    out = results / "main job"
    weights = ["--router_config", "configs/debug/router.yaml", "--router_ckpt", results / "router"]
    weights += ["--tok_config", "configs/debug/final.yaml", "--vq_ckpt", results / "final"]
    job = [sys.executable, "tokenizer/router/reconstruction_qual_with_router.py", "--vid_path", HELD_OUT]
    said = run(*job, "--save_dir", out, *weights, "--budget", "tokens:12", "--device", "cpu")
    clip = json.loads((out / "metrics.json").read_text())["clips"][0]
    assert sum(clip["assignment"]) == clip["tokens"] <= 12
    assert (out / "report.html").stat().st_size > 10_000 and str(out / "report.html") in said


def test_one_router_of_qualities_serves_every_trade_off(results: Path) -> None:
    """The main job, whole videos and stage 5a with --trade-off and quality:Q; all of them name it."""
    table = results / "curate_train" / "table.safetensors"
    learn = ["labels=quality", f"table={table}", f"val_table={results}/curate_heldout/table.safetensors"]
    run_here(MODULES["3_router.sh"], "configs/debug/router.yaml", f"run.dir={results}/quality", *learn)
    router = load_router(results / "quality")
    pair = ["--router_ckpt", results / "quality", "--vq_ckpt", results / "final"]
    stats = router.stats
    assert stats == table_stats(QualityTable.load(table)) and router.quality_weight == 1.2

    def main_job(name: str, *flags: str) -> dict[str, Any]:
        words = ["job", "--vid_path", HELD_OUT, "--save_dir", results / name, *pair, "--no-videos", *flags]
        with mock.patch.object(sys, "argv", list(map(str, words))), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / "tokenizer/router/reconstruction_qual_with_router.py"), run_name="job")["main"]()
        return json.loads((results / name / "metrics.json").read_text())

    clip = next(iter(ClipWalk(find_sources(HELD_OUT, lambda path: False), ClipRule(16, 32), 1, 1)("reading")))
    video_BCTHW = to_model_range(clip.decoded.frames_THWC)[None]
    for weight in ("0.0", "0.7", "2.0"):
        metrics = main_job(f"at {weight}", "--trade-off", weight)
        reward_BA = reward_of_quality(router.predict(video_BCTHW), router.space, float(weight))
        assert metrics["clips"][0]["tokens"] == router.space.tokens_A[router.space.best_row(reward_BA)].item()
        assert metrics["trade_off"] == float(weight) and metrics["quality_floor"] is None
        assert f"w_q = {float(weight):g}" in (results / f"at {weight}" / "report.html").read_text()
    assert main_job("at its own")["trade_off"] == 1.2

    predicted_A = router.distances(video_BCTHW)[0]
    for name, most in (("loose", stats.lpips_max), ("strict", stats.lpips_min)):
        metrics = main_job(name, "--budget", f"quality:{most!r}")
        (clip,) = metrics["clips"]
        kept = bool((predicted_A <= most).any())
        measured = metrics["lpips_backbone"] == stats.perceptual_net
        assert clip["keeps_quality"] is kept and metrics["trade_off"] is None
        assert metrics["quality_floor"] == {
            "distance": most,
            "perceptual_net": stats.perceptual_net,
            "num_not_predicted": int(not kept),
            "num_kept_measured": int(clip["lpips"] <= most) if measured else None,
        }
        fits_A = predicted_A <= most if kept else predicted_A == predicted_A.min()
        assert clip["tokens"] == router.space.tokens_A[fits_A].min()
        assert "predicted to keep" in (results / name / "report.html").read_text()

    job = [sys.executable, "scripts/mini/trade_offs.py", "--table", f"{results}/curate_heldout/table.safetensors"]
    said = run(*job, "--router-ckpt", results / "quality", "--single", results / "router", "--out", results / "figures")
    assert "6 clips" in said and (results / "figures" / "reliability.svg").read_text().startswith("<svg")

    whole = [*pair, "--out", results / "whole", "--device", "cpu", HELD_OUT]
    run_here("tokenizer.tokenize", *whole, "--trade-off", "0.7")
    (file,) = (results / "whole").glob("*.safetensors")
    assert TokenFile(file).facts.trade_off == 0.7
    with pytest.raises(UserError, match="trade-off"):
        run_here("tokenizer.tokenize", *whole, "--trade-off", "0.9")
    config = ["configs/debug/extract_fp.yaml", f"tokenizer={results}/final", f"router={results}/quality"]
    config += [f"dir={results}/floor", f"budget=quality:{stats.lpips_max!r}"]
    run_here("autoregressive.extract_codes", *config)
    assert TokenArchive(results / "floor").facts.budget.startswith("quality:")


def test_tokens_and_both_gpts(results: Path) -> None:
    """Stages 5a, once by two workers at the same time, and 5b, once by its script."""
    pair = [f"tokenizer={results}/final", f"router={results}/router"]
    for name in ("extract_c2v", "extract_c2v_heldout", "extract_fp"):
        config = [f"configs/debug/{name}.yaml", f"dir={results}/{name}", *pair]
        if name == "extract_c2v":
            run("bash", "scripts/train/5a_extract_codes.sh", *config, WORKERS="2")
        else:
            run_here("autoregressive.extract_codes", *config)
    said = run_here("autoregressive.token_archive", "check", results / "extract_c2v")
    assert "24 clips" in said and "2 classes" in said and "no problem found" in said

    gpts = {"gpt_c2v": ("extract_c2v", "extract_c2v_heldout"), "gpt_fp": ("extract_fp", "extract_fp")}
    for name, archives in gpts.items():
        tokens = [f"archive={results}/{archives[0]}", f"val_archive={results}/{archives[1]}"]
        config = [f"configs/debug/{name}.yaml", f"run.dir={results}/{name}", f"tokenizer={results}/final", *tokens]
        if name == "gpt_c2v":
            run("bash", "scripts/train/5b_gpt_c2v.sh", *config)
        else:
            run_here("autoregressive.train", *config)
        trained, final = load_gpt(results / name, size="GPT-debug"), load_tokenizer(results / "final")
        check_tokenizer_fits(trained, final)
        assert trained.tokenizer_sha256 == final.sha256


def test_a_finished_stage_ends_at_once(results: Path) -> None:
    before = (results / "proxy" / "metrics.jsonl").read_bytes()
    run_here("tokenizer.train", "configs/debug/proxy.yaml", f"run.dir={results}/proxy")
    assert (results / "proxy" / "metrics.jsonl").read_bytes() == before


def test_every_stage_runs_with_the_full_recipe(full_results: Path) -> None:
    """And says everywhere that its encoders are random; what it ships is used like any other."""
    for name, wanted in (("proxy", {"gan", "align"}), ("final", {"gan", "align"}), ("router", {"percentile"})):
        lines = [json.loads(line) for line in (full_results / name / "metrics.jsonl").read_text().splitlines()]
        assert wanted <= lines[2].keys()
        assert all(any(key.endswith("random_frozen_encoders") for key in line) for line in lines)
        assert "RANDOM" in read_model(full_results / name).card["kind"]
    router, tokenizer = load_router(full_results / "router"), load_tokenizer(full_results / "final")
    tokens = tokenizer.encode(torch.rand(1, 3, 16, 32, 32), router=router, budget="tokens:12")
    assert len(tokens.code_L) <= 12
