"""The release of the miniature: its gates, and the way from results/mini to the shipped folder ckpts/mini.

    python scripts/mini/release.py round         # after stage 4: store the final tokenizer in float16, in its place
    python scripts/mini/release.py               # print the gates of ckpts/mini (scripts/mini/gates.py)
    python scripts/mini/release.py tokenizer     # final, router and held-out table: copy, measure, write
    python scripts/mini/release.py generation    # the two GPTs that were trained on the tokens of that tokenizer

Each part writes its weights and its figures, then fills the marked places of the model card (ckpts/mini/README.md) and
of README.md. A part whose gates are missed is not shipped without --below-gates "reason", which the card then prints.
Redraw the pictures afterwards: `python scripts/mini/readme_figure.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generation_figures
import tokenizer_figures
import torch
from gates import HEADER, measure_gates

from tokenizer.common.checkpoint import atomic_write, file_sha256, read_model, save_model
from tokenizer.common.errors import UserError, run_cli
from tokenizer.router.reward import QualityTable, stats_of
from tokenizer.viz.page import between_markers, has_markers, markdown_table

_TABLE = "heldout_table.safetensors"
_CARD = Path("ckpts/mini/README.md")  # the text around the marked places


@dataclass(frozen=True)
class Part:
    """The parts of a release: weights, in which precision (None: as trained), how their figures are measured and
    shown, and how large they may be."""

    weights: tuple[str, ...]
    stored: torch.dtype | None
    measure: Callable[[Path], dict[str, Any]]
    show: Callable[[dict[str, Any]], str]
    most_bytes: int


PARTS = {
    # as they are: GPTs are bound to the file of the tokenizer, so it is rounded before their tokens are made
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


def release(
    name: str, results: Path, target: Path, readme: Path, note: str = "", below_gates: str | None = None
) -> None:
    """Measure the weights beside the target; if the gates hold, replace the target and fill the marked places.

    note: a sentence for the card, if this training was not the plain command on one machine. below_gates: the reason
    for shipping weights that miss a gate, without which UserError leaves the target as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".release-", dir=target.parent) as name_of_draft:
        draft = Path(name_of_draft) / target.name
        shutil.copytree(target, draft) if target.is_dir() else draft.mkdir()
        _measure_part(name, results, draft, note)
        gates = measure_gates(draft)
        print(markdown_table(HEADER, [each.cells for each in gates]))
        missed = [each.gate.name for each in gates if not each.holds]
        if missed and below_gates is None:
            raise UserError(
                f'{len(missed)} gates are missed ({missed[0]} ..); --below-gates "reason" ships all the same'
            )
        lines = [markdown_table(HEADER, [each.cells for each in gates])]
        if missed:
            lines += ["", f"Shipped below {len(missed)} gates: {below_gates}"]
        atomic_write(draft / "gates.md", ("\n".join(lines) + "\n").encode())
        before = Path(name_of_draft) / "before"
        if target.is_dir():
            target.rename(before)
        draft.rename(target)
    write_cards(target, readme)
    print(f"{target}: {', '.join(PARTS[name].weights)}, figures, gates, the model card; {readme}: the table of results")


def round_weights(run: Path) -> None:
    """Store the finished tokenizer of a run in float16, in its place; one that is stored so already stays as it is.

    Between stages 4 and 5a: the tokens of stage 5a and the GPTs belong to the very file that is shipped and measured.
    UserError if a weight leaves the range of float16.
    """
    path = run / "final" / "model.safetensors"
    file = read_model(path)
    if "stored_in" in file.card:
        print(f"{path}: already in {file.card['stored_in']}")
        return
    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in file.tensors.items()}
    if lost := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path}: {lost[0]} leaves the range of float16")
    sums = path.with_name("SHA256SUMS")
    sums.unlink(missing_ok=True)  # a kill in between must not leave the sum of the other file
    save_model(path, tensors, file.config, {**file.card, "stored_in": "float16"})
    files = sorted(path.parent.glob("*.safetensors"))
    atomic_write(sums, "".join(f"{file_sha256(each)}  {each.name}\n" for each in files).encode())
    print(f"{path}: float16, {path.stat().st_size} bytes, sha256 {file_sha256(path)}")


def _measure_part(name: str, results: Path, target: Path, note: str) -> None:
    """Copy the weights of a part to `target` and measure them there."""
    part = PARTS[name]
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


