"""One report of any results: report.html and tables.md, every figure read from a json file.

    python -m evaluations.report results/eval results/quality_cost            # -> results/report/
    python -m evaluations.report results/quality_cost --readme README.md      # and the marked parts of a README

A marked part is the text between <!-- figures:NAME --> and <!-- /figures:NAME -->; NAME is evaluation, quality-cost or
paper. Parts for which these results hold nothing stay as they are.

The paper's figures are in paper.json with the protocol of each. One of ours is beside one of them only if its
metrics.json names that protocol, unchanged, weights trained by the config of that row, and the same networks
(LPIPS-VGG, the I3D of the papers by its sha256). Everything else has a table of its own; runs of the miniature have one
that is marked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizer.common.cli import Parser, answer_help


def parse_arguments() -> argparse.Namespace:
    parser = Parser("Tables, curves and protocol cards of evaluation results.")
    parser.add_argument("results", nargs="*", type=Path, help="folders, searched for metrics.json")
    parser.add_argument("--out", type=Path, help="where to write (default: the one folder given, else results/report)")
    parser.add_argument("--readme", type=Path, help="a README whose marked parts are to be filled")
    return parser.parse_args()


if __name__ == "__main__":
    answer_help(parse_arguments)  # before torch is imported

import base64
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluations.metrics.bootstrap import LEAST_DEFINED
from evaluations.metrics.extractors import I3D_SHA256
from evaluations.metrics.frechet import NAMES
from evaluations.protocols import Protocol, card_text
from evaluations.quality_cost.charts import charts
from evaluations.shards import RUN_AGAIN, check_metrics
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.schema import check_fields, read_json_value
from tokenizer.viz.page import between_markers, has_markers, markdown_table, render

PAPER = Path(__file__).with_name("paper.json")
CURVE_KIND = "evatok.quality_cost"
NONE = "-"
MINIATURE = "miniature"


_PROTOCOL_CARD = {"clip_words": str, "protocol": {field.name: object for field in dataclasses.fields(Protocol)}}
_CURVE = {
    "card": dict | None,
    "tokenizer": {"paper_size": bool},
    "num_clips": int,
    "few_clips": bool,
    "points": [{"strategy": str, "setting": str, "bytes": float}],
    "savings": [{"strategy": str, "metric": str, "cost": str, "interval": {"level": float}}],
    **dict.fromkeys(("metrics", "frechet", "notes", "missing_codecs"), list[str]),
}


@dataclass(frozen=True)
class Table:
    """A heading, a note below the table, and cells of plain text; the first column names the row."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        return f"**{self.title}.** {self.note}\n\n{markdown_table(self.header, self.rows)}"


@dataclass(frozen=True)
class Run:
    """A metrics.json of an evaluation or of a quality-cost job, and the folder it was found in."""

    folder: Path
    data: Mapping[str, Any]

    @property
    def is_curve(self) -> bool:
        """Whether it is of a quality-cost job."""
        return self.data.get("kind") == CURVE_KIND

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The fields of an evaluation's protocol; a curve may have none."""
        return self.data["card"]["protocol"]

    @property
    def identity(self) -> dict[str, Any]:
        """What rows of the paper are told apart by: the runs that made the weights, their step, the budget."""
        card = self.data["card"]
        made = card.get("trained_as") or {}
        names = {name: origin["run"] for name, origin in made.items()}
        step = made.get("tokenizer", {}).get("step")
        return {**names, "step": step, "budget": (card.get("system") or {}).get("budget")}

    @property
    def miniature(self) -> bool:
        """Whether nothing of it may be compared with the paper."""
        card = self.data.get("card")
        small = self.is_curve and not self.data["tokenizer"]["paper_size"]
        return small or bool(card and card["protocol"]["miniature"])

    @property
    def label(self) -> str:
        """What its rows are called."""
        return f"{self.folder.name} ({MINIATURE})" if self.miniature else self.folder.name


