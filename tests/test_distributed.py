"""Several processes train what one would: shares of the batch, unequal token counts, two networks, a NaN on one."""

import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tokenizer.common import distributed
from tokenizer.common.checkpoint import CheckpointStore, read_model
from tokenizer.common.config import load_config
from tokenizer.common.device import generator_for
from tokenizer.common.distributed import balance_load
from tokenizer.common.errors import UserError
from tokenizer.data.clips import DataConfig, build_dataset
from tokenizer.data.loader import batches
from tokenizer.train import TokenizerTrainConfig, TokenizerTraining
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig, TrainState
from tokenizer.training.train_step import Summed, train_step
from tokenizer.training.trainer import fit

DEBUG = Path(__file__).parents[1] / "configs" / "debug"
LENGTHS = (5, 1, 2, 8)  # tokens of the four clips of a step: 6 on one rank, 10 on the other


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(target: Callable[[], object], number: int = 2) -> None:
    """Run `target` in so many processes that meet by the variables that torchrun would set."""
    port = free_port()

    def start(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # what the parent of this fork may have begun
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        target()

    children = [multiprocessing.get_context("fork").Process(target=start, args=(rank,)) for rank in range(number)]
    for child in children:
        child.start()
    for child in children:
        child.join(600)
    assert [child.exitcode for child in children] == [0] * number


def train(folder: Path, nan_at: tuple[int, int] | None = None, **changes) -> nn.Module:
    """A toy run on clips of unequal numbers of tokens; `nan_at` = (step, rank) breaks a loss there."""
    run = RunConfig(dir=str(folder), steps=6, log_every=1, checkpoint_every=2, batch_size=4, device="cpu", **changes)
    optim = OptimConfig(lr=0.05, warmup_steps=2, clip_norm=0.5)
    distributed.join(on_cpu=True)
    torch.manual_seed(3 + distributed.rank())  # the ranks begin apart: rank 0's weights must be everybody's
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    state = TrainState.start(model, run, optim, "toy", head=nn.Linear(3, 2))

    def own_batches(start: int) -> Iterator[list[Tensor]]:
        for step in range(start, run.steps):
            clips = [torch.randn(n, 3, generator=generator_for(1, step, place)) for place, n in enumerate(LENGTHS)]
            yield [clips[place] for place in balance_load(4, distributed.num_ranks())[distributed.rank()]]

    def loss_fn(batch: list[Tensor], step: int) -> tuple[Summed, dict[str, Tensor]]:
        assert state.head is not None
        token_LC = torch.cat(batch)
        out_LC = state.model(token_LC)
        error_L = (out_LC - token_LC.flip(1)).square().mean(1) + state.head(out_LC).square().mean(1)
        total = error_L.sum() * (math.nan if nan_at == (step, distributed.rank()) else 1)
        return Summed(total, len(error_L)), {"error": error_L.mean().detach(), "lengths": torch.tensor([len(error_L)])}

    step_fn = partial(train_step, run, state, loss_fn=loss_fn)
    fit(run, {"run": {"dir": str(folder)}}, state, own_batches, step_fn, lambda step: {"out": 1.0})
    return model


def logged(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "data_wait")
    return [{k: v for k, v in x.items() if k not in clock and not k.startswith("perf/")} for x in lines]


def assert_close(one: Path, two: Path, atol: float) -> None:
    """Weights, averaged weights and every logged number."""
    for name in ("model.safetensors", "model.raw.safetensors"):
        left, right = (read_model(folder / "final" / name).tensors for folder in (one, two))
        for key, tensor in left.items():
            torch.testing.assert_close(
                right[key], tensor, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
            )
    for left, right in zip(logged(one), logged(two), strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert right[key] == (value if isinstance(value, list) else pytest.approx(value, rel=1e-5, abs=1e-6)), key


def test_two_processes_are_one_also_with_unequal_counts(tmp_path: Path) -> None:
    train(tmp_path / "one")
    on_ranks(lambda: train(tmp_path / "two"))
    assert_close(tmp_path / "one", tmp_path / "two", atol=1e-6)
    one, two = (CheckpointStore(tmp_path / name / "checkpoints").load_latest() for name in ("one", "two"))
    assert one is not None and two is not None
    for key, tensor in one.groups["head"].items():
        torch.testing.assert_close(two.groups["head"][key], tensor, rtol=0, atol=1e-6)


def test_a_nan_on_one_process_skips_the_step_on_all(tmp_path: Path) -> None:
    on_ranks(lambda: train(tmp_path, nan_at=(2, 1), max_skipped=1))
    lines = logged(tmp_path)
    assert [line.get("loss", 0) is None for line in lines if "skipped" in line] == [False, False, True] + [False] * 3
    assert [line["skipped"] for line in lines if "skipped" in line] == [0, 0, 1, 1, 1, 1]
    assert all(tensor.isfinite().all() for tensor in read_model(tmp_path).tensors.values())


def test_two_processes_train_the_tokenizer_that_one_does(tmp_path: Path) -> None:
    def run(name: str) -> None:
        overrides = ["run.batch_size=4", "run.steps=2", "run.device=cpu", "loss.entropy=0.1", "optim.lr=1e-4"]
        config = load_config(TokenizerTrainConfig, DEBUG / "proxy.yaml", [*overrides, f"run.dir={tmp_path / name}"])
        TokenizerTraining(config).fit()

    run("one")
    on_ranks(lambda: run("two"))
    first, other = (
        {line["step"]: line for line in logged(tmp_path / name) if "loss" in line} for name in ("one", "two")
    )
    for step in (1, 2):
        for name in ("loss", "l1", "perceptual", "codebook", "commitment", "entropy", "tokens_per_clip", "grad_norm"):
            assert other[step][name] == pytest.approx(first[step][name], rel=2e-5), name


@given(st.lists(st.integers(1, 2048), min_size=1, max_size=12), st.integers(1, 4))
def test_shares_are_equal_in_number_and_balanced(costs: list[int], num_parts: int) -> None:
    costs = costs * num_parts
    parts = balance_load(len(costs), num_parts, costs)
    assert sorted(place for part in parts for place in part) == list(range(len(costs)))
    assert {len(part) for part in parts} == {len(costs) // num_parts}
    sums = [sum(costs[place] for place in part) for part in parts]
    assert max(sums) - min(sums) <= max(costs)  # the last one given away makes at most its own difference


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match=r"run\.batch_size=10 is the global batch: .* = 4; the nearest is 8"):
        balance_load(10, 4)


def test_the_order_of_clips_depends_on_neither_workers_nor_ranks(tmp_path: Path) -> None:
    data = DataConfig(sources=["synthetic:train:7"], num_frames=4, size=16, augment=False)

    def names(num_workers: int = 0, start: int = 0, accumulate: int = 1) -> list[list[str]]:
        source = batches(build_dataset(data), 4, 5, start, num_workers, steps=4 - start, accumulate=accumulate)
        return [[name for part in batch.split(accumulate) for name in part.names] for batch in source]

    whole = names()
    assert names(num_workers=2) == names(accumulate=2) == whole and names(start=2) == whole[2:]

    def shared() -> None:
        distributed.join(on_cpu=True)
        (tmp_path / f"{distributed.rank()}.json").write_text(json.dumps(names()))

    on_ranks(shared)
    halves = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [left + right for left, right in zip(*halves, strict=True)] == whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The debug proxy, trained undisturbed by two processes."""
    folder = tmp_path_factory.mktemp("ranks") / "whole"
    on_ranks(lambda: train_tokenizer("proxy.yaml", folder))
    return folder


def train_tokenizer(config: str, folder: Path, *overrides: str) -> TokenizerTraining:
    settings = [f"run.dir={folder}", "run.device=cpu", *overrides]
    training = TokenizerTraining(load_config(TokenizerTrainConfig, DEBUG / config, settings))
    training.fit()
    return training


def assert_same_bits(one: Path, other: Path) -> None:
    assert logged(one) == logged(other)
    left, right = (read_model(folder).tensors for folder in (one, other))
    assert all(torch.equal(left[name], tensor) for name, tensor in right.items())


def checkpoint_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of the newest checkpoint, by group."""
    newest = CheckpointStore(folder / "checkpoints").load_latest()
    assert newest is not None
    return {name: dict(group) for name, group in newest.groups.items()}


def test_two_processes_make_the_gan_steps_that_one_does(tmp_path: Path) -> None:
    """Patch discriminator with LeCam and noisy labels, alignment, unequal token counts: weights, averages and the
    optimisers' moments of both networks."""
    pytest.importorskip("transformers")

    def run(name: str) -> None:
        # a small rate, because Adam makes a whole step of a gradient that is nothing but rounding
        settings = ["optim.lr=3e-6", "run.batch_size=4", "run.steps=3", "run.validate_every=9"]
        train_tokenizer("full/proxy.yaml", tmp_path / name, *settings, "optim.min_lr=1e-6")

    run("one")
    on_ranks(lambda: run("two"))
    one, two = (checkpoint_of(tmp_path / name) for name in ("one", "two"))
    assert {"model", "head", "discriminator", "optimizer", "discriminator_optimizer"} <= one.keys() == two.keys()
    for group, tensors in one.items():
        flat, other = (torch.cat([p[key].flatten().double() for key in tensors]) for p in (tensors, two[group]))
        gap = flat - other
        assert float(gap.abs().max()) <= 1e-6 and float(gap.norm() / flat.norm()) <= 1e-6, group
    first, other = (
        {line["step"]: line for line in logged(tmp_path / name) if "loss" in line} for name in ("one", "two")
    )
    for step, line in first.items():
        for name, value in line.items():
            close = value if isinstance(value, list) else pytest.approx(value, rel=2e-5, abs=1e-6)
            assert other[step][name] == close, name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_processes_in_half_precision(tmp_path: Path, precision: str) -> None:
    """The whole GAN training: finite, close to fp32 in one process, and with equal weights on both."""
    pytest.importorskip("transformers")
    settings = ["run.batch_size=4", "run.steps=3", "run.validate_every=9"]

    def run() -> None:
        training = train_tokenizer("full/proxy.yaml", tmp_path / "two", *settings, f"run.precision={precision}")
        weights = [*training.model.parameters(), *training.gan.module.parameters()]
        torch.save([weight.detach() for weight in weights], tmp_path / f"{distributed.rank()}.pt")

    on_ranks(run)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(left, right) and left.isfinite().all() for left, right in zip(*both, strict=True))
    train_tokenizer("full/proxy.yaml", tmp_path / "one", *settings)
    steps = 1 if precision == "fp16" else 3  # its scaler begins too high and leaves out the first update
    for left, right in list(zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True))[:steps]:
        for name in left.keys() & {"loss", "l1", "perceptual", "align", "gan", "discriminator/loss"}:
            # rounding flips codes, so later steps drift apart
            assert right[name] == pytest.approx(left[name], rel=0.06, abs=0.01), name