def write_cards(folder: Path, readme: Path) -> None:
    """Fill the marked places of the folder's model card and of README.md from the figures in the folder."""
    card = folder / "README.md"
    if not card.is_file():
        shutil.copyfile(_CARD, card)
    figures = {name: _figures(folder, name) for name in PARTS}
    places = {"mini-files": _files_table(folder, figures)}
    for name, some in figures.items():
        shown = [some["note"], "", PARTS[name].show(some)] if some and some["note"] else [PARTS[name].show(some)]
        places[f"mini-{name}"] = "\n".join(shown) if some else "Not measured for these weights."
    if has_markers(card.read_text(encoding="utf-8"), "mini-gates"):
        gates = folder / "gates.md"
        places["mini-gates"] = gates.read_text(encoding="utf-8").strip() if gates.is_file() else "Not measured."
    _fill(card, places)
    _fill(readme, {"mini-results": _results_table(folder, figures)})


def _fill(page: Path, places: dict[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    for name, content in places.items():
        text = between_markers(text, name, content)
    atomic_write(page, text.encode())


def _figures(folder: Path, name: str) -> dict[str, Any]:
    """The figures of a part; empty if it was not measured."""
    path = _figures_path(folder, name)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _files_table(folder: Path, figures: dict[str, dict[str, Any]]) -> str:
    rows = []
    for some in figures.values():
        for weights, trained in some.get("trained", {}).items():
            file = folder / f"{weights}.safetensors"
            shown = [file.name, str(file.stat().st_size)] if file.is_file() else [f"({weights}, not shipped)", "-"]
            seconds = "not known" if trained["seconds"] is None else f"{trained['seconds']:.0f}"
            rows.append([*shown, str(trained["steps"]), seconds])
    return markdown_table(["file", "bytes", "training steps", "seconds in training steps"], rows)


def _results_table(folder: Path, figures: dict[str, dict[str, Any]]) -> str:
    """One row for each shipped file, with its main figure."""
    rows = []
    if tokenizer := figures["tokenizer"]:
        net, final, router = tokenizer["perceptual_net"], tokenizer["final"]["router"], tokenizer["router"]
        quality = f"{final['psnr']:.2f} dB, {net} {final['lpips']:.3f} at {final['tokens']:.0f} tokens"
        percentiles = router["percentile"], router["best_uniform_percentile"]
        reward = "reward percentile {:.1%}; best uniform length {:.1%}".format(*percentiles)
        rows += [("final", "tokenizer", quality), ("router", "its router", reward)]
    if generation := figures["generation"]:
        share, ways = (
            generation["class_to_video"]["accuracy"]["generated"]["all"],
            generation["frame_prediction"]["ways"],
        )
        predicted, repeated = (ways[way]["all"]["lpips"] for way in ("predicted", "last frame repeated"))
        distance = f"{generation['perceptual_net']} {predicted:.3f}; last given frame repeated {repeated:.3f}"
        rows.append(("gpt_c2v", "class-to-video GPT", f"class recognised in {share:.0%} of its clips"))
        rows.append(("gpt_fp", "frame-prediction GPT", distance))
    shown = [[f"`{name}`, {_millions(folder / f'{name}.safetensors')}", *cells] for name, *cells in rows]
    return markdown_table(["weights in `ckpts/mini`", "what", "measured on held-out clips"], shown)


def _millions(path: Path) -> str:
    return f"{sum(tensor.numel() for tensor in read_model(path).tensors.values()) / 1e6:.1f}M"


def _ship_weights(source: Path, path: Path, stored: torch.dtype | None) -> None:
    if stored is None:
        shutil.copyfile(source, path)
        return
    file = read_model(source)
    card = {**file.card, "stored_in": str(stored).removeprefix("torch.")}
    save_model(path, {name: tensor.to(stored) for name, tensor in file.tensors.items()}, file.config, card)


def _ship_table(results: Path, path: Path) -> None:
    """The held-out table, with the weight and statistics of the reward, by which a router is rated."""
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
    parser.add_argument("part", nargs="?", choices=["round", *PARTS], help="what to do (default: print the gates)")
    parser.add_argument("--results", type=Path, default=Path("results/mini"))
    parser.add_argument("--target", type=Path, default=Path("ckpts/mini"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--note", default="", help="a sentence for the card, such as the machines of each part")
    parser.add_argument("--below-gates", metavar="REASON", help="ship although gates are missed; printed in the card")
    args = parser.parse_args()
    if args.part == "round":
        round_weights(args.results / "final")
        return
    if args.part:
        release(args.part, args.results, args.target, args.readme, args.note, args.below_gates)
        return
    print(markdown_table(HEADER, [each.cells for each in measure_gates(args.target)]))


if __name__ == "__main__":
    run_cli(main)
