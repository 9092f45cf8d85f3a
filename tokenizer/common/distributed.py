"""Ranks, collectives and load balancing for the processes of one run.

`join` finds the other processes, started by `torchrun`, `accelerate launch`, MPI or plain `srun`. With one process
every collective is the identity, so code that calls it needs no second path.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed

from tokenizer.common.errors import UserError


def several_processes() -> bool:
    """Whether a launcher, or WORKERS of the scripts, started other processes of this job."""
    return any(os.environ.get(name, "1") != "1" for name in ("WORKERS", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def local_rank() -> int:
    """Number of this process on its machine, from torchrun, run_workers (scripts) or srun; else 0."""
    under_srun = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return int(os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID", "0") if under_srun else "0"))


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Under plain `srun`, set torchrun's variables from SLURM's; else, and for one task, do nothing."""
    if "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if not nodes:
        raise UserError("SLURM_STEP_NUM_TASKS is set but SLURM_STEP_NODELIST is not: start with srun or torchrun")
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].split(",")[0]
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = first_node(nodes)
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))


def first_node(nodes: str) -> str:
    """The first host of SLURM's short list, as `scontrol show hostnames` expands it: `gpu[03-06,9],login1` -> gpu03."""
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return hosts[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"`scontrol show hostnames {nodes}` gives no host ({type(error).__name__}): set MASTER_ADDR to the machine "
            "of rank 0"
        ) from error


T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # the others wait while rank 0 reads and writes checkpoints


def join(on_cpu: bool) -> PartialState:
    """Join the process group, gloo on CPU and NCCL on GPUs; a second call does nothing."""
    adopt_slurm(os.environ)
    if _several():
        return PartialState()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not on_cpu:
        _check_gpus(os.environ, torch.cuda.device_count())
    options = InitProcessGroupKwargs(timeout=_PATIENCE).to_kwargs() if several else {}
    return PartialState(cpu=on_cpu, **options)


def _check_gpus(environment: Mapping[str, str], visible: int) -> None:
    """UserError for more processes than GPUs on this machine, unless SLURM gives each task its own GPU."""
    here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if here > visible and not (visible == 1 and "SLURM_LOCALID" in environment):
        raise UserError(f"{here} processes on this machine, but torch sees {visible} GPUs: start one for each, GPUS=n")


def rank() -> int:
    """This process's number, 0 in a run of one."""
    return distributed.get_rank() if _several() else 0


def num_ranks() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _several() else 1


def is_main() -> bool:
    """Whether this process writes files and logs."""
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's `tensor`, on the device it came from, without gradients; shapes must agree."""
    if not _several():
        return tensor.detach()
    total = tensor.detach().clone().to(PartialState().device)
    distributed.all_reduce(total)
    return total.to(tensor.device)


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of every rank's `tensor`, without gradients."""
    return sum_over_ranks(tensor) / num_ranks()


def mean_of_rows(x: Tensor) -> Tensor:
    """The mean over the rows (dimension 0) of all processes, which may hold unequal numbers of them, with gradients."""
    return mean_of_sums(x.sum(dim=0), len(x)) if _several() else x.mean(dim=0)


def mean_of_sums(own: Tensor, rows: int) -> Tensor:
    """The same from the sum over this process's `rows`.

    Once gradients are averaged over the processes, this one's are exactly those of the global mean.
    """
    if not _several():
        return own / rows
    packed = sum_over_ranks(torch.cat([own.flatten(), own.new_full((1,), rows)]))
    total, rows_of_all = packed[:-1].view_as(own), packed[-1]
    own = own * (num_ranks() / rows_of_all)
    return own + (total / rows_of_all - own).detach()


def from_main(value: T) -> T:
    """Rank 0's `value`, everywhere. Plain data only: it is pickled between the processes of one run."""
    if not _several():
        return value
    box = [value]
    distributed.broadcast_object_list(box, device=PartialState().device)
    return box[0]


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Make these tensors equal to those of rank 0, in place."""
    if _several():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def rows_of_all(x: Tensor) -> Tensor:
    """The rows of all ranks' `x`, rank after rank, without gradients; ranks may hold unequal numbers of rows."""
    if not _several():
        return x.detach()
    device, own = PartialState().device, torch.zeros(num_ranks(), dtype=torch.long)
    own[rank()] = len(x)
    counts = sum_over_ranks(own).tolist()
    padded = torch.zeros(max(counts), *x.shape[1:], dtype=x.dtype, device=device)
    padded[: len(x)] = x.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(x.device)


def own_part(num: int) -> range:
    """This rank's part of 0 .. num - 1: consecutive, together with the other ranks' all of it."""
    return range(num * rank() // num_ranks(), num * (rank() + 1) // num_ranks())


def tensors_from_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's tensors by name, everywhere; what the others pass is not used."""
    if not _several():
        return dict(tensors)
    device = PartialState().device
    kinds = from_main({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    found = {}
    for name, (shape, dtype) in kinds.items():
        tensor = tensors[name].to(device) if is_main() else torch.empty(shape, dtype=dtype, device=device)
        distributed.broadcast(tensor, src=0)
        found[name] = tensor
    return found


def wait_for_all() -> None:
    if _several():
        distributed.barrier()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class BatchShard(NamedTuple):
    """The rows of the step's global batch that a batch holds.

    Random numbers are drawn for the whole global batch, then `shard.pick(drawn_B)` takes those of these clips, so they
    do not depend on the number of processes.
    """

    rows: list[int]
    total: int

    def pick(self, drawn: Tensor) -> Tensor:
        """The rows of this batch out of those of the global batch [total, ..]."""
        return drawn[self.rows]


def balanced_partition(costs: Sequence[float], num_parts: int, most: int | None = None) -> list[list[int]]:
    """Indices of `costs` in parts of nearly equal sums, each of at most `most` if given.

    Greedy: the most expensive first, to the cheapest part that has room.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    cost_of = [0.0] * num_parts
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        open_parts = (p for p in range(num_parts) if most is None or len(parts[p]) < most)
        part = min(open_parts, key=cost_of.__getitem__)
        parts[part].append(index)
        cost_of[part] += costs[index]
    return parts


def balance_load(num_clips: int, num_parts: int, costs: Sequence[float] | None = None) -> list[list[int]]:
    """Load balancing: rows 0 .. num_clips-1 split into `num_parts` of equal size.

    Without costs the parts are consecutive, with costs (e.g. tokens of each clip) see `balanced_partition`. UserError
    if the clips cannot be split equally.
    """
    if num_clips % num_parts:
        near = max(num_parts, round(num_clips / num_parts) * num_parts)
        raise UserError(
            f"run.batch_size={num_clips} is the global batch: it must be a multiple of processes x run.accumulate = "
            f"{num_parts}; the nearest is {near}"
        )
    room = num_clips // num_parts
    if costs is None or num_parts == 1:
        return [list(range(part * room, (part + 1) * room)) for part in range(num_parts)]
    return [sorted(part) for part in balanced_partition(costs, num_parts, room)]
