"""The training loop on a toy: killed anywhere it ends with the same bits, and it stops with the reason."""

import errno
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor, nn

from tokenizer.common import checkpoint
from tokenizer.common.checkpoint import read_model
from tokenizer.common.device import float32_mode, generator_for, slow_precision
from tokenizer.common.errors import UserError
from tokenizer.common.work_units import WorkUnits, claim_folder
from tokenizer.training import trainer
from tokenizer.training.cli import missing
from tokenizer.training.optim import OptimConfig, learning_rate
from tokenizer.training.train_state import RunConfig, TrainState
from tokenizer.training.train_step import train_step
from tokenizer.training.trainer import claim, fit

STEPS = 12


class Toy(nn.Module):
    """Dropout and a buffer that training changes: both must survive a kill."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.layers(x_BC)  # [B, 1]


Hook = Callable[[int], None]


def train(
    folder: Path,
    at_batch: Hook = lambda step: None,
    at_validation: Hook = lambda step: None,
    lr: float = 0.05,
    **changes,
) -> TrainState:
    """A toy run; the hooks are called with the step when its batch is fetched, and when it is validated."""
    settings = {"steps": STEPS, "log_every": 1, "validate_every": 5, "checkpoint_every": 3, "device": "cpu"}
    run = RunConfig(dir=str(folder), **{**settings, **changes})
    optim = OptimConfig(lr=lr, warmup_steps=2, clip_norm=0.5)
    torch.manual_seed(3)
    state = TrainState.start(Toy(), run, optim, kind="toy")

    def batches(start: int) -> Iterator[Tensor]:
        for step in range(start, 10**6):
            at_batch(step)
            yield torch.randn(6, 5, generator=generator_for(0, "data", step))

    def loss_fn(batch_BC: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        noise = torch.randn(6, 1, generator=generator_for(0, "noise", step))
        fit_term = (state.model(batch_BC) - batch_BC.sum(1, keepdim=True) - 0.1 * noise).square().mean()
        size_term = state.model.layers[0].weight.square().mean()
        return fit_term + 0.01 * size_term, {"fit": fit_term.detach(), "size": size_term.detach()}

    def validate(step: int) -> dict[str, float]:
        assert not state.model.training
        at_validation(step)
        torch.rand(3)  # a validation that draws must not change the training
        return {"out": float(state.model(torch.ones(2, 5)).mean())}

    config = {"run": {"dir": str(folder), **changes}, "optim": {"lr": lr}}
    fit(run, config, state, batches, partial(train_step, run, state, loss_fn=loss_fn), validate)
    return state


def lines(folder: Path) -> list[dict]:
    """What was logged, without the clock's fields."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "data_wait")
    return [{k: v for k, v in line.items() if k not in clock and not k.startswith("perf/")} for line in found]


def weights(folder: Path) -> list[bytes]:
    names = ("model.safetensors", "model.raw.safetensors")
    return [t.numpy().tobytes() for n in names for _, t in sorted(read_model(folder / "final" / n).tensors.items())]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(target: Callable[[], object]) -> int | None:
    """Run `target` in a process of its own; its exit code, -9 where it was killed."""
    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    child.join(60)
    return child.exitcode


def waited_for(path: Path) -> None:
    """Checkpoints are written in the background."""
    while not path.exists():
        time.sleep(0.001)


def killed_at_batch(folder: Path, step: int) -> Callable[[], object]:
    return lambda: train(folder, at_batch=lambda now: die() if now == step else None)


def killed_at_sync(folder: Path, number: int) -> Callable[[], object]:
    """Dies inside the writing of a checkpoint, at the fsync of that number."""

    def target() -> None:
        seen, real = [], os.fsync

        def fsync(descriptor: int) -> None:
            seen.append(descriptor)
            if len(seen) == number:
                die()
            real(descriptor)

        checkpoint.os.fsync = fsync
        train(folder)

    return target


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


