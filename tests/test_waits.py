"""A training step never waits for its GPU: one copy a step, read in the next. No GPU is needed to see it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from pretend_gpu import GPU, PretendGPU
from test_gpt_training import FRAMES, MODEL
from test_train_step import bits, everything, gan_training, logged, nan_at, numbers, run_config
from torch import Tensor, nn

import autoregressive.attention
import tokenizer.blocks.attention
import tokenizer.training.train_state
from autoregressive.batches import TokenBatch
from autoregressive.model import GPT
from autoregressive.sequence import ClipCodes
from autoregressive.train import gpt_loss
from tokenizer.common.device import send
from tokenizer.common.errors import UserError
from tokenizer.train import TokenizerTraining
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig, TrainState
from tokenizer.training.train_step import Fetched, TooManySkipped, train_step


def no_kernel(q_Lhe: Tensor, k_Ghe: Tensor, v_Ghe: Tensor, *_ends, causal: bool) -> Tensor:
    """In place of a kernel of a GPU: something that depends on all of its inputs."""
    return q_Lhe * (k_Ghe.mean() + v_Ghe.mean())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    for module in (autoregressive.attention, tokenizer.blocks.attention):
        monkeypatch.setattr(module, "attend_varlen", partial(module.attend_varlen, kernel=no_kernel))
    monkeypatch.setattr(tokenizer.training.train_state, "pick_device", lambda name: GPU)
    monkeypatch.setattr("tokenizer.train.start_run", lambda run: GPU)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with PretendGPU() as pretended:
        yield pretended


def test_every_kind_of_wait_is_seen(gpu: PretendGPU) -> None:
    x = send(torch.arange(4.0), GPU)
    copy = Fetched(x)
    assert not gpu.waits and gpu.reads == 1 and copy.read().tolist() == [0, 1, 2, 3]
    waits = [
        lambda: float(x[0]), lambda: bool((x > 0).any()), lambda: x[x > 1], lambda: x[torch.tensor([1])], x.cpu,
        lambda: torch.arange(4).to(GPU), lambda: torch.tensor(1.0, device=GPU), lambda: x.new_tensor([1.0]),
        lambda: x.nonzero(), lambda: torch.ones(4).pin_memory().to(GPU), lambda: x.masked_select(x > 1),
    ]  # fmt: skip
    for number, wait in enumerate(waits):
        gpu.waits.clear()
        wait()
        assert gpu.waits, number


@pytest.mark.parametrize("config", [MODEL, FRAMES])
def test_no_step_of_a_gpt_waits(gpu: PretendGPU, config) -> None:
    layout, num = config.layout, config.layout.condition_tokens
    lengths = [(8, 2, 4, 8), (8, 2, 2, 2), (8, 2, 4, 4)]
    codes = [torch.arange(num + sum(row)) % 64 for row in lengths]
    classes = [0 if config.num_classes else None] * 3
    clips = [ClipCodes(c[num:], row, label, c[:num]) for c, row, label in zip(codes, lengths, classes, strict=True)]
    model, run = GPT(config), RunConfig(device="cuda", accumulate=2)
    state = TrainState.start(model, run, OptimConfig())
    batch = TokenBatch(layout, [layout.encode(clip) for clip in clips], config.width)
    for _ in range(2):
        gpu.waits.clear(), setattr(gpu, "reads", 0)
        values = train_step(run, state, batch, lambda part, step: gpt_loss(model, part))
    assert not gpu.waits and gpu.reads == 1
    assert values["loss"] == pytest.approx(math.log(layout.num_ids), abs=0.1) and values["grad_norm"] > 0


@pytest.mark.parametrize("more", [["run.accumulate=2"], ["model.bottleneck=kl", "loss.entropy=0", "loss.kl=1e-3"]])
def test_no_step_of_a_tokenizer_waits(gpu: PretendGPU, tmp_path: Path, more: list[str]) -> None:
    """With perceptual network, patch discriminator and augmentation."""
    perceptual = ["loss.perceptual=1", "loss.perceptual_net=stlpips_alex", "loss.perceptual_frames=2"]
    training = gan_training(tmp_path, "discriminator.augment=true", "run.batch_size=4", *perceptual, *more)
    training.state.train_mode(True)
    source = training.batches(0)
    for _ in range(2):
        batch = next(source)
        gpu.waits.clear(), setattr(gpu, "reads", 0)
        values = training.train_step(batch)
    assert not gpu.waits and gpu.reads == 1
    assert {"gan", "perceptual", "discriminator/accuracy"} <= values.keys() and math.isfinite(values["loss"])


# --- a verdict that is read a step later --------------------------------------------------------------------------


def lines(folder: Path) -> list[dict]:
    timing = ("seconds", "data_wait")
    return [
        {name: value for name, value in line.items() if name not in timing and not name.startswith("perf/")}
        for line in logged(folder)
    ]


def test_a_late_verdict_gives_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both networks, averages, moments, buffers, log and checkpoints, with skipped steps of either network."""

    def run(name: str, late: bool) -> TokenizerTraining:
        training = gan_training(tmp_path / name, "run.max_skipped=3", "discriminator.every=2", "run.log_every=2")
        training.state.late = late
        judge, reconstruct = training.gan.judge, training.reconstruct

        def judged(video: Tensor, side: str, step: int, *others) -> Tensor:
            return judge(video, side, step, *others) * (math.inf if (side, step) == ("real", 4) else 1)

        def rebuilt(batch, step: int):
            fake, loss, terms = reconstruct(batch, step)
            return fake, loss * (math.nan if step in (1, 6) else 1), terms

        monkeypatch.setattr(training.gan, "judge", judged)
        monkeypatch.setattr(training, "reconstruct", rebuilt)
        training.fit()
        return training

    at_once, late = run("at_once", False), run("late", True)
    assert everything(late) == everything(at_once) and lines(tmp_path / "late") == lines(tmp_path / "at_once")
    assert [t.skipped_at for t in late.state.trainables] == [[1, 6], [4]]
    assert late.state.unsettled is None and {line["step"] for line in lines(tmp_path / "late")} >= {2, 4, 6, 8, 9}


def test_a_late_verdict_stops_the_run_at_the_last_good_update() -> None:
    """The next step was computed already: none of it remains."""
    run, model = run_config(max_skipped=1), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = TrainState.start(model, run, OptimConfig())
    state.late, loss, good = True, nan_at(model, {1, 2}), b""
    with pytest.raises(TooManySkipped, match="step 2: loss is nan; 2 of the last 100"):
        for step in range(5):
            train_step(run, state, next(numbers(step)), loss)
            state.settle() if step == 0 else None
            good = good or bits(model) + bits(state.ema._averaged)
    assert state.step == 3 and state.unsettled is None and bits(model) + bits(state.ema._averaged) == good
    with pytest.raises(UserError, match="step 3: the gradient of 0.weight is nan"):  # named, though it is gone by then
        run.max_skipped = 0
        with mock.patch.object(nn.utils, "clip_grads_with_norm_"):
            train_step(run, state, next(numbers(3)), lambda x, step: (Broken.apply(model(x).square().mean()), {}))
        state.settle()


class Broken(torch.autograd.Function):
    """A finite number whose gradient is not."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * math.nan
