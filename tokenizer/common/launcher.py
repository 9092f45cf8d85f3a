"""What the launcher of a process has written into its environment: torchrun, srun, or run_workers of the scripts."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from tokenizer.common.errors import UserError


def several_processes() -> bool:
    """Whether a launcher, or WORKERS of the scripts, has started others like this one."""
    return any(os.environ.get(name, "1") != "1" for name in ("WORKERS", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def local_rank() -> int:
    """Which process of this machine this is, in the words of torchrun, of run_workers (scripts) or of srun; else 0."""
    under_srun = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return int(os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID", "0") if under_srun else "0"))


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Under plain `srun`, say in the words of torchrun who this is; elsewhere, and for one task, do nothing."""
    if "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise UserError("SLURM_STEP_NUM_TASKS is set but SLURM_STEP_NODELIST is not: start with srun or torchrun")
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].split(",")[0]
    environment.setdefault("MASTER_ADDR", first_node(nodes))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))


def first_node(nodes: str) -> str:
    """The first host of SLURM's short list: `gpu[03-06,9],login1` -> gpu03."""
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r}: no host name at its start; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())
