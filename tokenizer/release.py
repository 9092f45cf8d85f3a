"""The last step of scripts/train/mini.sh: from results/mini to the shipped folder ckpts/mini, with its model card.

python -m tokenizer.release        # copy weights and table, measure, write card and README figures
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from tokenizer.common.checkpoint import atomic_write, file_sha256, read_model
from tokenizer.common.errors import UserError, run_cli
from tokenizer.mini_figures import as_markdown, held_out_figures
from tokenizer.router.reward import stats_of
from tokenizer.router.table import QualityTable

_WEIGHTS = ("final", "router")
_MOST_BYTES = 25 * 2**20  # what the repository can carry


def release(results: Path, target: Path, readme: Path) -> None:
    """Copy, measure, write the card, and put the figures between the markers of the README."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _WEIGHTS:
        shutil.copyfile(results / name / "final" / "model.safetensors", target / f"{name}.safetensors")
    _ship_table(results, target / "heldout_table.safetensors")
    files = sorted(target.glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > _MOST_BYTES:
        raise UserError(f"{target}: more than {_MOST_BYTES >> 20} MB of weights; the repository cannot carry that")
    sums = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    atomic_write(target / "SHA256SUMS", sums.encode())
    figures = held_out_figures(target)
    atomic_write(target / "figures.json", (json.dumps(figures, indent=1) + "\n").encode())
    atomic_write(target / "README.md", _card(results, target, as_markdown(figures)).encode())
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        atomic_write(readme, _between_markers(text, "mini", as_markdown(figures)).encode())
    print(f"{target}: {', '.join(file.name for file in files)}, README.md, figures.json")


def _ship_table(results: Path, path: Path) -> None:
    """The held-out table, with what is needed to rate a router by it: weight and statistics of the reward."""
    table = QualityTable.load(results / "curate_heldout" / "table.safetensors")
    train_table = QualityTable.load(results / "curate_train" / "table.safetensors")
    router = read_model(results / "router").config
    table.meta.update(quality_weight=router["quality_weight"], reward_stats=vars(stats_of(train_table)))
    table.save(path)


def _card(results: Path, target: Path, figures: str) -> str:
    """What the weights are, from what, by which command, in which time, how good."""
    lines = [
        "# The miniature",
        "",
        "Clips of 16x64x64; levels 8, 16, 32, 64, 128 (625 assignments). Made by `bash scripts/train/mini.sh` from",
        "`configs/mini`, on the bundled real clips (box, Big Buck Bunny) and rendered scenes; measured on held-out",
        "sources (bottle, tree, and scenes rendered from them). It shows that every part works. It is not good: a few",
        "million parameters saw about a hundred real clips. Licences: tokenizer/data/bundled/CREDITS.md.",
        "",
        "| file | bytes | training steps | seconds in training steps |",
        "|---|---|---|---|",
    ]
    for name in _WEIGHTS:
        file = target / f"{name}.safetensors"
        step = read_model(file).card["step"]
        lines.append(f"| {file.name} | {file.stat().st_size} | {step} | {_seconds(results / name):.0f} |")
    lines += [f"| (the proxy, not shipped) | - | - | {_seconds(results / 'proxy'):.0f} |", "", figures, ""]
    return "\n".join(lines)


def _seconds(run: Path) -> float:
    """Wall time of all logged steps of a run, validations and start-up not counted."""
    with open(run / "metrics.jsonl", encoding="utf-8") as file:
        return sum(json.loads(line).get("seconds", 0.0) for line in file)


def _between_markers(text: str, name: str, content: str) -> str:
    start, end = f"<!-- figures:{name} -->", f"<!-- /figures:{name} -->"
    if start not in text or end not in text:
        raise UserError(f"README.md: the markers {start} and {end} are missing")
    return re.sub(f"{start}.*?{end}", lambda _: f"{start}\n{content}\n{end}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy the trained miniature into ckpts/mini and write its card.")
    parser.add_argument("--results", type=Path, default=Path("results/mini"))
    parser.add_argument("--target", type=Path, default=Path("ckpts/mini"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    release(args.results, args.target, args.readme)


if __name__ == "__main__":
    run_cli(main)