def test_accelerate_launch_starts_the_same_run(tmp_path: Path, whole: Path) -> None:
    """Its --multi_gpu starts the processes, which meet over gloo where there is no GPU; its --cpu starts only one."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", str(free_port()), "-m", "tokenizer.train", "configs/debug/proxy.yaml"]
    done = subprocess.run(
        [*launch, f"run.dir={tmp_path / 'run'}", "run.device=cpu"],
        cwd=DEBUG.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert_same_bits(tmp_path / "run", whole)


def test_a_killed_rank_is_started_again_and_changes_nothing(tmp_path: Path, whole: Path) -> None:
    """As a user does it: two gloo processes on a machine without GPU, one of them killed from outside."""
    command = ["bash", "scripts/train/1_proxy_tokenizer.sh", "configs/debug/proxy.yaml", f"run.dir={tmp_path / 'torn'}"]
    variables = {"GPUS": "2", "MAX_RESTARTS": "1", "PYPATH": sys.executable, "OMP_NUM_THREADS": "1"}
    log, metrics = tmp_path / "log.txt", tmp_path / "torn" / "metrics.jsonl"
    with (
        open(log, "w") as said,
        subprocess.Popen(
            [*command, "run.device=cpu"], cwd=DEBUG.parents[1], env=os.environ | variables, stdout=said, stderr=said
        ) as torchrun,
    ):
        while torchrun.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.02)
        workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert torchrun.wait(600) == 0, log.read_text()
    assert len(workers) == 2 and f"resuming {tmp_path / 'torn'}" in log.read_text()
    assert_same_bits(tmp_path / "torn", whole)
