"""One update: the GAN step, both updates or none, every kind of fault and the recovery from it, losses by count."""

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tokenizer.common.checkpoint import Checkpoint, CheckpointStore, read_model
from tokenizer.common.config import load_config
from tokenizer.common.device import generator_for
from tokenizer.common.errors import UserError
from tokenizer.data.loader import ClipBatch
from tokenizer.train import TokenizerTrainConfig, TokenizerTraining
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig, Trainable, TrainState
from tokenizer.training.train_step import Summed, Values, train_step
from tokenizer.training.trainer import fit

OPTIM = OptimConfig(lr=0.05, warmup_steps=0)
PROXY = Path(__file__).parents[1] / "configs" / "debug" / "proxy.yaml"
GAN = [
    *("loss.gan=0.3", "loss.perceptual=0", "loss.perceptual_net=none", "optim.warmup_steps=0"),
    *("discriminator.net=patch", "discriminator.every=1", "discriminator.patch.layers=1"),
    *("discriminator.patch.width=16", "discriminator.patch.heads=2"),
    *("data.sources=[synthetic:train:8]", "val_data.sources=[synthetic:heldout:1]", "val_clips=1"),
    *("run.steps=9", "run.checkpoint_every=2", "run.validate_every=100", "run.log_every=1", "run.device=cpu"),
]


def run_config(folder: Path | str = "", **changes) -> RunConfig:
    return RunConfig(dir=str(folder), **{"steps": 9, "log_every": 1, "checkpoint_every": 2, "device": "cpu", **changes})


def numbers(start: int) -> Iterator[Tensor]:
    for step in range(start, 10**6):
        yield torch.randn(8, 3, generator=generator_for(0, "data", step))


def toy_fit(run: RunConfig, model: nn.Module, loss_fn: Callable) -> TrainState:
    state = TrainState.start(model, run, OPTIM)
    fit(run, {}, state, numbers, partial(train_step, run, state, loss_fn=loss_fn))
    return state


def gan_training(folder: Path | str, *overrides: str) -> TokenizerTraining:
    """The debug tokenizer with a patch discriminator that learns at every step."""
    return TokenizerTraining(load_config(TokenizerTrainConfig, PROXY, [*GAN, f"run.dir={folder}", *overrides]))


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def bits(module: nn.Module) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())


def everything(training: TokenizerTraining) -> list[bytes]:
    """The bits of all that a step may change: both networks with their buffers, averages, moments."""
    state = training.state
    assert state.discriminator is not None
    modules = [bits(state.main.module), bits(state.discriminator.module)]
    moments = [
        value.numpy().tobytes()
        for trainable in state.trainables
        for own in trainable.optimizer.state.values()
        for value in own.values()
    ]
    return [*modules, *(tensor.numpy().tobytes() for tensor in state.ema.tensors().values()), *moments]


# --- the GAN step ---------------------------------------------------------------------------------------------------


def test_each_network_learns_from_its_own_loss_alone(tmp_path: Path) -> None:
    """The tokenizer's update leaves no gradient in the discriminator, and the other way round; both move at the end."""
    training = gan_training(tmp_path, "discriminator.every=2")
    state, source = training.state, training.batches(0)
    discriminator = state.discriminator
    assert discriminator is not None
    state.train_mode(True)
    moved = []
    for _ in range(4):
        before = bits(training.model), bits(discriminator.module)
        values = training.train_step(next(source))
        moved.append((bits(training.model) != before[0], bits(discriminator.module) != before[1]))
        assert "gan" in values and ("discriminator/loss" in values) == (state.step % 2 == 1)
    assert moved == [(True, True), (True, False)] * 2
    discriminator.optimizer.zero_grad(set_to_none=True)
    training.train_step(next(source))  # learns
    training.train_step(next(source))  # rests: the tokenizer's loss, which asks it, leaves nothing in it
    gradients = [p.grad for p in discriminator.module.parameters()]
    training.train_step(next(source))
    assert all(p.requires_grad for module in (training.model, discriminator.module) for p in module.parameters())
    assert any(gradient is not None for gradient in gradients)  # those of step 4 stay until step 6 clears them


