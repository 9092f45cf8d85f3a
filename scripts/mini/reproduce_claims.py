"""The claims of the paper, from the finished stages of scripts/mini/reproduce.py to figures.json and report.html.

Each claim is one number on the test clips whose sign (or bound) is the paper's direction. It has an interval for each
training seed, over test clips: percentile bootstrap for means, delete-a-group jackknife for Frechet distances. The
claim's interval spans those of all seeds, and one rule judges it:

    holds            the whole interval lies on the paper's side of the bound
    does not hold    the whole interval lies on the other side
    cannot be told   anything else, or no interval

Settings that a figure needs (best uniform level, best constant row) are chosen on validation clips.

Letters: S clips, P points of a curve, A assignments (rows), F numbers in a feature.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reproduce_measured import (
    DISTANCE,
    FRECHET,
    STRATEGIES,
    Answer,
    Measured,
    at_equal_tokens,
    over_clips,
    over_groups,
    ratio,
    relative,
    saved_at,
    saved_by,
)
from reproduce_stages import LABELS, PLAN, Study
from torch import Tensor

from evaluations.metrics.bootstrap import Interval
from evaluations.metrics.frechet import frechet_of_features
from evaluations.shards import read_shard
from tokenizer.assignment import AssignmentSpace
from tokenizer.common.checkpoint import file_sha256
from tokenizer.router.reward import QualityTable, best_uniform, reward, reward_percentile, stats_of
from tokenizer.viz.page import render
from tokenizer.viz.plots import Series, curve_panels, line_chart, to_png, to_svg

Folder = Callable[[str], Path]
"""The folder of a finished stage."""

TITLES = {
    1: "Figure 4: the maximal proxy reward against uniform lengths",
    2: "Table 8: routers against the best uniform level and the best constant row",
    3: "Table 1: final tokenizers against the proxy",
    4: "Table 2: a GPT on adaptive tokens against one on uniform tokens",
    5: "Table 5: the patch discriminator",
    6: "Figure 5: the threshold rule",
    7: "Supplement M: images",
    8: "Identities of this implementation",
}
MISSING = (
    "Table 5's V-JEPA 2-L alignment and VideoMAE-B discriminator: their weights cannot be had without a download.",
    "Supplement M's generation of images: no GPT is trained on image tokens here.",
    f"LPIPS with VGG and FVD with I3D: distances are {DISTANCE} and {FRECHET}, which install as packages.",
)


# The arithmetic of a claim


def hull(by_seed: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """[lowest, highest] of the seeds' intervals; None if a seed has none."""
    if any(each["low"] is None or each["high"] is None for each in by_seed):
        return None
    return [min(each["low"] for each in by_seed), max(each["high"] for each in by_seed)]


def judge(interval: Sequence[float] | None, better: str, bound: float) -> bool | None:
    """Whether the claim holds; None: cannot be told. better: "above" or "below" the bound, or "at most" the bound."""
    if interval is None:
        return None
    low, high = interval
    if better == "at most":  # of identities, whose difference is known exactly
        return high <= bound
    on_side, opposite = (low > bound, high < bound) if better == "above" else (high < bound, low > bound)
    return True if on_side else False if opposite else None


VERDICTS = {True: "holds", False: "does not hold", None: "cannot be told"}


class Claims:
    """Collects claims under their names."""

    def __init__(self, seeds: Sequence[int], command: str) -> None:
        self.seeds, self.command, self.found = list(seeds), command, dict[str, dict[str, Any]]()

    def add(
        self, number: int, name: str, measure: str, paper: float | None, note: str, answers: Sequence[Answer],
        better: str = "below", bound: float = 0.0,
    ) -> None:  # fmt: skip
        """answers: one for each seed, or a single one of what no seed changes."""
        seeds = self.seeds if len(answers) > 1 else self.seeds[:1]
        by_seed: list[dict[str, Any]] = [
            {"seed": seed, "value": each.value, "low": each.interval.low, "high": each.interval.high, "pair": each.pair}
            for seed, each in zip(seeds, answers, strict=True)
        ]
        interval = hull(by_seed)
        values = [each["value"] for each in by_seed if each["value"] is not None]
        holds = judge(interval, better, bound)
        self.found[name] = {
            "number": number, "measure": measure, "paper": paper, "paper_note": note,
            "ours": sum(values) / len(values) if len(values) == len(by_seed) else None,
            "interval": interval, "better": better, "bound": bound, "holds": holds, "verdict": VERDICTS[holds],
            "by_seed": by_seed, "clips": answers[0].clips, "seeds": [each["seed"] for each in by_seed],
            "command": self.command,
        }  # fmt: skip


