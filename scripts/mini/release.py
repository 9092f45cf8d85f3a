"""The last steps of scripts/train/mini.sh: from results/mini to the shipped folder ckpts/mini, with its model card.

    python scripts/mini/release.py tokenizer     # final, router and held-out table: copy, measure, write
    python scripts/mini/release.py generation    # the two GPTs that were trained on the tokens of that tokenizer

Each part writes its weights, its figures, the card of the folder, and the figures between the markers of the README.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generation_figures
import tokenizer_figures
import torch

from tokenizer.common.checkpoint import atomic_write, file_sha256, read_model, save_model
from tokenizer.common.errors import UserError, run_cli
from tokenizer.router.reward import QualityTable, stats_of
from tokenizer.viz.page import between_markers

_TABLE = "heldout_table.safetensors"


@dataclass(frozen=True)
class Part:
    """What is shipped together: weights, in which precision (None: as trained), how their figures are measured and
    shown, and how large they may be."""

    weights: tuple[str, ...]
    stored: torch.dtype | None
    measure: Callable[[Path], dict[str, Any]]
    show: Callable[[dict[str, Any]], str]
    most_bytes: int


PARTS = {
    # a tokenizer's codes would change with its precision
    "tokenizer": Part(
        ("final", "router"), None, tokenizer_figures.held_out_figures, tokenizer_figures.as_markdown, 25 << 20
    ),
    # in float32 they would be larger than that
    "generation": Part(
        ("gpt_c2v", "gpt_fp"),
        torch.bfloat16,
        generation_figures.generation_figures,
        generation_figures.as_markdown,
        20 << 20,
    ),
}


def release(name: str, results: Path, target: Path, readme: Path, note: str = "") -> None:
    """Copy, measure, write the card, and put the figures between the markers of the README.

    `note`: what the card must say about this training, where it was not the plain command on one machine.
    """
    part = PARTS[name]
    target.mkdir(parents=True, exist_ok=True)
    for weights in part.weights:
        _ship_weights(results / weights / "final" / "model.safetensors", target / f"{weights}.safetensors", part.stored)
    if name == "tokenizer":
        _ship_table(results, target / _TABLE)
        _drop_what_no_longer_fits(target)
    if sum((target / f"{weights}.safetensors").stat().st_size for weights in part.weights) > part.most_bytes:
        raise UserError(f"{target}: more than {part.most_bytes >> 20} MB of weights; the repository cannot carry that")
    _write_sums(target)
    figures = part.measure(target)
    figures["trained"] = {weights: _training_of(results / weights) for weights in part.weights}
    if name == "tokenizer":
        figures["trained"]["proxy"] = _training_of(results / "proxy")
    figures["note"] = note
    atomic_write(_figures_path(target, name), (json.dumps(figures, indent=1) + "\n").encode())
    atomic_write(target / "README.md", card(target).encode())
    text = readme.read_text(encoding="utf-8")
    atomic_write(readme, between_markers(text, f"mini-{name}", part.show(figures)).encode())
    print(f"{target}: {', '.join(part.weights)}, their figures, and the card")


def card(folder: Path) -> str:
    """What the weights are, from what, by which command, in which time, how good: from the figures in the folder."""
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
    known = {name: _figures_path(folder, name) for name in PARTS if _figures_path(folder, name).is_file()}
    figures = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in known.items()}
    for some in figures.values():
        for weights, trained in some["trained"].items():
            file = folder / f"{weights}.safetensors"
            shown = f"{file.name} | {file.stat().st_size}" if file.is_file() else f"(the {weights}, not shipped) | -"
            seconds = "not known" if trained["seconds"] is None else f"{trained['seconds']:.0f}"
            lines.append(f"| {shown} | {trained['steps']} | {seconds} |")
    for name, some in figures.items():
        lines += ["", f"## {name.capitalize()}", "", *([some["note"], ""] if some["note"] else [])]
        lines.append(PARTS[name].show(some))
    return "\n".join([*lines, ""])


def _ship_weights(source: Path, path: Path, stored: torch.dtype | None) -> None:
    if stored is None:
        shutil.copyfile(source, path)
        return
    file = read_model(source)
    card = {**file.card, "stored_in": str(stored).removeprefix("torch.")}
    save_model(path, {name: tensor.to(stored) for name, tensor in file.tensors.items()}, file.config, card)


def _ship_table(results: Path, path: Path) -> None:
    """The held-out table, with what is needed to rate a router by it: weight and statistics of the reward."""
    table = QualityTable.load(results / "curate_heldout" / "table.safetensors")
    train_table = QualityTable.load(results / "curate_train" / "table.safetensors")
    router = read_model(results / "router").config
    table.meta.update(quality_weight=router["quality_weight"], reward_stats=vars(stats_of(train_table)))
    table.save(path)


def _drop_what_no_longer_fits(target: Path) -> None:
    """GPTs speak the codes of one tokenizer: a new one makes them useless."""
    stale = [target / f"{weights}.safetensors" for weights in PARTS["generation"].weights]
    for path in (*stale, _figures_path(target, "generation")):
        if path.is_file():
            print(f"removing {path}: it belongs to the tokenizer before this one")
            path.unlink()


def _write_sums(target: Path) -> None:
    sums = "".join(f"{file_sha256(file)}  {file.name}\n" for file in sorted(target.glob("*.safetensors")))
    atomic_write(target / "SHA256SUMS", sums.encode())


def _figures_path(folder: Path, name: str) -> Path:
    return folder / f"figures_{name}.json"


def _training_of(run: Path) -> dict[str, float | None]:
    """Steps, and the wall time of all logged ones (None without a log): validations and start-up are not counted."""
    log, steps = run / "metrics.jsonl", int(read_model(run).card["step"])
    if not log.is_file():
        return {"steps": steps, "seconds": None}
    with open(log, encoding="utf-8") as file:
        return {"steps": steps, "seconds": sum(json.loads(line).get("seconds", 0.0) for line in file)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy the trained miniature into ckpts/mini and write its card.")
    parser.add_argument("part", choices=list(PARTS), help="what to release")
    parser.add_argument("--results", type=Path, default=Path("results/mini"))
    parser.add_argument("--target", type=Path, default=Path("ckpts/mini"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--note", default="", help="a sentence for the card, say on which machines which part was made")
    args = parser.parse_args()
    release(args.part, args.results, args.target, args.readme, args.note)


if __name__ == "__main__":
    run_cli(main)
