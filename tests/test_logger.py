"""What a run shows while it runs: warnings in words, trackers, speed, drift from a reference, plots, the rehearsal."""

import json
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tokenizer.common.device import FlopCount, generator_for
from tokenizer.common.errors import UserError
from tokenizer.train import TokenizerTrainConfig
from tokenizer.training import logger
from tokenizer.training.cli import missing, parse_training_arguments
from tokenizer.training.logger import DiscriminatorHealth, MetricsLog, discriminator_warning
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig, TrainState
from tokenizer.training.train_step import train_step
from tokenizer.training.trainer import fit
from tokenizer.viz import plots

ROOT = Path(__file__).parents[1]


def train(folder: Path, steps: int = 12, **changes) -> Path:
    """A linear model learns to turn its input round; some terms look like those of a discriminator."""
    run = RunConfig(dir=str(folder), steps=steps, log_every=1, device="cpu", **changes)
    optim, torch_state = OptimConfig(lr=0.05, warmup_steps=0), torch.manual_seed(0)
    assert torch_state is not None
    model = nn.Linear(3, 3)

    def numbers(start: int) -> Iterator[Tensor]:
        for step in range(start, 10**6):
            yield torch.randn(8, 3, generator=generator_for(0, "data", step))

    def loss_fn(batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss = (model(batch) - batch.flip(1)).square().mean()
        return loss, {"discriminator/accuracy": 0.99, "discriminator/logit_gap": 7.0, "levels": torch.tensor([3, 1])}

    state = TrainState.start(model, run, optim)
    fit(run, {"run": {"dir": str(folder)}}, state, numbers, partial(train_step, run, state, loss_fn=loss_fn))
    return folder / "metrics.jsonl"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("accuracy", "gap", "words"),
    [
        (0.7, 1.0, None),
        (0.99, 8.0, "the discriminator wins (accuracy 0.99, logit gap 8.0)"),
        (0.5, 0.0, "the discriminator is dead"),
        (0.2, -1.0, "the discriminator is fooled"),
        (math.nan, 0.0, "not finite"),
    ],
)
def test_the_health_of_a_discriminator_in_words(accuracy: float, gap: float, words: str | None) -> None:
    found = discriminator_warning(accuracy, gap)
    assert found is None if words is None else words in str(found)


def test_a_warning_comes_once_until_the_discriminator_is_healthy_again() -> None:
    watch = DiscriminatorHealth()
    won, even = ({"discriminator/accuracy": a, "discriminator/logit_gap": 2.0} for a in (1.0, 0.6))
    said = [watch.look(values) is not None for values in [won] * 12 + [even] * 30 + [won] * 60 + [{}]]
    assert said[9] and not any(said[:9]) and sum(said) == 2


def test_a_single_batch_gives_no_warning() -> None:
    """Neither at the start of a run nor later; only a figure that is not finite is told at once."""
    won, dead, even = (
        {"discriminator/accuracy": a, "discriminator/logit_gap": g} for a, g in ((1.0, 9), (0.5, 0), (0.7, 1))
    )
    for odd in (won, dead):
        watch = DiscriminatorHealth()
        assert [watch.look(values) for values in [odd, *[even] * 15, odd, *[even] * 15]] == [None] * 32
    broken = DiscriminatorHealth().look({"discriminator/accuracy": math.nan, "discriminator/logit_gap": 0.0})
    assert broken is not None and "not finite" in broken


def test_what_is_logged_beside_the_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = lines(train(tmp_path))[0]
    perf = {"clips_per_second", "memory_gib", "eta_seconds", "checkpoint_stall"}
    assert {f"perf/{name}" for name in perf} <= first.keys() and first["levels"] == [3, 1]
    assert all(first[f"perf/{name}"] > 0 for name in perf - {"checkpoint_stall"})
    assert capsys.readouterr().err.count("the discriminator wins") == 1


def test_the_arithmetic_of_a_step_is_counted() -> None:
    """Products and attention, forwards and backwards: 2 n per number, and three products for each in training."""
    x, w = torch.rand(5, 7), torch.rand(7, 11, requires_grad=True)
    with FlopCount() as count:
        (x @ w).sum().backward()
    assert count.total == 2 * (2 * 5 * 7 * 11)
    with torch.inference_mode(), FlopCount() as count:
        nn.functional.linear(x, w.T)
    assert count.total == 2 * 5 * 7 * 11
    q = torch.rand(2, 3, 16, 8, requires_grad=True)
    with FlopCount() as count:
        out = nn.functional.scaled_dot_product_attention(q, q, q)
    assert count.total == 2 * (2 * 2 * 3 * 16 * 16 * 8)
    with FlopCount() as count:
        out.sum().backward()
    assert count.total == 5 * (2 * 2 * 3 * 16 * 16 * 8)


