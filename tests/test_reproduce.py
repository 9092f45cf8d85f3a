"""The study of the paper's claims: at debug size from nothing to the report, killed on the way, and its arithmetic."""

from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reproduce import Workplace, chosen, digest_of, listing
from reproduce_claims import TITLES, VERDICTS, Claims, hull, judge, report_page
from reproduce_measured import Answer
from reproduce_stages import PLAN, SCALES, Stage, Study

from evaluations.metrics.bootstrap import Interval
from tokenizer.common.checkpoint import read_model
from tokenizer.common.errors import UserError
from tokenizer.router.reward import QualityTable

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "configs" / "mini" / "reproduce_figures.json"
UNTIL_THE_ROUTER = (
    "walks_train",
    "walks_validation",
    "proxy_s0",
    "table_train_s0",
    "table_validation_s0",
    "router_soft_s0",
)  # that was killed


def start(out: Path, *flags: str) -> subprocess.Popen[str]:
    command = ["bash", "scripts/mini/reproduce.sh", "--scale", "debug", "--out", str(out), *flags]
    environment = os.environ | {"PYPATH": sys.executable, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)  # fmt: skip


def finish(out: Path, *flags: str) -> str:
    said, errors = (process := start(out, *flags)).communicate(timeout=1800)
    assert process.returncode == 0, errors
    return said


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A folder whose study was killed with all its processes, then finished; what both runs printed."""
    out = tmp_path_factory.mktemp("study")
    process, begun = start(out), []
    assert process.stdout is not None
    for line in process.stdout:
        begun.append(line.split()[-1])
        if begun[-1].startswith("router_soft"):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return out, begun, finish(out)


def test_the_study_ends_with_a_report_of_every_claim(study: tuple[Path, list[str], str]) -> None:
    out, begun, said = study
    figures = json.loads((out / "figures.json").read_text())
    page = (out / "report.html").read_text()
    text = html.unescape(page)
    assert {claim["number"] for claim in figures["claims"].values()} == set(TITLES)
    assert [claim["measure"] for claim in figures["claims"].values() if claim["measure"] not in text] == []
    assert "Debug scale" in text and "<script" not in page
    assert (page == report_page(figures)) is True  # without a difference of two long lines
    identities = [claim for claim in figures["claims"].values() if claim["number"] == 8]
    assert len(identities) == 5 and all(claim["holds"] for claim in identities)

    again = [line.split()[-1] for line in said.splitlines() if line.startswith("reproduce: ")]
    assert set(again) | set(begun) == set(Study("debug").stages)
    assert "walks_train" not in again, "a finished stage was run again"
    left = finish(out, "--dry-run").splitlines()
    assert all(line.endswith("finished") for line in left[:-1]) and "0.00 left" in left[-1]


def test_what_was_killed_equals_what_was_not(study: tuple[Path, list[str], str], tmp_path: Path) -> None:
    finish(tmp_path, "--jobs", "1", "--only", *UNTIL_THE_ROUTER)
    stages = Study("debug").stages
    ours, theirs = (Workplace(folder, stages) for folder in (study[0], tmp_path))
    for stage in ("proxy_s0", "router_soft_s0"):
        weights = [read_model(place.path(stage) / "final" / "model.safetensors").tensors for place in (ours, theirs)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1]), stage
    tables = [QualityTable.load(place.path("table_train_s0") / "table.safetensors") for place in (ours, theirs)]
    assert torch.equal(tables[0].lpips_BA, tables[1].lpips_BA)


def check_arithmetic(figures: dict[str, Any]) -> None:
    """Means over seeds, intervals, and verdicts follow from the values of each seed."""
    for name, claim in figures["claims"].items():
        by_seed = claim["by_seed"]
        values = [each["value"] for each in by_seed]
        assert claim["seeds"] == [each["seed"] for each in by_seed], name
        assert claim["ours"] == (None if None in values else pytest.approx(sum(values) / len(values))), name
        lows, highs = ([each[end] for each in by_seed] for end in ("low", "high"))
        assert claim["interval"] == (None if None in lows + highs else [min(lows), max(highs)]), name
        assert claim["verdict"] == VERDICTS[claim["holds"]] and claim["command"], name
        if claim["holds"] is not None:
            low, high = claim["interval"]
            bound, below = claim["bound"], claim["better"] != "above"
            worst = high if below else low  # the end that lies farthest on the wrong side
            assert claim["holds"] == (worst <= bound if claim["better"] == "at most" else
                                      worst < bound if below else worst > bound), name  # fmt: skip


def test_the_reports_arithmetic(study: tuple[Path, list[str], str]) -> None:
    check_arithmetic(json.loads((study[0] / "figures.json").read_text()))
    if COMMITTED.is_file():
        check_arithmetic(json.loads(COMMITTED.read_text()))


@pytest.mark.parametrize(
    ("interval", "better", "bound", "holds"),
    [
        ([-0.3, -0.1], "below", 0, True),
        ([0.1, 0.3], "below", 0, False),
        ([-0.1, 0.1], "below", 0, None),
        ([0.0, 0.0], "below", 0, None),  # no difference at all
        ([0.02, 0.1], "below", 0.113, True),
        ([0.1, 0.3], "above", 0, True),
        ([-0.3, -0.1], "above", 0, False),
        (None, "above", 0, None),
        ([0.0, 0.0], "at most", 0, True),
        ([1e-5, 1e-5], "at most", 0, False),
    ],
)
def test_the_rule(interval: list[float] | None, better: str, bound: float, holds: bool | None) -> None:
    assert judge(interval, better, bound) is holds


def test_a_claim_has_an_answer_for_each_seed_or_one_for_all() -> None:
    answer = Answer(-0.1, Interval(-0.2, 0.0, 0.95, 100, 1.0), 5)
    for answers, seeds in (([answer] * 3, [0, 1, 2]), ([answer], [0])):
        (claims := Claims([0, 1, 2], "")).add(1, "name", "", None, "", answers)
        assert claims.found["name"]["seeds"] == seeds and claims.found["name"]["clips"] == 5
    with pytest.raises(ValueError, match="shorter"):
        Claims([0, 1, 2], "").add(1, "name", "", None, "", [answer] * 2)


def test_an_interval_spans_all_seeds() -> None:
    seeds = [{"low": -0.2, "high": 0.1}, {"low": -0.1, "high": 0.3}]
    assert hull(seeds) == [-0.2, 0.3]
    assert hull([*seeds, {"low": None, "high": None}]) is None


@pytest.mark.parametrize("scale", SCALES)
def test_training_reads_no_test_clips(scale: str) -> None:
    study = Study(scale)
    test_sources = [study.settings[name] for name in ("walks_test", "classed_test", "real_test")]
    for stage in study.stages.values():
        reads = any(source in stage.args or f"data.sources=[{source}]" in stage.args for source in test_sources)
        assert stage.level == "test" or not reads
        assert stage.level == "test" or all(study.stages[name].level != "test" for name in stage.inputs), stage.name
        other_seeds = {f"_s{seed}" for seed in study.seeds if not stage.name.endswith(f"_s{seed}")}
        assert not any(name.endswith(tuple(other_seeds)) for name in stage.inputs), stage.name
    levels = [stage.level for stage in study.stages.values()]
    assert set(levels[levels.index("test") :]) == {"test"}, "what reads test clips is listed last"


def test_a_stage_is_finished_while_its_command_and_its_products_stay(tmp_path: Path) -> None:
    def place(argument: str) -> Workplace:
        first = Stage("first", "a", (argument,), ("out.txt",), "train")
        return Workplace(tmp_path, {"first": first, "second": Stage("second", "b", ("<first>",), ("*",), "")})

    assert place("x").key("second") is None
    folder = place("x").path("first")
    folder.mkdir(parents=True)
    assert digest_of(folder, ("out.txt",)) == ""
    (folder / "out.txt").write_text("1")
    folder.with_suffix(".json").write_text(json.dumps({"digest": digest_of(folder, ("out.txt",)), "minutes": 3.0}))
    assert place("x").note("first") is not None and place("y").note("first") is None
    assert place("x").command("second") == ["b", str(folder)]
    lines = list(listing(place("x"), ["first", "second"], {"second": 57.0}))
    assert (
        "finished" in lines[0]
        and "3.00 min" in lines[0]
        and "to do" in lines[1]
        and "1.00 hours" in lines[2]
        and "0.95 left" in lines[2]
    )
    (folder / "out.txt").write_text("2")
    assert place("x").note("first") is None, "a product has changed"


def test_stages_are_chosen_by_name() -> None:
    stages = Study("debug").stages
    assert chosen(stages, ["router_*_s0"], None) == ["router_hard_s0", "router_soft_s0", "router_quality_s0"]
    assert chosen(stages, [], "generated_s0") == ["generated_s0"]
    assert all(stage.family in PLAN["minutes"][scale] for scale in SCALES for stage in Study(scale).stages.values())
    with pytest.raises(UserError, match="no stage 'none'"):
        chosen(stages, ["none"], None)


def test_stages_whose_inputs_are_missing_are_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "--only", "proxy_s0")
    _, errors = process.communicate(timeout=60)
    assert (
        process.returncode == 2 and errors == "error: proxy_s0 reads walks_train, which is not finished: run it first\n"
    )
