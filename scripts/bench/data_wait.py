"""The share of its time that a training on prepared clips waits for data, with 2 workers.

    python scripts/bench/data_wait.py [--quick]

A real run of configs/mini/proxy.yaml, shortened, on bundled clips that went through tokenizer/data/prepare.py: the
loop's own clock says how long each step lasted and how much of it passed before its batch was there. The first steps
are left out, in which the workers start. The ratio is wait / whole; the last line is JSON; exit 1 where it is above
0.02. It is wall time: on a machine that others use, the workers compete with them and the figure is an upper bound.
--quick takes 8 steps on 8 videos instead of 30 on 32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from _report import report

from tokenizer.common.config import load_config
from tokenizer.data.bundled_clips import bundled_videos
from tokenizer.data.manifest_table import ManifestRow, write_rows
from tokenizer.data.prepare import PrepareRule, prepare
from tokenizer.train import TokenizerTrainConfig, TokenizerTraining

GOAL = 0.02
WORKERS = 2
WARM_UP = 3
CONFIG = Path(__file__).parents[2] / "configs" / "mini" / "proxy.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description="The share of a training's time that waits for prepared clips.")
    parser.add_argument("--quick", action="store_true", help="8 steps on 8 videos, not 30 on 32")
    num_steps, num_videos = (8, 8) if parser.parse_args().quick else (30, 32)
    with tempfile.TemporaryDirectory() as folder:
        manifest = _prepared(Path(folder), num_videos)
        steps = _timed_steps(Path(folder, "run"), manifest, WARM_UP + num_steps)[WARM_UP:]
    whole = sum(step["seconds"] for step in steps)
    wait = sum(step["seconds"] * step["data_wait"] for step in steps)
    report(
        "data wait of the mini tokenizer with 2 workers",
        ratio=wait / whole,
        goal=GOAL,
        holds=wait / whole <= GOAL,
        step_seconds=round(whole / num_steps, 4),
        longest_wait_seconds=round(max(step["seconds"] * step["data_wait"] for step in steps), 4),
        num_steps=num_steps,
        clock="wall time",
    )


def _prepared(folder: Path, num_videos: int) -> Path:
    """The manifest of prepared copies of the first bundled training clips."""
    source = folder / "source.csv"
    write_rows(source, (ManifestRow(str(video.path), "") for video in bundled_videos("train")[:num_videos]))
    prepare(source, folder / "prepared", PrepareRule(), WORKERS)
    return folder / "prepared" / "manifest.csv"


def _timed_steps(folder: Path, manifest: Path, num_steps: int) -> list[dict[str, float]]:
    """A run of so many steps; its log, one line a step, without the validation at its end."""
    settings = [f"data.sources=[{manifest}]", "data.repeat=[]", f"run.num_workers={WORKERS}", "run.num_threads=1"]
    settings += ["val_data.sources=[bundled:heldout]", "val_clips=1", f"run.dir={folder}", f"run.steps={num_steps}"]
    settings += [
        "run.device=cpu",
        "run.reference=",
        "run.log_every=1",
        "run.validate_every=100000",
        "run.checkpoint_every=100000",
    ]
    TokenizerTraining(load_config(TokenizerTrainConfig, CONFIG, settings)).fit()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "data_wait" in line]


if __name__ == "__main__":
    main()
