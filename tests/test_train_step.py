"""One update: two players that leave each other alone, losses divided by the global count, steps that are skipped."""

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tokenizer.common.checkpoint import CheckpointStore, read_model
from tokenizer.common.device import generator_for
from tokenizer.common.errors import UserError
from tokenizer.training.optim import OptimConfig
from tokenizer.training.trainer import RunConfig, Summed, TrainState, fit, train_step

OPTIM = OptimConfig(lr=0.05, warmup_steps=0)


def run_config(folder: Path | str = "", **changes) -> RunConfig:
    return RunConfig(dir=str(folder), **{"steps": 9, "log_every": 1, "checkpoint_every": 2, "device": "cpu", **changes})


def numbers(start: int) -> Iterator[Tensor]:
    for step in range(start, 10**6):
        yield torch.randn(8, 3, generator=generator_for(0, "data", step))


@dataclass
class Judge:
    """A linear discriminator that learns at every second step; it sees the learner's output of the same step."""

    generator: nn.Module
    module: nn.Module
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=0.02, betas=[0.5, 0.9], warmup_steps=0))
    period: int = 2

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        if step % 2:
            return None
        real, fake = self.module(batch), self.module(self.generator(batch))  # not detached on purpose
        return fake.sigmoid().mean() - real.sigmoid().mean(), {"judge_gap": (real - fake).mean().detach()}