def test_accumulated_parts_make_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    """Two parts of one clip against one of two: both networks, up to rounding."""

    def steps(parts: int) -> tuple[list[Values], TokenizerTraining]:
        # equal token counts: then means over parts are those of the whole, except for LeCam and the entropy
        same = ["policy.kind=fixed", "policy.lengths=[4,2,8,2]", "loss.entropy=0", "discriminator.lecam=0"]
        training = gan_training(tmp_path, f"run.accumulate={parts}", "optim.lr=1e-5", *same)
        training.state.train_mode(True)
        source = training.batches(0)
        return [training.train_step(next(source)) for _ in range(2)], training

    (whole, one), (parts, two) = steps(1), steps(2)
    for left, right in zip(whole, parts, strict=True):
        assert left.keys() == right.keys()
        for name in ("loss", "l1", "gan", "discriminator/loss", "discriminator/gan", "grad_norm"):
            assert right[name] == pytest.approx(left[name], rel=1e-4), name
    for name, tensor in one.gan.module.state_dict().items():
        torch.testing.assert_close(two.gan.module.state_dict()[name], tensor, rtol=0, atol=1e-4)


def test_a_killed_gan_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    def run(name: str, die_at: int | None = None) -> None:
        training = gan_training(tmp_path / name, "discriminator.every=2")
        step = training.train_step

        def dies(batch: ClipBatch) -> Values:
            if training.state.step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(batch)

        training.train_step = dies  # type: ignore[method-assign]
        training.fit()

    run("whole")
    context = multiprocessing.get_context("fork")
    for moment in (1, 4, 7):
        child = context.Process(target=run, args=("torn", moment))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    run("torn")
    one, two = (CheckpointStore(tmp_path / name / "checkpoints").load_latest() for name in ("whole", "torn"))
    assert one is not None and two is not None
    assert {"model", "ema", "optimizer", "discriminator", "discriminator_optimizer"} == one.groups.keys()
    for group, tensors in one.groups.items():
        assert all(torch.equal(two.groups[group][name], tensor) for name, tensor in tensors.items()), group
    assert "quantizer.codebook.weight" in read_model(tmp_path / "torn").tensors  # final/ holds the model alone
    bare = gan_training(tmp_path / "torn").state
    store = CheckpointStore(tmp_path / "torn" / "checkpoints")
    store.save(Checkpoint(9, {"model": {}, "ema": {}, "optimizer": {}}, {}, {}))
    with pytest.raises(UserError, match="00000009: holds no discriminator; use the config it came with"):
        bare.load(store)


def test_every_line_holds_the_last_figures_of_a_discriminator_that_rests(tmp_path: Path) -> None:
    """It learns in the steps 1, 3, .. 9; lines are written after 4, 8 and 9, also by a run that resumed at 3."""

    def run(name: str) -> TokenizerTraining:
        return gan_training(tmp_path / name, "discriminator.every=2", "run.log_every=4", "run.checkpoint_every=3")

    def lines(name: str) -> list[dict]:
        wanted = ("step", "loss", "discriminator/loss", "discriminator/lr", "discriminator/grad_norm")
        return [{key: line[key] for key in wanted} for line in logged(tmp_path / name) if "loss" in line]

    run("whole").fit()
    assert [line["step"] for line in lines("whole")] == [4, 8, 9]
    stopped = run("torn")
    step = stopped.train_step

    def stops(batch: ClipBatch) -> Values:
        if stopped.state.step == 3:
            raise UserError("stopped here")
        return step(batch)

    stopped.train_step = stops  # type: ignore[method-assign]
    with pytest.raises(UserError, match="stopped here"):
        stopped.fit()
    run("torn").fit()
    assert lines("torn") == lines("whole")


# --- faults: nothing may change in a step whose numbers are not finite ----------------------------------------------

INF = torch.tensor(math.inf)


def inf_logit(training: TokenizerTraining) -> None:
    """One infinite logit for a real clip, as a broken discriminator gives it; LeCam's means see it."""
    judge = training.gan.judge

    def broken(video: Tensor, side: str, *others) -> Tensor:
        logits_BK = judge(video, side, *others)
        return torch.where(torch.arange(logits_BK.shape[1]) == 0, INF, logits_BK) if side == "real" else logits_BK

    training.gan.judge = broken


def nan_loss(training: TokenizerTraining) -> None:
    reconstruct = training.reconstruct

    def broken(batch: ClipBatch, step: int):
        fake, loss, terms = reconstruct(batch, step)
        return fake, loss * math.nan, terms

    training.reconstruct = broken  # type: ignore[method-assign]


