"""One report of any results: report.html and tables.md, every figure from a json file, none typed by hand.

    python -m evaluations.report results/eval results/quality_cost            # -> results/report/
    python -m evaluations.report results/quality_cost --readme README.md      # and the marked parts of a README

A marked part is what stands between <!-- figures:NAME --> and <!-- /figures:NAME -->; NAME is evaluation, quality-cost
or paper. Parts for which these results hold nothing are left as they are.
"""

from __future__ import annotations

from pathlib import Path

from evaluations.report_page import markdown, page
from evaluations.report_tables import find_runs
from tokenizer.common.arguments import Parser
from tokenizer.common.checkpoint import atomic_write
from tokenizer.common.errors import UserError, run_cli
from tokenizer.common.markdown_text import between_markers, has_markers


def main() -> None:
    parser = Parser("Tables, curves and protocol cards of evaluation results.")
    parser.add_argument("results", nargs="*", type=Path, help="folders, searched for metrics.json")
    parser.add_argument("--out", type=Path, help="where to write (default: the one folder given, else results/report)")
    parser.add_argument("--readme", type=Path, help="a README whose marked parts are to be filled")
    args = parser.parse_args()
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


_SHARED = Path("results/report")


def fill(readme: Path, sections: dict[str, str]) -> None:
    """Write the sections between the markers that the README has. UserError where it has none of them."""
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


if __name__ == "__main__":
    run_cli(main)
