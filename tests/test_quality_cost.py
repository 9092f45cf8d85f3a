"""Quality-cost curves end to end on a tiny random tokenizer, by one process and by two, and the report of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoregressive.model import GPT
from autoregressive.presets import PRESETS
from evaluations import report
from evaluations.metrics.extractors import I3D_SHA256
from evaluations.protocols import PROTOCOLS, card_of, card_text, find_protocol
from evaluations.quality_cost import __main__ as quality_cost
from evaluations.quality_cost import sweep
from evaluations.quality_cost.charts import charts
from evaluations.quality_cost.points import Curve, bd_rate
from evaluations.report import PAPER, Run, find_runs, own_tables, paper_tables
from tokenizer.common.checkpoint import save_model
from tokenizer.common.config import to_dict
from tokenizer.common.errors import UserError
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.presets import build_tokenizer
from tokenizer.router.model import Router, RouterConfig
from tokenizer.router.reward import QualityTable

ROOT = Path(__file__).parents[1]
LEVELS = [2, 4, 8]  # of VQ_debug: 8 to 32 tokens in 4 blocks
TOKEN_POINTS = {"uniform": 3, "threshold": 2, "max-reward": 2, "router": 1, "tokens": 2, "average": 3}
CODED = {f"{name}, entropy-coded": num for name, num in TOKEN_POINTS.items()}
POINTS = TOKEN_POINTS | CODED | {"h264": 4}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Debug tokenizer and router with random weights; five rendered scenes; a table of random numbers."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    tokenizer, router = (
        build_tokenizer("VQ_debug"),
        Router(RouterConfig(size=32, levels=LEVELS, layers=1, width=32, heads=2)),
    )
    torch.nn.init.normal_(router.head.weight)
    for name, kind, model in (("tok", "tokenizer", tokenizer), ("router", "router", router)):
        save_model(folder / f"{name}.safetensors", model.state_dict(), {"model": to_dict(model.config)}, {"kind": kind})
    gpt = GPT(PRESETS["GPT-debug"])
    tokens = {"tokenizer_sha256": "", "class_names": []}
    save_model(folder / "gpt.safetensors", gpt.state_dict(), {"model": to_dict(gpt.config), "tokens": tokens}, {})
    (folder / "router.yaml").write_text(json.dumps({"model": to_dict(router.config)}))
    models = [f"--{name}-ckpt={folder / file}.safetensors" for name, file in (("vq", "tok"), ("router", "router"))]
    data = DataConfig(["synthetic:heldout:5"], size=32, augment=False)
    names, lpips_SA = build_dataset(data).names, torch.rand(5, tokenizer.space.num_rows)
    table = QualityTable(lpips_SA, 20 - lpips_SA, lpips_SA / 9, names, tuple(LEVELS), 4, {"data": to_dict(data)})
    table.save(folder / "table.safetensors")
    models.append(f"--table={folder / 'table.safetensors'}")
    clips = ["--perceptual=stlpips_alex", "--extractor=effnet", "--codecs=h264", "--draws=20"]
    return [*models, *clips, "--weights=0.8,1.2", "--thresholds=0.3,0.5"]


@pytest.fixture
def run(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """run(folder, *more flags) in this process -> the folder."""

    def job(folder: Path, *more: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["quality_cost", *flags, *more, "--out", str(folder)])
        quality_cost.main()
        return folder

    return job


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_from_clips_to_curves(run: Callable[..., Path], flags: list[str], tmp_path: Path) -> None:
    two, gpt = tmp_path / "two", f"--gpt-ckpt={Path(flags[0].partition('=')[2]).with_name('gpt.safetensors')}"
    command = [sys.executable, "-m", "evaluations.quality_cost", *flags, gpt, "--force", "--out", str(two)]
    workers = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) for _ in range(2)]
    one = run(tmp_path / "one", gpt, "--force")
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    for name in ("metrics.json", "points.csv", "clips.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), "one process or two: the same bytes"

    metrics = read(one)
    strategies = [point["strategy"] for point in metrics["points"]]
    assert {name: strategies.count(name) for name in POINTS} == POINTS
    assert metrics["metrics"] == ["psnr", "ssim", "stlpips_alex"] and metrics["frechet"] == ["fcd_effnet"]
    with open(one / "clips.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * sum(POINTS.values())
    for point in metrics["points"]:
        mine = [row for row in rows if (row["strategy"], row["setting"]) == (point["strategy"], point["setting"])]
        assert point["stlpips_alex"] == pytest.approx(np.mean([float(row["stlpips_alex"]) for row in mine]))
        assert point["bytes"] == pytest.approx(np.mean([int(row["bytes"]) for row in mine]))
        for row in mine:
            if row["assignment"]:
                assert int(row["tokens"]) == sum(map(int, row["assignment"].split()))
    plain, coded = (point for point in metrics["points"] if point["setting"] == "8" and "uniform" in point["strategy"])
    assert 0 <= plain["bytes"] - coded["bytes"] < 1, "a GPT that knows nothing codes tokens plainly"
    check_savings(metrics)
    check_report(one, metrics)


def test_the_curve_of_the_shipped_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mini = ROOT / "ckpts/mini"
    models = [f"--vq-ckpt={mini / 'final.safetensors'}", f"--router-ckpt={mini / 'router.safetensors'}"]
    clips = [f"--table={mini / 'heldout_table.safetensors'}", "--max-clips=3"]
    points = ["--weights=1.4", "--thresholds=0.3", "--budgets", "tokens:128", "--codecs=h264", "--draws=20"]
    monkeypatch.setattr(sys, "argv", ["quality_cost", *models, *clips, *points, "--out", str(tmp_path)])
    quality_cost.main()
    found = {(point["strategy"], point["setting"]): point for point in read(tmp_path)["points"]}
    levels = [found["uniform", str(level)] for level in (8, 16, 32, 64, 128)]
    assert [point["tokens"] for point in levels] == [32, 64, 128, 256, 512]
    assert levels[0]["stlpips_alex"] > levels[4]["stlpips_alex"] and levels[0]["psnr"] < levels[4]["psnr"]
    assert (tmp_path / "report.html").is_file()


def check_savings(metrics: dict[str, Any]) -> None:
    """The stored numbers are the BD-rates of the stored points."""

    def curve(strategy: str, cost: str) -> Curve:
        mine = [point for point in metrics["points"] if point["strategy"] == strategy]
        return Curve(np.array([p[cost] for p in mine]), -np.array([p["stlpips_alex"] for p in mine]))

    entries = [entry for entry in metrics["savings"] if entry["metric"] == "stlpips_alex"]
    assert {entry["strategy"] for entry in entries} == POINTS.keys() - {"uniform"}
    for entry in entries:
        cost = "tokens" if entry["strategy"] in TOKEN_POINTS else "bytes"
        assert entry["cost"] == cost
        assert entry["saving"] == bd_rate(curve("uniform", cost), curve(entry["strategy"], cost))


def check_report(folder: Path, metrics: dict[str, Any]) -> None:
    page = (folder / "report.html").read_text()
    assert "miniature" in page and "FORCED" in page and "<script" not in page
    assert page.count('<svg class="chart"') == len(list(folder.glob("*.svg"))) == 8
    for svg in folder.glob("*.svg"):
        assert svg.read_text().startswith('<svg class="chart" xmlns=') and "<style" in svg.read_text()


def test_more_strategies_measure_only_what_is_new(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(tmp_path, "--max-clips", "2", "--extractor", "none", "--codecs", "none", "--strategies", "uniform")
    uniform = read(out)["points"]
    asked: list[str] = []
    measure = sweep.Measure.__call__

    def listening(self: sweep.Measure, video: torch.Tensor, keys: list[str]) -> Any:
        asked.extend(keys)
        return measure(self, video, keys)

    monkeypatch.setattr(sweep.Measure, "__call__", listening)
    more = ("--extractor", "none", "--codecs", "none", "--strategies", "uniform,average", "--budgets", "average:12")
    assert read(run(out, "--max-clips", "2", *more))["points"][:3] == uniform
    assert 0 < len(asked) <= 2
    with pytest.raises(UserError, match="another .*num_clips"):
        run(out, "--max-clips", "3", *more)
    for unit in out.glob("units/*/000000.safetensors"):
        unit.write_bytes(unit.read_bytes().replace(b"psnr", b"psnz"))
    with pytest.raises(UserError, match=r"000000\.safetensors: is damaged .* remove it and run again"):
        run(out, "--max-clips", "2", *more)


def test_a_protocol_decides_about_clips_and_networks(
    run: Callable[..., Path], flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(PROTOCOLS["mini-recon"], sources=("synthetic:heldout:5",), size=32)
    monkeypatch.setitem(PROTOCOLS, "mini-recon", small)
    few = ("--force", "--codecs", "none", "--strategies", "uniform,router")
    yaml = str(Path(flags[0].partition("=")[2]).with_name("router.yaml"))
    out = run(tmp_path / "named", "--protocol", "mini-recon", "--count", "3", "--router-config", yaml, *few)
    metrics = read(out)
    assert metrics["notes"] == ["not the protocol mini-recon: count, draws changed"]
    card = metrics["card"]
    assert (card["protocol"]["name"], card["list"]["clips"], metrics["num_clips"]) == ("mini-recon", 3, 3)
    assert card == json.loads((out / "card.json").read_text()) and len(card["system"]["router_sha256"]) == 1
    assert (out / "card.txt").read_text() == card_text(card) + "\n"
    assert f"Protocol mini-recon ({card['protocol_hash']})" in (out / "report.html").read_text()

    free = read(run(tmp_path / "free", "--sources", "synthetic:heldout:5", "--max-clips", "3", *few))
    assert free["card"] is None and free["points"] == metrics["points"], "the same clips and networks"
    assert "Under no named protocol" in (tmp_path / "free/report.html").read_text()


def test_a_table_made_on_the_spot(run: Callable[..., Path], tmp_path: Path) -> None:
    more = ("--table", "fresh", "--sources", "synthetic:heldout:1", "--strategies", "threshold", "--thresholds", "0")
    metrics = read(run(tmp_path, *more, "--extractor", "none", "--codecs", "none"))
    assert [p["tokens"] for p in metrics["points"]] == [8, 16, 32, 32], "no assignment is that good: the longest"
    assert metrics["table"]["proxy_sha256"] == metrics["tokenizer"]["sha256"]


@pytest.mark.parametrize(
    "more, words",
    [
        ((), "fewer|at least 256"),
        (("--extractor", "none", "--strategies", "uniform,best"), "'best'"),
        (("--extractor", "none", "--budgets", "uniform:2"), "uniform:2"),
        (("--extractor", "none", "--codecs", "h266"), "h266"),
        (("--extractor", "none", "--strategies", "price"), "--budgets price:N"),
        (("--extractor", "none", "--strategies", "quality", "--budgets", "quality:0.1"), "predicts no distances"),
        (("--sources", "nowhere"), "nowhere"),
        (("--protocol", "mini-recon"), "--max-clips: protocol mini-recon has decided"),
        (("--data", "somewhere"), "--data goes with --protocol"),
        (("--router-config", "a", "--router-config", "b"), "2 --router-config for 1 --router-ckpt"),
        (("--sources", "synthetic:train:2", "--extractor", "none"), "the table lacks 2 of 2"),
    ],
)
def test_mistakes_are_one_line(run: Callable[..., Path], tmp_path: Path, more: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        run(tmp_path, "--max-clips", "2", *more)
    assert "\n" not in str(caught.value)


# The report

CARD = {
    "protocol": {"name": "ucf101-recon-train", "miniature": False, "changed": []},
    "protocol_hash": "0123456789abcdef",
    "system": {"budget": "uniform:256"},
    "trained_as": {"tokenizer": {"run": "VQ_SB_uniform_256", "step": 400000}},
    "extractor": {"name": "i3d", "distance": "fvd_i3d", "sha256": I3D_SHA256},
}


def result(value: float, **changes: Any) -> dict[str, Any]:
    """A metrics.json of an evaluation, as evaluations/summary.py writes it."""
    metric = {"value": value, "low": value - 1, "high": value + 1, "level": 0.95, "draws": 100}
    card = CARD | {"protocol": CARD["protocol"] | changes}
    metrics = {"psnr": metric, "lpips_vgg": metric | {"low": None}, "fvd_i3d": metric, "stlpips_alex": metric}
    return {"card": card, "num_clips": 9537, "notes": [], "metrics": metrics}


def test_ours_stands_beside_the_papers_only_under_its_protocol() -> None:
    def ours(*results: dict[str, Any]) -> list[str]:
        tables = paper_tables([Run(Path(f"run{i}"), data) for i, data in enumerate(results)])
        (table,) = (table for table in tables if table.title == "Reconstruction on UCF-101 train")
        return list(table.rows[0])

    nothing = ["uniform, 400k", "25.05", "-", "0.1303", "-", "13.0", "-", "1024", "-"]
    assert ours() == nothing
    assert ours(result(24.5)) == ["uniform, 400k", "25.05", "24.50", "0.1303", "24.5000", "13.0", "24.5", "1024", "-"]
    assert ours(result(24.5, miniature=True)) == nothing, "a miniature number is never in a row of the paper"
    assert ours(result(24.5, changed=["count"])) == nothing
    assert ours(result(24.5, name="mini-recon")) == nothing
    assert ours(result(24.5, listed=9538)) == nothing, "a video of the list is missing"
    foreign = result(24.5)
    foreign["card"]["extractor"] = CARD["extractor"] | {"sha256": "0" * 64}
    assert ours(foreign)[6] == "-" and ours(foreign)[2] == "24.50", "an fvd_i3d of other weights"
    other = result(24.5)
    other["card"]["trained_as"] = {"tokenizer": {"run": "VQ_SB_uniform_256", "step": 1000}}
    assert ours(other) == nothing, "trained for fewer steps"


def test_the_papers_figures_name_protocols_and_configs_that_exist() -> None:
    paper = json.loads(PAPER.read_text())
    for table in paper["tables"]:
        assert table["protocol"] in PROTOCOLS
        for row in table["rows"]:
            assert set(row["paper"]) <= set(table["metrics"])
            for kind, folder in (("tokenizer", "vq"), ("gpt", "ar")):
                if name := row["run"].get(kind):
                    assert (ROOT / f"configs/{folder}/{name}.yaml").is_file(), name


def test_miniature_runs_are_marked() -> None:
    (table,) = own_tables([Run(Path("results/a|b"), result(3.25, name="mini-recon", miniature=True))])
    assert "miniature" in table.title and "compares with the paper" in table.note
    assert table.rows[0][:4] == ("a|b (miniature)", "9537", "3.25 [2.25, 4.25]", "3.25")
    assert "a\\|b (miniature)" in table.markdown()


def test_report_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in (("full", result(24.5)), ("mini <b>", result(3.0, name="mini-recon", miniature=True))):
        (tmp_path / name).mkdir()
        data["card"]["protocol"] = {**protocol_fields(data["card"]["protocol"]["name"]), **data["card"]["protocol"]}
        data["card"]["clip_words"] = "all"
        (tmp_path / name / "metrics.json").write_text(json.dumps(data))
    (tmp_path / "metrics.json").write_text('{"clips": []}')
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- figures:paper -->\n<!-- /figures:paper -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path), "--readme", str(readme)])
    report.main()
    assert "left out: " in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "mini &lt;b&gt; (miniature)" in page and "<b>" not in page
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| uniform, 400k | 25.05 | 24.50 |" in text
    report.main()
    assert readme.read_text() == text, "filled again, it is the same"

    readme.write_text("nothing to fill")
    with pytest.raises(UserError, match="figures:paper"):
        report.main()
    with pytest.raises(UserError, match="metrics.json"):
        find_runs([tmp_path / "nowhere"])


def protocol_fields(name: str) -> dict[str, Any]:
    return card_of(find_protocol(name))["protocol"]


def test_chart_of_a_single_point() -> None:
    points = [{"strategy": "a & b", "setting": "8", "tokens": 100.0, "bytes": 9.0, "psnr": 3.0}]
    (chart,) = charts({"points": points, "metrics": ["psnr"], "frechet": []}).values()
    assert "a &amp; b 8: 100, 3" in chart and "nan" not in chart