def inf_gradient(network: Callable[[TokenizerTraining], nn.Module], training: TokenizerTraining) -> None:
    """A loss that is finite with a gradient that is not: the slope of sqrt at 0."""
    weight = next(p for p in network(training).parameters() if p.ndim >= 2)
    target = "loss" if network(training) is not training.model else "reconstruct"
    owner = training.gan if target == "loss" else training
    real = getattr(owner, target)

    def broken(*inputs):
        answer = list(real(*inputs))
        place = 0 if target == "loss" else 1
        answer[place] = answer[place] + (weight * 0).sqrt().sum()
        return tuple(answer)

    setattr(owner, target, broken)


FAULTS = {
    "inf logit of a real clip": (inf_logit, "discriminator", "discriminator/gan is inf|discriminator/lecam is inf"),
    "NaN loss of the generator": (nan_loss, "model", "loss is nan"),
    "gradient of the generator": (partial(inf_gradient, lambda t: t.model), "model", "the gradient of .* is nan"),
    "gradient of the discriminator": (
        partial(inf_gradient, lambda t: t.gan.discriminator),
        "discriminator",
        "discriminator/the gradient of .* is nan",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("precision", ["none", "fp16"])
def test_a_fault_changes_nothing_and_training_recovers(
    fault: str, precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The step after a skipped one is, to the bit, that of a run whose fault never came."""
    inject, blamed, words = FAULTS[fault]

    def start() -> TokenizerTraining:
        training = gan_training(tmp_path, "run.max_skipped=2", f"run.precision={precision}")
        for trainable in training.state.trainables:
            trainable.scaler = torch.amp.GradScaler("cpu", init_scale=0.5, enabled=precision == "fp16")
        training.state.train_mode(True)
        return training

    broken, clean = start(), start()
    batch = next(broken.batches(0))
    for training in (broken, clean):
        training.train_step(batch)
    before, scales = everything(broken), [t.scaler.state_dict() for t in broken.state.trainables]
    healthy = dict(vars(broken)), dict(vars(broken.gan))
    inject(broken)
    values = broken.train_step(batch)
    assert math.isnan(values["loss"]) and everything(broken) == before
    assert [t.scaler.state_dict() for t in broken.state.trainables] == scales
    assert {t.name: t.skipped for t in broken.state.trainables} == {"model": 0, "discriminator": 0} | {blamed: 1}
    assert "update skipped (1 of" in caplog.text and blamed in caplog.text
    for name, value in zip((broken, broken.gan), healthy, strict=True):
        vars(name).clear()
        vars(name).update(value)
    clean.state.step += 1
    assert broken.train_step(batch) | {"skipped": 0, "discriminator/skipped": 0} == clean.train_step(batch)
    assert everything(broken) == everything(clean)


@pytest.mark.parametrize("fault", FAULTS)
def test_without_leave_to_skip_a_fault_stops_the_run(fault: str, tmp_path: Path) -> None:
    inject, _, words = FAULTS[fault]
    training = gan_training(tmp_path)
    before = everything(training)
    inject(training)
    with pytest.raises(UserError, match=f"step 0: ({words}); the run stopped before this update"):
        training.train_step(next(training.batches(0)))
    assert everything(training) == before


def test_an_fp16_overflow_lowers_its_scale_alone(tmp_path: Path) -> None:
    """The tokenizer's gradients overflow until its scale fits; neither network moves meanwhile, and none is blamed."""
    training = gan_training(tmp_path, "run.precision=fp16")
    state, batch = training.state, next(training.batches(0))
    state.main.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    state.train_mode(True)
    before, scales, moved = everything(training), [], False
    while not moved:
        values = training.train_step(batch)
        scales.append([t.scaler.get_scale() for t in state.trainables])
        moved = everything(training) != before
        assert len(scales) < 40
    assert len(scales) > 1 and values["overflows"] == len(scales) - 1 and math.isfinite(values["grad_norm"])
    halved = [main for main, _ in scales[:-1]]
    assert halved == [2.0 ** (39 - n) for n in range(len(halved))]
    assert len({scale for _, scale in scales}) == 1  # the discriminator's did not overflow
    assert [t.skipped for t in state.trainables] == [0, 0]


def test_faults_of_the_discriminator_alone_are_counted_over_its_own_updates(tmp_path: Path) -> None:
    """It learns at every second step; each of its updates fails, with good steps of the tokenizer between."""
    training = gan_training(tmp_path, "discriminator.every=2", "run.max_skipped=2")
    inf_logit(training)
    with pytest.raises(UserError, match=r"3 of the last 100 updates of the discriminator were skipped \(run\.max_sk"):
        training.fit()
    saved = CheckpointStore(tmp_path / "checkpoints").load_latest()
    assert saved is not None and saved.step == 5 and saved.state["discriminator"]["skipped_at"] == [0, 2, 4]
    assert all(tensor.isfinite().all() for tensor in saved.groups["discriminator"].values())
    with pytest.raises(UserError, match="4 of the last 100"):  # a resumed run remembers them
        inf_logit(again := gan_training(tmp_path, "discriminator.every=2", "run.max_skipped=2"))
        again.fit()


def test_skips_are_forgotten_after_a_hundred_updates() -> None:
    run, model = run_config(max_skipped=1, steps=10**6), nn.Linear(3, 1)
    state = TrainState.start(model, run, OPTIM)
    batch = next(numbers(0))
    for step in (0, 100, 200):
        state.step = step
        train_step(run, state, batch, nan_at(model, {step}))
    state.step = 250
    with pytest.raises(UserError, match="2 of the last 100 updates"):
        train_step(run, state, batch, nan_at(model, {250}))
    assert state.main.skipped_at == [200, 250] and state.main.skipped == 4


# --- the small step: parts, weights, skips --------------------------------------------------------------------------


class Ragged(tuple):
    """A batch of tokens that is cut into parts of unequal numbers of them."""

    def split(self, num_parts: int) -> list[Tensor]:
        (token_LC,) = self
        return list(token_LC.tensor_split([1 if num_parts == 2 else 3, 5][: num_parts - 1]))


@pytest.mark.parametrize("num_parts", [2, 3])
def test_parts_of_unequal_counts_add_up_to_the_whole(num_parts: int) -> None:
    def update(accumulate: int) -> tuple[dict[str, float], Tensor]:
        torch.manual_seed(0)
        run, model = run_config(accumulate=accumulate), nn.Linear(3, 1)
        state = TrainState.start(model, run, OPTIM)

        def loss(token_LC: Tensor | Ragged, step: int) -> tuple[Summed, dict[str, Tensor]]:
            tokens = token_LC[0] if isinstance(token_LC, Ragged) else token_LC
            error_L = model(tokens).square().squeeze(1)
            counts = torch.tensor([len(tokens), 0])
            return Summed(error_L.sum(), len(tokens)), {"error": error_L.mean().detach(), "counts": counts}

        for step in range(3):
            values = train_step(run, state, Ragged([next(numbers(step))]), loss)
        return values, model.weight.detach()

    whole, weight = update(1)
    parts, other = update(num_parts)
    torch.testing.assert_close(other, weight, rtol=0, atol=1e-6)
    assert parts.pop("counts") == whole.pop("counts") == [8, 0]
    assert parts == pytest.approx(whole, abs=1e-6)


def test_batches_that_cannot_be_split_are_refused() -> None:
    run = run_config(accumulate=2)
    with pytest.raises(UserError, match=r"run\.accumulate=2: the batches of this stage cannot be split"):
        train_step(run, TrainState.start(nn.Linear(3, 1), run, OPTIM), [1, 2], lambda batch, step: (1, {}))  # type: ignore


def test_batch_norm_of_a_skipped_step_is_restored() -> None:
    run, model = run_config(max_skipped=1), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = TrainState.start(model, run, OPTIM)
    before = bits(model)
    train_step(run, state, next(numbers(0)) * math.inf, lambda x, step: (model(x).square().mean(), {}))
    assert bits(model) == before and isinstance(state.main, Trainable)


def nan_at(model: nn.Module, steps: set[int]):
    def loss(batch: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        return model(batch).square().mean() * (math.nan if step in steps else 1.0), {}

    return loss


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    run, model = run_config(tmp_path, max_skipped=3), nn.Linear(3, 1)
    toy_fit(run, model, nan_at(model, {1, 4, 5}))
    lines = logged(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 2, 3, 3, 3, 3]
    assert [line["loss"] is None for line in lines] == [step in (1, 4, 5) for step in range(9)]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_too_many_skips_stop_with_a_good_checkpoint(tmp_path: Path) -> None:
    run, model = run_config(tmp_path, max_skipped=2), nn.Linear(3, 1)
    with pytest.raises(UserError, match=r"step 6: loss is nan; 3 of the last 100 updates of the model .*max_skipped=2"):
        toy_fit(run, model, nan_at(model, {1, 4, 6}))
    saved = CheckpointStore(tmp_path / "checkpoints").load_latest()
    assert saved is not None and saved.step == 7 and saved.state["model"]["skipped_at"] == [1, 4, 6]
    assert torch.equal(saved.groups["model"]["weight"], model.weight)
    assert model.weight.isfinite().all()