@pytest.mark.parametrize("moments", [[1, 2], [4, 6, 7, 11]])
def test_killed_between_steps_ends_with_the_same_bits(tmp_path: Path, whole: Path, moments: list[int]) -> None:
    for step in moments:
        assert in_child(killed_at_batch(tmp_path, step)) == -signal.SIGKILL
    fetched: list[int] = []
    train(tmp_path, at_batch=fetched.append)
    assert fetched[0] % 3 == 0  # it went on from a checkpoint; the newest may have been in the making
    assert lines(tmp_path) == lines(whole)
    assert weights(tmp_path) == weights(whole)


@pytest.mark.parametrize("number", [4, 8, 9, 11, 20, 30, 38, 40])
def test_killed_while_writing_ends_with_the_same_bits(tmp_path: Path, whole: Path, number: int) -> None:
    assert in_child(killed_at_sync(tmp_path, number)) == -signal.SIGKILL
    train(tmp_path)
    assert lines(tmp_path) == lines(whole)
    assert weights(tmp_path) == weights(whole)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damaged_checkpoint_ends_with_the_same_bits(
    tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    newest = tmp_path / "checkpoints" / "00000006" / "optimizer.safetensors"

    def killed() -> None:
        train(tmp_path, at_batch=lambda step: (waited_for(newest), die()) if step == 7 else None)

    assert in_child(killed) == -signal.SIGKILL
    newest.write_bytes(newest.read_bytes()[:-1] + (b"\x7f" if damage == "flipped" else b""))
    with caplog.at_level(logging.WARNING):
        train(tmp_path)
    assert "00000006 is damaged" in caplog.text
    assert lines(tmp_path) == lines(whole) and weights(tmp_path) == weights(whole)


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)])
def test_signal_saves_then_stops(tmp_path: Path, whole: Path, numbers: tuple[int, ...]) -> None:
    """Schedulers signal every process, and torchrun passes a signal on: a process may get it several times."""

    def signalled(step: int) -> None:
        for number in numbers if step == 4 else ():
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match="after step 5; the same command continues"):
        train(tmp_path, at_batch=signalled)
    assert (tmp_path / "checkpoints" / "00000005").is_dir()
    train(tmp_path)
    assert lines(tmp_path) == lines(whole) and weights(tmp_path) == weights(whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_SAME_STOP", -1.0)  # seconds: no copy of the first
    steps: list[int] = []

    def pressed(step: int) -> None:
        steps.append(step)
        for _ in range(2 if step == 4 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, at_batch=pressed)
    assert steps[-1] == 4 and not (tmp_path / "checkpoints" / "00000005").exists()


def test_killed_at_twelve_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    steps, random = 40, Random(7)

    def run(name: str) -> TrainState:
        return train(tmp_path / name, at_batch=lambda step: time.sleep(0.002), steps=steps)

    run("whole")
    metrics = tmp_path / "torn" / "metrics.jsonl"
    for moment in sorted(random.sample(range(1, steps - 2), 12)):
        child = multiprocessing.get_context("fork").Process(target=run, args=("torn",))
        child.start()
        while child.is_alive() and not (metrics.exists() and metrics.read_text().count('"loss"') >= moment):
            time.sleep(0.001)
        time.sleep(random.random() * 0.01)
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    run("torn")
    assert lines(tmp_path / "torn") == lines(tmp_path / "whole")
    assert weights(tmp_path / "torn") == weights(tmp_path / "whole")


def test_full_disk_stops_the_run_and_keeps_the_checkpoint_before(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *others: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    def fill(step: int) -> None:
        if step == 5:
            waited_for(tmp_path / "checkpoints" / "00000003")
            monkeypatch.setattr(checkpoint, "write_tensors", full)

    with pytest.raises(OSError, match="No space left"):  # of the writing in the background
        train(tmp_path, at_batch=fill)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000003"]
    train(tmp_path)
    assert lines(tmp_path) == lines(whole) and weights(tmp_path) == weights(whole)


@pytest.mark.parametrize("at", [5, STEPS])
def test_a_validation_that_failed_is_made_up_for(tmp_path: Path, whole: Path, at: int) -> None:
    """The step before it is kept, and the log ends with each validation once, also that of the last step."""

    def fail(step: int) -> None:
        if step == at:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path, at_validation=fail)
    fetched: list[int] = []
    train(tmp_path, at_batch=fetched.append)
    assert fetched == [*range(at, STEPS)]
    assert lines(tmp_path) == lines(whole) and weights(tmp_path) == weights(whole)


def test_checkpoints_kept_for_good(tmp_path: Path) -> None:
    train(tmp_path, keep_last=1, keep_every=6, steps=15)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000006", "00000012", "00000015"]


def test_what_a_run_leaves(whole: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "final"} <= {p.name for p in whole.iterdir()}
    file = read_model(whole)
    assert file.card == {"kind": "toy", "float32": float32_mode(), "weights": "ema", "step": str(STEPS)}
    assert file.config["optim"] == {"lr": 0.05}
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "fit", "size", "lr", "grad_norm", "data_wait", "seconds"} <= first.keys()
    assert [line["step"] for line in lines(whole) if "val/out" in line] == [5, 10, 12]
    losses = [line["loss"] for line in lines(whole) if "loss" in line]
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)