class Game:
    """A learner with a companion against a judge."""

    def __init__(self, run: RunConfig) -> None:
        torch.manual_seed(1)
        self.model, self.companion = nn.Linear(3, 3), nn.Linear(3, 2)
        self.judge = Judge(self.model, nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1)))
        self.run = run
        self.state = TrainState.start(self.model, run, OPTIM, "toy", adversary=self.judge, companion=self.companion)

    def loss(self, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        out = self.model(batch)
        return (out - batch.flip(1)).square().mean() + self.companion(out).square().mean() - self.judge.module(
            out
        ).mean(), {}

    def fit(self, die_at: int | None = None) -> None:
        def loss(batch: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
            if step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.loss(batch, step)

        fit(self.run, OPTIM, {"run": {"dir": self.run.dir}}, self.state, numbers, loss)


def bits(module: nn.Module) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values())


def test_neither_player_touches_the_other() -> None:
    game = Game(run_config())
    seen = []

    def spy(batch: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        seen.append(("learner", bits(game.model), bits(game.judge.module)))
        return game.loss(batch, step)

    judged = game.judge.loss
    game.judge.loss = lambda batch, step: (  # type: ignore[method-assign]
        seen.append(("judge", bits(game.model), bits(game.judge.module))) or judged(batch, step)
    )
    source = numbers(0)
    values = [train_step(game.run, OPTIM, game.state, next(source), spy) for _ in range(3)]
    assert [name for name, *_ in seen] == ["learner", "judge"] * 3
    assert [model for _, model, _ in seen[::2]] == [model for _, model, _ in seen[1::2]]  # both update at the end
    models, judges = ([row[place] for row in seen[::2]] for place in (1, 2))
    assert len(set(models)) == 3 and judges[0] != judges[1] == judges[2]  # the judge rested at step 1
    train_step(game.run, OPTIM, game.state, next(source), game.loss)
    judge = [parameter.grad for parameter in game.judge.module.parameters()]
    assert judge == [None] * 4  # at step 3 it rests, and the learner's loss, which asks it, leaves nothing behind in it
    assert ["judge_gap" in v and "adversary/total" in v for v in values] == [True, False, True]
    assert all(
        parameter.requires_grad for module in (game.model, game.judge.module) for parameter in module.parameters()
    )


def test_a_killed_game_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = Game(run_config(tmp_path / "whole"))
    whole.fit()
    context = multiprocessing.get_context("fork")
    for moment in (1, 4, 7):
        child = context.Process(target=lambda at=moment: Game(run_config(tmp_path / "torn")).fit(die_at=at))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    torn = Game(run_config(tmp_path / "torn"))
    torn.fit()
    for name in ("model", "companion"):
        assert bits(getattr(torn, name)) == bits(getattr(whole, name))
    assert bits(torn.judge.module) == bits(whole.judge.module)
    assert set(read_model(tmp_path / "torn").tensors) == {"weight", "bias"}  # of the model alone
    saved = CheckpointStore(tmp_path / "torn" / "checkpoints").load_latest()
    assert saved is not None
    assert {"companion", "adversary", "adversary_optimizer"} < saved.groups.keys()
    with pytest.raises(UserError, match="00000009: holds no companion; use the config it came with"):
        bare = Game(run_config(tmp_path / "torn")).state
        CheckpointStore(tmp_path / "torn" / "checkpoints").save(9, {"model": {}, "ema": {}, "optimizer": {}}, {}, {})
        bare.load(CheckpointStore(tmp_path / "torn" / "checkpoints"))


def test_every_line_holds_the_last_turn_of_a_player_that_rests(tmp_path: Path) -> None:
    """The judge plays the steps 1, 3, .. 9; lines are written after 4, 8 and 9, also by a run that resumed at 3."""

    def game(name: str) -> Game:
        return Game(run_config(tmp_path / name, log_every=4, checkpoint_every=3))

    def lines(name: str) -> list[dict]:
        found = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        wanted = ("step", "loss", "judge_gap", "adversary/total", "adversary/lr", "adversary/grad_norm")
        return [{key: line[key] for key in wanted} for line in found]

    game("whole").fit()
    assert [line["step"] for line in lines("whole")] == [4, 8, 9]
    stopped, loss = game("torn"), Game.loss

    def stops(batch: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        if step == 3:
            raise UserError("stopped here")
        return loss(stopped, batch, step)

    stopped.loss = stops  # type: ignore[method-assign]
    with pytest.raises(UserError, match="stopped here"):
        stopped.fit()
    game("torn").fit()
    assert lines("torn") == lines("whole")


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
            values = train_step(run, OPTIM, state, Ragged([next(numbers(step))]), loss)
        return values, model.weight.detach()

    whole, weight = update(1)
    parts, other = update(num_parts)
    torch.testing.assert_close(other, weight, rtol=0, atol=1e-6)
    assert parts.pop("counts") == whole.pop("counts") == [8, 0]
    assert parts == pytest.approx(whole, abs=1e-6)


def test_batches_that_cannot_be_split_are_refused() -> None:
    run = run_config(accumulate=2)
    with pytest.raises(UserError, match=r"run\.accumulate=2: the batches of this stage cannot be split"):
        train_step(run, OPTIM, TrainState.start(nn.Linear(3, 1), run, OPTIM), [1, 2], lambda batch, step: (1, {}))  # type: ignore


def nan_at(model: nn.Module, steps: set[int]):
    def loss(batch: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        return model(batch).square().mean() * (math.nan if step in steps else 1.0), {}

    return loss


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    run, model = run_config(tmp_path, max_skipped=2), nn.Linear(3, 1)
    fit(run, OPTIM, {}, TrainState.start(model, run, OPTIM), numbers, nan_at(model, {1, 4, 5}))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1, 2, 3, 3, 3, 3]
    assert [line["loss"] is None for line in lines] == [step in (1, 4, 5) for step in range(9)]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_too_many_in_a_row_stop_with_a_good_checkpoint(tmp_path: Path) -> None:
    run, model = run_config(tmp_path, max_skipped=2), nn.Linear(3, 1)
    with pytest.raises(UserError, match=r"step 6: loss is nan; 3 steps in a row without an update .*max_skipped=2"):
        fit(run, OPTIM, {}, TrainState.start(model, run, OPTIM), numbers, nan_at(model, {4, 5, 6}))
    saved = CheckpointStore(tmp_path / "checkpoints").load_latest()
    assert saved is not None and saved.step == 7 and saved.state["skipped_in_a_row"] == 3
    assert torch.equal(saved.groups["model"]["weight"], model.weight)
    assert model.weight.isfinite().all()