def find_runs(places: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Every metrics.json under these folders, by path, and the paths of foreign ones. UserError if none is ours."""
    runs, foreign = [], []
    for place in places:
        paths = [place] if place.is_file() else sorted(place.rglob("metrics.json"))
        if not paths:
            raise UserError(f"{place}: no metrics.json here; give the --out of an evaluation or of a curve")
        for path in paths:
            data = read_json_value(path, RUN_AGAIN)
            if isinstance(data, dict) and data.get("kind") == CURVE_KIND:
                check_fields(data, _CURVE, str(path), RUN_AGAIN)
            elif isinstance(data, dict) and isinstance(data.get("card"), dict):
                check_metrics(path, data)
            else:
                foreign.append(str(path))
                continue
            if data["card"]:
                check_fields(data["card"], _PROTOCOL_CARD, str(path), RUN_AGAIN, "card.")
            runs.append(Run(path.absolute().parent, data))
    if not runs:
        raise UserError(f"{foreign[0]}: is not of an evaluation (no protocol card) and not of quality_cost_curve.sh")
    return runs, foreign


def paper_tables(runs: Sequence[Run]) -> list[Table]:
    """The paper's tables, each of its figures beside ours if there is one."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    tables = []
    for table in paper["tables"]:
        metrics = {name: paper["metrics"][name] for name in table["metrics"]}
        header = ["", *(f"{m['label']}, {side}" for m in metrics.values() for side in ("paper", "ours"))]
        rows = []
        for row in table["rows"]:
            mine = [run for run in runs if answers(run, table["protocol"], row["run"])]
            cells = [row["label"]]
            for name, metric in metrics.items():
                theirs = row["paper"].get(name)
                cells.append(NONE if theirs is None else f"{theirs:.{metric['digits']}f}")
                found = [
                    _shown(run, metric["ours"], metric["digits"]) for run in mine if same_network(run, metric["ours"])
                ]
                cells.append(" / ".join(found) or NONE)
            rows.append(tuple(cells))
        note = f"Protocol {table['protocol']}. Paper: {paper['source']}. A dash under ours: not measured."
        tables.append(Table(table["title"], note, tuple(header), tuple(rows)))
    return tables


def answers(run: Run, protocol: str, wanted: Mapping[str, Any]) -> bool:
    """Whether a run may be shown beside a row of the paper: same protocol, unchanged, and all that the row requires.

    Exactly the clips that the protocol counts must have been scored: fewer or more are another test set.
    """
    if run.is_curve or run.miniature or not wanted or run.protocol["changed"] or run.protocol["name"] != protocol:
        return False
    expected = run.protocol.get("count") or run.protocol.get("listed")
    if expected and run.data["num_clips"] != expected:
        return False
    return all(run.identity.get(key) == value for key, value in wanted.items())


def same_network(run: Run, metric: str) -> bool:
    """Whether an fvd_i3d comes from the papers' weights; the name alone does not show it in older results."""
    return metric != NAMES["i3d"] or (run.data["card"].get("extractor") or {}).get("sha256") == I3D_SHA256


def own_tables(runs: Sequence[Run]) -> list[Table]:
    """All evaluations, protocol by protocol, every figure under its full name; the miniature's are marked."""
    evaluations = [run for run in runs if not run.is_curve]
    tables = []
    for identity in dict.fromkeys((run.protocol["name"], run.data["card"]["protocol_hash"]) for run in evaluations):
        mine = [r for r in evaluations if (r.protocol["name"], r.data["card"]["protocol_hash"]) == identity]
        first = mine[0]
        names = list(dict.fromkeys(name for run in mine for name in run.data["metrics"]))
        rows = []
        for run in mine:
            figures = (_shown(run, name, interval=True) for name in names)
            padded = f", {run.data['num_padded']} padded" if run.data.get("num_padded") else ""
            rows.append((run.label, f"{run.data['num_clips']}{padded}", *figures))
        title = identity[0]
        if first.protocol["changed"]:
            title += f", changed in {', '.join(first.protocol['changed'])}"
        notes = [f"Protocol hash {identity[1]}.", *dict.fromkeys(f"{n}." for run in mine for n in run.data["notes"])]
        if first.miniature:
            title += f" ({MINIATURE})"
            notes.insert(0, "The miniature shows that the parts work; nothing here compares with the paper.")
        tables.append(Table(title, " ".join(notes), ("run", "clips", *names), tuple(rows)))
    return tables


def under_protocol(run: Run) -> str:
    """Which protocol a curve's figures were measured under, and what must be said of it, in one line."""
    card, notes = run.data.get("card"), "".join(f" {note}." for note in run.data.get("notes", ()))
    if not card:
        return f"Under no named protocol.{notes}"
    return f"Protocol {card['protocol']['name']} ({card['protocol_hash']}).{notes}"


def savings_table(run: Run) -> Table:
    """What each strategy or codec costs at the quality of the reference, by every metric."""
    data = run.data
    metrics = [*data["metrics"], *data["frechet"]]
    found = {(entry["strategy"], entry["metric"]): entry for entry in data["savings"]}
    rows = []
    for strategy in dict.fromkeys(entry["strategy"] for entry in data["savings"]):
        cost = found[strategy, metrics[0]]["cost"]
        rows.append((strategy, cost, *(_saving(found[strategy, metric]) for metric in metrics)))
    level = data["savings"][0]["interval"]["level"] if data["savings"] else 0.95
    note = (
        f"{under_protocol(run)} Relative cost at equal quality against uniform (BD-rate): negative saves. In brackets "
        f"the {level:.0%} interval over redrawn clips, of {data['num_clips']}. A dash: the curves share no quality; "
        f"[-]: fewer than {LEAST_DEFINED:.0%} of the draws do."
    )
    if data["few_clips"] and data["frechet"]:
        note += f" {data['frechet'][0]} was FORCED on too few clips."
    return Table(f"Cost at equal quality: {run.label}", note, ("strategy", "cost", *metrics), tuple(rows))


def points_table(run: Run) -> Table:
    data = run.data
    metrics = [*data["metrics"], *data["frechet"]]
    rows = [
        (
            point["strategy"],
            point["setting"],
            _number(point.get("tokens"), 1),
            _number(point["bytes"], 1),
            NONE if point.get("reached") is None else f"{point['reached']:.0%}",
            *(_number(point[metric]) for metric in metrics),
        )
        for point in data["points"]
    ]
    header = ("strategy", "setting", "tokens", "bytes", "kept to", *metrics)
    note = (
        f"{under_protocol(run)} Means over {data['num_clips']} clips. Kept to: share of the clips that a codec could "
        "code so small."
    )
    return Table(f"Points: {run.label}", note, header, tuple(rows))


def _saving(entry: Mapping[str, Any]) -> str:
    if entry["saving"] is None:
        return NONE
    low, high = entry["interval"]["low"], entry["interval"]["high"]
    return f"{entry['saving']:+.1%}" + (" [-]" if low is None else f" [{low:+.1%}, {high:+.1%}]")


def _shown(run: Run, metric: str, digits: int | None = None, interval: bool = False) -> str:
    found = run.data["metrics"].get(metric)
    if found is None:
        return NONE
    text = _number(found["value"], digits)
    if interval and found["low"] is not None:
        text += f" [{_number(found['low'], digits)}, {_number(found['high'], digits)}]"
    return text


def _number(value: float | None, digits: int | None = None) -> str:
    """With so many digits behind the point, else four that count."""
    if value is None:
        return NONE
    return f"{value:.{digits}f}" if digits is not None else f"{value:.4g}"


def write_report(folder: Path, metrics: Mapping[str, Any]) -> Path:
    """The page of a single result, beside its metrics.json."""
    path = folder / "report.html"
    atomic_write(path, page([Run(folder.absolute(), metrics)]).encode())
    return path


def page(runs: Sequence[Run]) -> str:
    """The whole page, from tokenizer/viz/evaluation.html."""
    small, padded = sum(run.miniature for run in runs), sum(run.data.get("num_padded") or 0 for run in runs)
    notes = []
    if small:
        notes.append(
            f"{small} of {len(runs)} results are of the miniature and marked so. They show that the parts work, have "
            "tables of their own and compare with nothing published."
        )
    if padded:
        notes.append(f"{padded} clips are padded: their last frame is repeated. The tables count them.")
    curves = [run for run in runs if run.is_curve]
    return render(
        "evaluation.html",
        title="Evaluation",
        notes=notes,
        curves=[
            {
                "label": run.label,
                "charts": list(charts(run.data).values()),
                "missing": run.data["missing_codecs"],
                "savings": savings_table(run),
                "points": points_table(run),
            }
            for run in curves
        ],
        own=own_tables(runs),
        pictures=_pictures(runs),
        paper=paper_tables(runs),
        cards=[(run.label, _curve_card(run) if run.is_curve else card_text(dict(run.data["card"]))) for run in runs],
    )


def markdown(runs: Sequence[Run]) -> dict[str, str]:
    """The sections of tables.md, by the names of the README's markers: figures:evaluation, and so on."""
    curves = [run for run in runs if run.is_curve]
    tables = {
        "evaluation": own_tables(runs),
        "quality-cost": [table for run in curves for table in (savings_table(run), points_table(run))],
        "paper": paper_tables(runs),
    }
    return {name: "\n\n".join(table.markdown() for table in some) for name, some in tables.items() if some}


def _pictures(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(title, PNG in base64) of the best, the median and the worst clip of each evaluation."""
    found = []
    for run in (run for run in runs if not run.is_curve):
        for path in sorted((run.folder / "pictures").glob("*.png")):
            title = f"{run.label}: {path.stem.partition('_')[0]} clip"
            found.append((title, base64.b64encode(path.read_bytes()).decode()))
    return found


def _curve_card(run: Run) -> str:
    """Everything that made a curve; under a protocol its card first."""
    skip = ("points", "savings", "kind", "card")
    lines = [f"{name.replace('_', ' '):<16}{value}" for name, value in run.data.items() if name not in skip]
    card = run.data.get("card")
    return "\n".join([card_text(card), "", *lines] if card else lines)


_SHARED = Path("results/report")


def fill(readme: Path, sections: dict[str, str]) -> None:
    """Write the sections between the markers that the README has. UserError if it has none of them."""
    if not readme.is_file():
        raise UserError(f"{readme}: no such file")
    text = readme.read_text(encoding="utf-8")
    places = [name for name in sections if has_markers(text, name)]
    if not places:
        names = ", ".join(f"<!-- figures:{name} -->" for name in sections)
        raise UserError(f"{readme}: holds none of the markers {names} with their ends")
    for name in places:
        text = between_markers(text, name, sections[name])
    atomic_write(readme, text.encode())


def main() -> None:
    args = parse_arguments()
    if not args.results:
        raise UserError("no results: give one or more folders with a metrics.json, e.g. results/quality_cost")
    runs, foreign = find_runs(args.results)
    out: Path = args.out or (args.results[0] if len(args.results) == 1 and args.results[0].is_dir() else _SHARED)
    out.mkdir(parents=True, exist_ok=True)
    sections = markdown(runs)
    atomic_write(out / "report.html", page(runs).encode())
    atomic_write(out / "tables.md", ("\n\n".join(sections.values()) + "\n").encode())
    if args.readme:
        fill(args.readme, sections)
    for path in foreign:
        print(f"left out: {path} is not of an evaluation")
    print(f"{len(runs)} results: {out / 'report.html'}, {out / 'tables.md'}")


if __name__ == "__main__":
    run_cli(main)
