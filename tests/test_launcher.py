"""Who a process is, as its launcher says, and which GPU it takes for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tokenizer.common.device import float32_mode, pick_device
from tokenizer.common.distributed import _check_gpus, adopt_slurm, first_node
from tokenizer.common.errors import UserError
from tokenizer.training import train_state
from tokenizer.training.optim import OptimConfig
from tokenizer.training.train_state import RunConfig


def test_slurm_is_read_where_srun_started_several_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM itself expands its list of hosts; without it, MASTER_ADDR has to be given."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "gpu[03-04,9],login1" ] && printf "gpu03\\ngpu04\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41007"}
    step |= {"SLURM_STEP_NODELIST": "gpu[03-04,9],login1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    adopt_slurm(step)
    found = [
        step[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ]
    assert found == ["9", "16", "1", "8", "gpu03", "21007"]
    scontrol.unlink()
    with pytest.raises(UserError, match="set MASTER_ADDR to the machine of rank 0"):
        first_node("a1,b2")
    given = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "a[1-2]"}
    adopt_slurm(given | {"MASTER_ADDR": "a1"})
    alone = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}  # the batch script itself
    adopt_slurm(alone)
    assert "RANK" not in alone


@pytest.mark.parametrize(
    ("environment", "visible", "wanted"),
    [
        ({}, 4, 0),
        ({"LOCAL_RANK": "3"}, 4, 3),
        ({"LOCAL_RANK": "5"}, 4, 1),  # six workers on four GPUs
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}, 4, 2),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "2"}, 1, 0),  # srun --gpus-per-task=1
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "2"}, 4, 0),
    ],
)
def test_each_process_takes_a_gpu(
    environment: dict[str, str], visible: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", wanted) and set(current) == {wanted}
    assert pick_device(f"cuda:{visible - 1}") == torch.device("cuda", visible - 1)
    for name, words in ((f"cuda:{visible}", f"torch sees {visible} GPUs"), ("cuda:", "must be auto"), ("tpu", "auto")):
        with pytest.raises(UserError, match=words):
            pick_device(name)


def test_training_wants_a_gpu_for_each_process() -> None:
    for here, visible, more in (("8", 8, {}), ("2", 8, {}), ("8", 1, {"SLURM_LOCALID": "5"})):
        _check_gpus({"LOCAL_WORLD_SIZE": here, **more}, visible)
    for visible, more in ((4, {}), (1, {}), (4, {"SLURM_LOCALID": "5"})):
        with pytest.raises(UserError, match=f"8 processes on this machine, but torch sees {visible} GPUs"):
            _check_gpus({"LOCAL_WORLD_SIZE": "8", **more}, visible)


def test_ddp_names_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One visible GPU a task: the model is on cuda:0 whatever the local rank, and so is DDP."""
    made = {}
    monkeypatch.setattr(train_state.distributed, "num_ranks", lambda: 8)
    monkeypatch.setattr(train_state, "DistributedDataParallel", lambda module, **settings: made.update(settings))
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    run, optim = RunConfig(), OptimConfig()
    train_state.Trainable("model", nn.Linear(1, 1), optim, run, torch.device("cuda", 0))
    assert made == {"device_ids": [0], "broadcast_buffers": False}
    train_state.Trainable("model", nn.Linear(1, 1), optim, run, torch.device("cpu"))
    assert made["device_ids"] is None


def test_every_entry_computes_float32_as_float32_and_lets_threads_wait_passively(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    pick_device("cpu")
    assert float32_mode() == "matmul ieee, conv ieee"
    program = "import os, sys, {0}; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    for name in ("tokenizer", "autoregressive", "evaluations"):
        for given, wanted in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
            variables = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
            variables |= {"OMP_WAIT_POLICY": given} if given else {}
            command = [sys.executable, "-c", program.format(name)]
            said = subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout
            assert said.strip() == wanted