# The claims


def all_figures(study: Study, folder: Folder, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the report shows, as plain numbers. folder: of a finished stage."""
    claims, settings = Claims(study.seeds, str(facts["command"])), study.settings
    level, image_level = str(settings["uniform"]), str(settings["image_uniform"])

    def measured(name: str) -> list[Measured]:
        image = "image" in name
        space = AssignmentSpace(tuple(settings["image_levels" if image else "levels"]), 1 if image else 4)
        return [Measured(folder(f"{name}_s{seed}"), space) for seed in study.seeds]

    worlds = {"walks": measured("on_walks"), "real": measured("on_real")}
    finals = {name: measured(f"of_{name}") for name in ("adaptive", "uniform", "uniform_gan")}
    _figure_4(claims, worlds, level)
    table_8 = _table_8(claims, worlds["walks"], study, folder)
    _table_1(claims, worlds["walks"], finals, level, LABELS.index(settings["final_router"]))
    generated = [read_shard(folder(f"generated_s{seed}") / "samples.safetensors") for seed in study.seeds]
    _table_2(claims, generated)
    _table_5(claims, finals, level)
    _figure_5(claims, worlds)
    _supplement_m(claims, measured("of_image_adaptive"), measured("of_image_uniform"), image_level)
    _identities(claims, folder("identities") / "tests.xml")
    return {
        "experiment": "another experiment: other clips, networks, distances and lengths of training",
        **facts,
        "settings": {name: value for name, value in settings.items() if name not in PLAN["shared"]},
        "claims": claims.found,
        "table_8": table_8,
        "generated": {kind: _generated(generated, kind) for kind in ("adaptive", "uniform")},
        "curves": {
            world: {metric: _curves(each[0], metric) for metric in (DISTANCE, FRECHET)}
            for world, each in worlds.items()
        },
    }


def _curves(measured: Measured, metric: str) -> dict[str, list[list[float]]]:
    """strategy -> (tokens, distance) of its points, over all clips."""
    everyone = np.arange(len(measured.names))
    curves = {name: measured.curve(name, metric, everyone) for name in STRATEGIES}
    return {name: [[float(t), float(v)] for t, v in zip(*curve, strict=True)] for name, curve in curves.items()}


def _generated(generated: Sequence[tuple[Any, Mapping[str, Tensor]]], kind: str) -> list[list[float]]:
    """(tokens, Frechet distance) of the clips that a GPT generated, for each seed."""
    return [
        [float(np.mean(records[kind]["tokens"])), frechet_of_features(features[kind], features["real"])]
        for records, features in generated
    ]


def _figure_4(claims: Claims, worlds: Mapping[str, Sequence[Measured]], level: str) -> None:
    where = {"walks": "test walks", "real": "real clips of unseen sources"}
    for world, each in worlds.items():
        for metric, interval_of in ((DISTANCE, over_clips), (FRECHET, over_groups)):
            gain = f"smallest relative gain in {metric} over the inner uniform levels, {where[world]}"
            answers = [interval_of(at_equal_tokens(m, metric), len(m.names)) for m in each]
            claims.add(1, f"figure_4_gain_{world}_{metric}", gain, None, "better at all lengths", answers, "above")
            saved = f"tokens against uniform {level} at its {metric}, {where[world]}"
            answers = [interval_of(saved_at(m, metric, level), len(m.names)) for m in each]
            paper, note = (-0.56, "router, rFVD, WebVid; UCF-101 -0.42") if metric == FRECHET else (None, "fewer")
            claims.add(1, f"figure_4_tokens_{world}_{metric}", saved, paper, note, answers)


def _table_8(claims: Claims, walks: Sequence[Measured], study: Study, folder: Folder) -> list[dict[str, Any]]:
    """Percentiles by the proxy's table of test walks."""
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, str], list[Answer]] = {}
    for seed, measured in zip(study.seeds, walks, strict=True):
        reward_SA, baselines = _rewards(folder, seed, study.settings["quality_weight"])
        for label, row_S in _rows_of_routers(measured).items():
            baseline_S = {name: torch.full_like(row_S, row) for name, row in baselines.items()}
            beside = {name: reward_percentile(reward_SA, other_S) for name, other_S in baseline_S.items()}
            rated = _rated(measured, folder(f"router_{label}_s{seed}"), reward_SA, row_S)
            rows.append({"seed": seed, "router": label, **rated, **beside})
            for name, other_S in baseline_S.items():
                found.setdefault((label, name), []).append(_ahead(reward_SA, row_S, other_S))
    paper = {
        "best uniform": (0.1208, "hard labels, WebVid: 96.96 - 84.88 %; UCF-101 0.0773"),
        "best constant row": (None, "not reported"),
    }
    for (label, name), answers in found.items():
        measure = f"reward percentile, router with {label} labels minus {name}"
        claims.add(2, f"table_8_{label}_{name.replace(' ', '_')}", measure, *paper[name], answers, "above")
    return rows