def test_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path, steps=3)
    before = (tmp_path / "metrics.jsonl").read_text(), weights(tmp_path)
    train(tmp_path, steps=3)
    assert ((tmp_path / "metrics.jsonl").read_text(), weights(tmp_path)) == before


def test_other_config_is_refused_and_steps_may_grow(tmp_path: Path) -> None:
    train(tmp_path, steps=2)
    with pytest.raises(UserError, match=r"another config .*optim\.lr: 0\.05 / 0\.01"):
        train(tmp_path, steps=2, lr=0.01)
    assert train(tmp_path, steps=4, num_threads=1, log_every=2).step == 4


def test_more_steps_on_a_resume_never_jump_the_learning_rate_silently(tmp_path: Path) -> None:
    """A cosine over 8 steps that ends low, then one over 16: refused, or over run.rewarm steps, also after a kill."""
    train(tmp_path, steps=8)
    with pytest.raises(
        UserError, match=r"run\.steps=8 there, 16 here: .*rate of the model would jump from .* run\.rewarm"
    ):
        train(tmp_path, steps=16)
    with pytest.raises(UserError, match="would jump"):  # a refusal is not forgotten
        train(tmp_path, steps=16)

    def killed() -> None:
        train(tmp_path, steps=16, rewarm=4, at_batch=lambda step: die() if step == 8 else None)

    assert in_child(killed) == -signal.SIGKILL
    train(tmp_path, steps=16, rewarm=4)
    rates = {line["step"] - 1: line["lr"] for line in lines(tmp_path) if "lr" in line}
    optim = OptimConfig(lr=0.05, warmup_steps=2, clip_norm=0.5)
    old, new = ([learning_rate(step, steps, optim) for step in range(16)] for steps in (8, 16))
    wanted = old[:8] + [old[7] + (new[step] - old[7]) * (step - 7) / 4 for step in range(8, 12)] + new[12:]
    assert [rates[step] for step in range(16)] == pytest.approx(wanted)


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*others: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", none)
    monkeypatch.setattr("fcntl.lockf", none)
    words = r"this file system has no locks \(Function not implemented\), .* use a folder on another one"
    with pytest.raises(UserError, match=words):
        train(tmp_path, steps=1)
    with pytest.raises(UserError, match=words):
        WorkUnits(tmp_path / "units", 1).work(lambda unit: None, lambda: None, None)
    with pytest.raises(UserError, match=words):
        claim_folder(tmp_path / "made", {})
    assert [line for line in missing(RunConfig(dir=str(tmp_path / "x")), 0.0) if line.startswith("locks: ")]