def test_a_run_that_leaves_its_reference_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = train(tmp_path / "first")
    capsys.readouterr()
    train(tmp_path / "same", reference=str(reference))
    assert "times that of the reference" not in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(line | {"loss": line["loss"] / 2}) + "\n" for line in lines(reference)))
    train(tmp_path / "drifting", reference=str(other))
    assert capsys.readouterr().err.count("warning: step 5: the loss is 2.00 times that of the reference") == 1
    with pytest.raises(UserError, match=r"run\.reference=nowhere\.jsonl: no such file"):
        train(tmp_path / "lost", reference="nowhere.jsonl")


def test_tensorboard_is_fed_and_an_absent_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "run", steps=2, trackers=["tensorboard"])
    events = list((tmp_path / "run" / "tracking").rglob("events.out.tfevents.*"))
    assert any(b"discriminator/accuracy" in file.read_bytes() for file in events)
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install"):
        train(tmp_path / "other", steps=1, trackers=["wandb"])
    assert missing(RunConfig(dir=str(tmp_path / "x"), trackers=["wandb"], reference="r"), 0.0) == [
        "the package wandb of run.trackers",
        "the file run.reference=r",
    ]
    with pytest.raises(UserError, match=r"run\.trackers=\['aim'\]: choose from tensorboard, wandb"):
        RunConfig(trackers=["aim"])


def test_trackers_get_every_step_once_and_wandb_an_id_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash after step 5, with the last checkpoint at 4: the resumed run sends 6 and later; the id stays."""
    sent: list[tuple[str, int]] = []

    class Tracker:
        def __init__(self, **settings: object) -> None: ...

        def init_trackers(self, project: str, config: object, init_kwargs: dict) -> None:
            self.id = init_kwargs["wandb"]["id"]

        def log(self, values: dict, step: int) -> None:
            sent.append((self.id, step))
            if step == 5 and not crashed:
                crashed.append(True)
                raise RuntimeError("crash")

        def end_training(self) -> None: ...

    crashed: list[bool] = []
    monkeypatch.setattr(logger.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(logger, "Accelerator", Tracker)
    settings = {"trackers": ["wandb"], "checkpoint_every": 2}
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path / "run", steps=8, **settings)
    (tmp_path / "run" / "tracking" / "last_step").write_text("5")  # the crash came after the step was sent
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tracking").mkdir()
    (tmp_path / "other" / "tracking" / "last_step").write_text("")
    with pytest.raises(UserError, match="last_step: damaged: holds no step"):
        train(tmp_path / "other", steps=1, **settings)
    train(tmp_path / "run", steps=8, **settings)
    assert [step for _, step in sent] == [1, 2, 3, 4, 5, 6, 7, 8] and len({id for id, _ in sent}) == 1
    first = sent[0][0]
    sent.clear()
    shutil.rmtree(tmp_path / "run")
    train(tmp_path / "run", steps=2, **settings)  # another run at the same path
    assert [step for _, step in sent] == [1, 2] and sent[0][0] != first


def test_one_batch_again_and_again(tmp_path: Path) -> None:
    losses = [line["loss"] for line in lines(train(tmp_path, steps=40, overfit_one_batch=True))]
    assert losses[-1] < 0.2 * losses[0] and losses == sorted(losses, reverse=True)


def test_the_flags_of_a_training_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(ROOT / "configs" / "debug" / "proxy.yaml")
    flags = ["--global-batch-size", "6", "--overfit-one-batch", "run.dir=r/x", "--dry-run"]
    monkeypatch.setattr("sys.argv", ["train", config, *flags])
    parsed, dry = parse_training_arguments(TokenizerTrainConfig, "vq", "")
    assert (parsed.run.batch_size, parsed.run.overfit_one_batch, parsed.run.dir, dry) == (6, True, "r/x-overfit", True)


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_curves_of_two_runs_in_one_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    for name, factor in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "loss": factor / step, "levels": [1], "nothing": None} for step in (1, 2, 3)]
        text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo'
        (tmp_path / name / "metrics.jsonl").write_text(text)
    out = tmp_path / "out" / f"curves.{suffix}"
    monkeypatch.setattr(
        "sys.argv", ["plot", str(tmp_path / "a"), str(tmp_path / "b" / "metrics.jsonl"), "--out", str(out)]
    )
    plots.main()
    assert f"1 figures of 2 runs: {out}" in capsys.readouterr().out
    if suffix == "html":
        page = out.read_text()
        assert "a: last 0.33333, b: last 0.66667" in page and "b: 1 at step 2" in page
        assert "http" not in page.replace("http-equiv", "")
    else:
        with Image.open(out) as picture:
            colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
        assert {(0x1F, 0x5F, 0xA8), (0xC8, 0x50, 0x1E)} <= colours
    monkeypatch.setattr("sys.argv", ["plot", str(tmp_path / "a"), "--only", "psnr"])
    with pytest.raises(UserError, match="--only psnr: no run logged it; there are loss"):
        plots.main()


def test_metrics_rewind_drops_later_and_torn_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        log.write(step, {"loss": 0.1 * step, "psnr": math.inf})
    with open(log.path, "a") as file:
        file.write('{"step": 2, "lo')
    log.rewind(2)
    found = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert found == [{"step": 1, "loss": 0.1, "psnr": None}, {"step": 2, "loss": 0.2, "psnr": None}]