def _rewards(folder: Folder, seed: int, quality_weight: float) -> tuple[Tensor, dict[str, int]]:
    """reward_SA of the test walks, and the rows that are best on validation walks."""
    names = ("table_train", "table_validation", "table_walks")
    train, validation, test = (QualityTable.load(folder(f"{name}_s{seed}") / "table.safetensors") for name in names)
    space, stats = test.space, stats_of(train)
    seen_BA, reward_SA = (reward(t.lpips_BA, space.tokens_A, quality_weight, stats) for t in (validation, test))
    uniform = space.uniform_row(best_uniform(seen_BA, space)[0])
    return reward_SA, {"best uniform": uniform, "best constant row": int(seen_BA.mean(dim=0).argmax())}


def _rows_of_routers(measured: Measured) -> dict[str, Tensor]:
    """label -> the rows that its router gives to the test clips, [S]."""
    points = [point for (name, _), point in measured.points.items() if name == "router"]
    return {label: torch.tensor([int(key.removeprefix("row:")) for key in point.keys])
            for label, point in zip(LABELS, points, strict=True)}  # fmt: skip


def _rated(measured: Measured, router: Path, reward_SA: Tensor, row_S: Tensor) -> dict[str, float]:
    """Top-1, top-5 and percentile of a router, by the scores that the quality-cost stage kept."""
    sha256 = file_sha256(router / "final" / "model.safetensors")
    score_SA = read_shard(measured.folder / "scores" / f"{sha256[:16]}.safetensors")[1]["tensor"]
    best_S = reward_SA.argmax(dim=1)
    return {
        "top-1": (row_S == best_S).double().mean().item(),
        "top-5": (score_SA.topk(5).indices == best_S[:, None]).any(dim=1).double().mean().item(),
        "percentile": reward_percentile(reward_SA, row_S),
        "tokens": measured.space.tokens_A[row_S].double().mean().item(),
        "tokens of the best rows": measured.space.tokens_A[best_S].double().mean().item(),
    }


def _ahead(reward_SA: Tensor, row_S: Tensor, other_S: Tensor) -> Answer:
    def statistic(index_S: np.ndarray) -> float:
        some = torch.from_numpy(index_S)
        return reward_percentile(reward_SA[some], row_S[some]) - reward_percentile(reward_SA[some], other_S[some])

    return over_clips(statistic, len(row_S))