def test_a_run_goes_on_with_other_settings_where_that_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, steps=2)
    assert train(tmp_path, steps=3, lr=0.01, allow_changes=True).step == 3
    assert "optim.lr: 0.05 / 0.01" in capsys.readouterr().out
    assert "0.05" in (tmp_path / "config.1.yaml").read_text() and "0.01" in (tmp_path / "config.yaml").read_text()
    (tmp_path / "other").mkdir()
    claim(tmp_path / "other", {"model": {"width": 4}})
    with pytest.raises(UserError, match=r"model\.width: 4 / 8; choose run\.dir=OTHER$"):
        claim(tmp_path / "other", {"model": {"width": 8}}, allow_changes=True)


def test_nan_loss_names_step_and_term(tmp_path: Path) -> None:
    run, optim = RunConfig(dir=str(tmp_path), steps=9, checkpoint_every=1, device="cpu"), OptimConfig(warmup_steps=0)
    state = TrainState.start(Toy(), run, optim)

    def loss_fn(batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        entropy = state.model(batch).mean() * (math.nan if step == 2 else 1.0)
        return entropy, {"fine": torch.ones(()), "entropy": entropy.detach()}

    with pytest.raises(UserError, match="step 2: entropy is nan"):
        step_fn = partial(train_step, run, state, loss_fn=loss_fn)
        fit(run, {}, state, lambda start: iter([torch.ones(2, 5)] * 9), step_fn)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["00000001", "00000002"]
    assert all(p.isfinite().all() for p in state.model.parameters())


def test_nan_gradient_names_step_and_parameter(tmp_path: Path) -> None:
    run, optim = RunConfig(dir=str(tmp_path), steps=3, device="cpu"), OptimConfig(warmup_steps=0)
    state = TrainState.start(nn.Linear(2, 1, bias=False), run, optim)

    def loss_fn(batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return (state.model(batch) * 0).sqrt().sum(), {}  # the slope of sqrt at 0 is infinite

    with pytest.raises(UserError, match="step 0: the gradient of weight is nan"):
        step_fn = partial(train_step, run, state, loss_fn=loss_fn)
        fit(run, {}, state, lambda start: iter([torch.ones(1, 2)] * 3), step_fn)


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    def second(step: int) -> None:
        if step == 1:
            codes.append(in_child(lambda: refused(tmp_path)))

    def refused(folder: Path) -> None:
        with pytest.raises(UserError, match="another run is writing here"):
            train(folder, steps=2)

    codes: list[int | None] = []
    train(tmp_path, at_batch=second, steps=2)
    assert codes == [0]


def test_num_threads_is_obeyed(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen = []
    try:
        train(tmp_path, at_batch=lambda step: seen.append(torch.get_num_threads()), steps=1, num_threads=2)
    finally:
        torch.set_num_threads(before)
    assert seen == [2]


def test_plain_progress_lines_in_a_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, steps=4, log_every=2)
    printed = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in printed if "ETA" in line] == ["step 2/4", "step 4/4"]
    assert all("loss" in line and "data wait" in line for line in printed if "ETA" in line)


@pytest.mark.parametrize("wrong", [{"log_every": 0}, {"ema_decay": 1.0}, {"precision": "fp8"}, {"steps": -1}])
def test_impossible_run_settings(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        RunConfig(**wrong)


def test_a_precision_that_the_cpu_lacks_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured, not looked up: the clock here runs slower for half precision."""
    ticks = itertools.chain([0, 7] * 3, [0, 2] * 3)
    monkeypatch.setattr("tokenizer.common.device.time.perf_counter", lambda: next(ticks, 0))
    train(tmp_path, steps=0, precision="bf16")
    assert "bf16 takes 4 times as long as in float32: run.precision=none is faster here" in capsys.readouterr().err
    assert slow_precision(torch.device("cpu"), "none") is slow_precision(torch.device("cuda"), "bf16") is None


def test_missing_device_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"device='tpu': must be auto, cpu, cuda"):
        train(tmp_path, device="tpu")
