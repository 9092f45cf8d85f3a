"""Who a process is, as its launcher says, and which GPU it takes for that."""

from __future__ import annotations

import pytest
import torch

from tokenizer.common.device import pick_device
from tokenizer.common.distributed import _check_gpus, adopt_slurm, first_node
from tokenizer.common.errors import UserError


def test_slurm_is_read_where_srun_started_several_tasks() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41007"}
    step |= {"SLURM_STEP_NODELIST": "gpu[03-04,9],login1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    adopt_slurm(step)
    found = [
        step[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ]
    assert found == ["9", "16", "1", "8", "gpu03", "21007"]
    assert first_node("a1,b2") == "a1" and first_node("n[007]-ib") == "n007-ib"
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