def _table_1(
    claims: Claims, proxies: Sequence[Measured], finals: Mapping[str, Sequence[Measured]], level: str, router: int
) -> None:
    """router: which of the proxy's routers the final tokenizer was trained with."""
    fixed, routed, of_proxy = ("uniform", level), ("router", "argmax"), ("router", str(router + 1))
    trios = list(zip(proxies, finals["adaptive"], finals["uniform"], strict=True))
    for metric, shown, (by_router, by_uniform, between) in (
        (DISTANCE, "LPIPS, WebVid", (-0.096, -0.104, 0.0114)),
        (FRECHET, "rFVD, WebVid", (-0.34, -0.137, -0.476)),
    ):
        answers = [relative(metric, (ours, routed), (proxy, of_proxy)) for proxy, ours, _ in trios]
        measure = f"{metric} by the router's assignments, final against proxy"
        claims.add(3, f"table_1_router_final_{metric}", measure, by_router, shown, answers)
        answers = [relative(metric, (ours, fixed), (proxy, fixed)) for proxy, _, ours in trios]
        measure = f"{metric} at uniform {level}, final against proxy"
        claims.add(3, f"table_1_uniform_final_{metric}", measure, by_uniform, shown, answers)
        answers = [relative(metric, (ours, routed), (uniform, fixed)) for _, ours, uniform in trios]
        measure = f"{metric}, final of the router against final of uniform {level}"
        bound = max(between, 0.0)  # as much worse as the paper's, if it is worse
        claims.add(3, f"table_1_router_uniform_{metric}", measure, between, shown, answers, bound=bound)
    answers = [relative("tokens", (ours, routed), (uniform, fixed)) for _, ours, uniform in trios]
    measure = f"tokens, final of the router against final of uniform {level}"
    claims.add(3, "table_1_tokens", measure, -0.296, "721 of 1024, WebVid", answers)


def _table_2(claims: Claims, generated: Sequence[tuple[Any, Mapping[str, Tensor]]]) -> None:
    def frechet(features: Mapping[str, Tensor]) -> Answer:
        def statistic(index_S: np.ndarray) -> float:
            some = {kind: rows[torch.from_numpy(index_S)] for kind, rows in features.items()}
            ours, theirs = (frechet_of_features(some[kind], some["real"]) for kind in ("adaptive", "uniform"))
            return ratio(ours, theirs)

        return over_groups(statistic, len(features["real"]))

    def of_clips(records: Mapping[str, Mapping[str, list[float]]], name: str) -> Answer:
        ours, theirs = (np.array(records[kind][name]) for kind in ("adaptive", "uniform"))
        return over_clips(lambda index_S: ratio(float(ours[index_S].mean()), float(theirs[index_S].mean())), len(ours))

    claims.add(4, "table_2_frechet", f"{FRECHET} of generated clips, adaptive against uniform", -0.02,
               "gFVD 96 against 98, UCF-101, GPT-B", [frechet(features) for _, features in generated])  # fmt: skip
    claims.add(4, "table_2_tokens", "tokens of a generated clip, adaptive against uniform", -0.277,
               "740 of 1024, UCF-101, GPT-B", [of_clips(records, "tokens") for records, _ in generated])  # fmt: skip
    claims.add(4, "table_2_seconds", "seconds a sampled clip, adaptive against uniform", None, "not reported",
               [of_clips(records, "seconds") for records, _ in generated])  # fmt: skip


def _table_5(claims: Claims, finals: Mapping[str, Sequence[Measured]], level: str) -> None:
    at = ("uniform", level)

    def loss(ours: Measured, theirs: Measured) -> Answer:
        p, q = ours.points[at], theirs.points[at]
        return over_clips(lambda index_S: p.mean("psnr", index_S) - q.mean("psnr", index_S), len(ours.names))

    pairs = list(zip(finals["uniform_gan"], finals["uniform"], strict=True))
    distances = [relative(FRECHET, (ours, at), (theirs, at)) for ours, theirs in pairs]
    measure = f"{FRECHET}, with against without the patch discriminator"
    note = "rFVD, VideoMAE against patch discriminator: 13, 65"
    claims.add(5, "table_5_frechet", measure, -0.8, note, distances)
    note = "VideoMAE minus patch discriminator: 25.05 - 26.21 dB"
    measure = "PSNR in dB, with minus without the patch discriminator"
    claims.add(5, "table_5_psnr", measure, -1.16, note, [loss(*pair) for pair in pairs])


