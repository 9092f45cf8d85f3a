"""Schedules at known points, parameter groups, the optimiser's state as named tensors, and the averaged weights."""

import pytest
import torch
from torch import nn

from tokenizer.common.errors import UserError
from tokenizer.training.optim import (
    Ema,
    OptimConfig,
    build_optimizer,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    param_groups,
    set_rate,
)


def toy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def test_cosine_known_values() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=10)
    rates = [learning_rate(s, 110, config) for s in (0, 4, 9, 10, 60, 110, 500)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2])


def test_wsd_known_values() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2)
    rates = [learning_rate(s, 100, config) for s in (0, 9, 10, 79, 80, 85, 100)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, 100, OptimConfig(lr=0.3, warmup_steps=0)) == 0.3


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": "step"}, {"min_lr": 1.0}, {"betas": [0.9]}, {"decay_fraction": 0.0}, {"clip_norm": 0.0}],
)
def test_impossible_settings_name_themselves(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimConfig(**wrong)


def test_only_matrices_decay() -> None:
    model = toy()
    model[0].weight.requires_grad_(False)
    decayed, plain = param_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert [p.ndim for p in decayed["params"]] == [2]
    assert all(p.ndim == 1 for p in plain["params"]) and len(plain["params"]) == 4


def test_gentle_weights_learn_at_a_tenth_of_the_rate() -> None:
    model = toy()
    model.gentle = ("0.weight",)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_rate(optimizer, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - parameter).max().item() for name, parameter in model.named_parameters()}
    assert moved.pop("0.weight") == pytest.approx(1e-4, rel=0.01)
    assert all(distance == pytest.approx(1e-3, rel=0.01) for distance in moved.values())


def test_state_goes_round_to_the_bit() -> None:
    one, other = toy(), toy()
    first, second = (build_optimizer(model, OptimConfig()) for model in (one, other))
    step(one, first)
    step(one, first)
    other.load_state_dict(one.state_dict())
    load_optimizer_tensors(second, other, {k: v.clone() for k, v in optimizer_tensors(first, one).items()})
    step(one, first)
    step(other, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert optimizer_tensors(second, other)["0.weight/step"] == 3


def test_foreign_state_is_refused() -> None:
    model = toy()
    optimizer = build_optimizer(model, OptimConfig())
    with pytest.raises(UserError, match=r"9\.weight/exp_avg"):
        load_optimizer_tensors(optimizer, model, {"9.weight/exp_avg": torch.zeros(1)})
    with pytest.raises(UserError, match=r"0\.bias/exp_avg is \(7,\), the model has \(4,\)"):
        load_optimizer_tensors(optimizer, model, {"0.bias/exp_avg": torch.zeros(7)})


def test_ema_follows_its_formula() -> None:
    model = toy()
    ema = Ema(model, decay=0.5)
    mean = model[0].weight.detach().clone()
    for number, decay in enumerate([1 / 10, 2 / 11, 3 / 12]):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        ema.update(model, number)
        mean = decay * mean + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(ema.tensors()["0.weight"], mean)
    assert ema.tensors().keys() == model.state_dict().keys()


def test_ema_applied_gives_the_weights_back() -> None:
    model = toy()
    ema = Ema(model, decay=0.9)
    averaged = ema.tensors()["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    own = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError), ema.applied(model):
        assert torch.equal(model[0].weight, averaged)
        raise RuntimeError
    assert torch.equal(model[0].weight, own)
