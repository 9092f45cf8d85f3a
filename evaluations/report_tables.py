"""The tables of the report: *paper* beside *ours*, our own runs, savings at equal quality. Filled from json alone.

The paper's figures stand in paper.json with the protocol that each belongs to. One of ours stands beside one of them
only if its metrics.json names that protocol, unchanged, weights trained by the config that answers that row, and the
same networks (LPIPS-VGG, I3D). Everything else has a table of its own; runs of the miniature have one that says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from evaluations.bd_rate import LEAST_DEFINED
from tokenizer.common.errors import UserError
from tokenizer.common.markdown_text import markdown_table

PAPER = Path(__file__).with_name("paper.json")
CURVE_KIND = "evatok.quality_cost"
NONE = "-"
MINIATURE = "miniature"


@dataclass(frozen=True)
class Table:
    """A heading, a sentence below it, and cells of plain text; the first column names the row."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """For a README."""
        return f"**{self.title}.** {self.note}\n\n{markdown_table(self.header, self.rows)}"

    def html(self) -> str:
        """For the page: a panel that scrolls sideways."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return (
            f'<section class="panel"><h3>{escape(self.title)}</h3><div class="scroll"><table class="results">'
            f'<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div><p class="soft">{escape(self.note)}</p>'
            "</section>"
        )


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
    """Every metrics.json under these folders, by path, and the paths of foreign ones. UserError where none is ours."""
    runs, foreign = [], []
    for place in places:
        paths = [place] if place.is_file() else sorted(place.rglob("metrics.json"))
        if not paths:
            raise UserError(f"{place}: no metrics.json here; give the --out of an evaluation or of a curve")
        for path in paths:
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, OSError) as error:
                raise UserError(f"{path}: cannot be read as json ({error})") from error
            if isinstance(data, dict) and (data.get("kind") == CURVE_KIND or "protocol" in (data.get("card") or {})):
                runs.append(Run(path.absolute().parent, data))
            else:
                foreign.append(str(path))
    if not runs:
        raise UserError(f"{foreign[0]}: is not of an evaluation (no protocol card) and not of quality_cost_curve.sh")
    return runs, foreign


def paper_tables(runs: Sequence[Run]) -> list[Table]:
    """The paper's tables, each figure of theirs beside ours where there is one."""
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
                found = [_shown(run, metric["ours"], metric["digits"]) for run in mine]
                cells.append(" / ".join(found) or NONE)
            rows.append(tuple(cells))
        note = f"Protocol {table['protocol']}. Paper: {paper['source']}. A dash under ours: not measured."
        tables.append(Table(table["title"], note, tuple(header), tuple(rows)))
    return tables


def answers(run: Run, protocol: str, wanted: Mapping[str, Any]) -> bool:
    """Whether a run may stand beside a row of the paper: same protocol, unchanged, and all that the row asks for.

    Exactly the clips that the protocol counts must have been scored: fewer or more are another test set.
    """
    if run.is_curve or run.miniature or not wanted or run.protocol["changed"] or run.protocol["name"] != protocol:
        return False
    expected = run.protocol.get("count") or run.protocol.get("listed")
    if expected and run.data["num_clips"] != expected:
        return False
    return all(run.identity.get(key) == value for key, value in wanted.items())


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
            rows.append((run.label, str(run.data["num_clips"]), *figures))
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
    """Every point of a curve."""
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