def _figure_5(claims: Claims, worlds: Mapping[str, Sequence[Measured]]) -> None:
    for world, each in worlds.items():
        for test, reference in (("threshold", "uniform"), ("max-reward", "threshold")):
            answers = [over_clips(saved_by(m, reference, test), len(m.names)) for m in each]
            measure = f"tokens at equal {DISTANCE}, {test} against {reference}, {world}"
            claims.add(6, f"figure_5_{world}_{test}", measure, None, "fewer", answers)


def _supplement_m(claims: Claims, adaptive: Sequence[Measured], uniform: Sequence[Measured], level: str) -> None:
    fixed, routed = ("uniform", level), ("router", "argmax")
    for metric, paper, note in (
        ("tokens", -0.199, "205 of 256"),
        (DISTANCE, 0.113, "LPIPS 0.2455, 0.2205"),
        (FRECHET, 0.197, "rFID 1.46, 1.22"),
    ):
        pairs = zip(adaptive, uniform, strict=True)
        answers = [relative(metric, (ours, routed), (theirs, fixed)) for ours, theirs in pairs]
        measure = f"{metric}, images, final of the router against final of uniform {level}"
        bound = max(paper, 0.0)  # as much worse as the paper's
        claims.add(7, f"supplement_m_{metric}", measure, paper, f"ImageNet, {note}", answers, bound=bound)


def _identities(claims: Claims, path: Path) -> None:
    """The largest difference that each test recorded, over all its cases."""
    found: dict[str, list[float]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        test = str(case.get("name")).partition("[")[0]
        found.setdefault(test, []).extend(float(str(each.get("value"))) for each in case.iter("property"))
    for name, (test, most) in PLAN["identities"].items():
        worst = max(found[test.rpartition("::")[2]])
        exact = Answer(worst, Interval(worst, worst, 1.0, 0), 0)
        claims.add(8, f"identity_{name}", f"largest difference in {test}", None, "", [exact], "at most", most)


# The report


def report_page(figures: Mapping[str, Any]) -> str:
    sections = []
    for number, title in TITLES.items():
        mine = {name: claim for name, claim in figures["claims"].items() if claim["number"] == number}
        charts = _charts(figures["curves"]) if number == 1 else []
        sections.append({"title": title, "number": number, "claims": mine, "charts": charts})
    count = {verdict: sum(c["verdict"] == verdict for c in figures["claims"].values()) for verdict in VERDICTS.values()}
    return render("reproduce.html", title="The paper's claims in miniature", figures=figures, sections=sections,
                  count=count, missing=MISSING, remarks=PLAN["remarks"], show=_shown, sentence=sentence)  # fmt: skip


def sentence(claim: Mapping[str, Any]) -> str:
    """Whether the direction of a claim holds, and why."""
    if claim["interval"] is None:
        return f"{claim['verdict']}: no interval"
    side = {"above": "below", "below": "above", "at most": "above"}[claim["better"]]
    where = {True: f"{claim['better']} ", False: f"{side} ", None: "on both sides of "}[claim["holds"]]
    return f"{claim['verdict']}: the interval lies {where}{claim['bound']:g}"


def headline_figure(figures: Mapping[str, Any]) -> bytes:
    """Claims 1 and 4 as one PNG."""
    reconstructed, generated = figures["curves"]["walks"][FRECHET], figures["generated"]
    panels = {
        f"{FRECHET} of reconstructed test walks": _series(reconstructed, ("uniform", "max-reward", "router")),
        f"{FRECHET} of generated clips, each seed": _series(generated, ("uniform", "adaptive"), joined=False),
    }
    return to_png(curve_panels(panels, x_title="tokens per clip", marked=True))


def _series(lines: Mapping[str, Any], names: Sequence[str], joined: bool = True) -> list[Series]:
    return [Series(name, [(t, v) for t, v in lines[name]], look=look, joined=joined) for look, name in enumerate(names)]


def _charts(curves: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(heading, SVG) of every world and metric."""
    made = []
    for world, metrics in curves.items():
        for metric, lines in metrics.items():
            chart = line_chart(_series(lines, STRATEGIES), "tokens per clip", f"{metric}, lower is better", log2_x=True)
            made.append((f"{world}, first seed", to_svg(chart, f"{metric} over tokens, {world}")))
    return made


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4g}" if value else "0"
