"""Which process of how many this is (its rank), and the few things that the processes of one run tell each other.

`join` finds the others however they were started: `torchrun`, `accelerate launch`, MPI or plain `srun`. With one
process everything here is the identity, so code that calls it needs no second path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, distributed

from tokenizer.common.errors import UserError
from tokenizer.common.launcher import adopt_slurm

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # the others wait while rank 0 validates


def join(on_cpu: bool) -> PartialState:
    """Meet the other processes of the run, gloo on CPU and nccl on GPUs; called again it changes nothing."""
    adopt_slurm(os.environ)
    if _several():
        return PartialState()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and not on_cpu:
        _check_gpus(os.environ, torch.cuda.device_count())
    options = InitProcessGroupKwargs(timeout=_PATIENCE).to_kwargs() if several else {}
    return PartialState(cpu=on_cpu, **options)


def _check_gpus(environment: Mapping[str, str], visible: int) -> None:
    """UserError for more processes than GPUs on this machine, unless SLURM shows every task a GPU of its own."""
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
    """Whether this process is the one that writes files and speaks."""
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
    packed = sum_over_ranks(torch.cat([own.flatten(), own.new_tensor([rows])]))
    total, rows_of_all = packed[:-1].view_as(own), packed[-1]
    own = own * (num_ranks() / rows_of_all)
    return own + (total / rows_of_all - own).detach()


def any_rank(flag: bool) -> bool:
    """Whether any rank says yes: the same answer everywhere."""
    return bool(sum_over_ranks(torch.tensor(float(flag))))


def from_main(value: T) -> T:
    """What rank 0 has, everywhere. Plain data only: it is pickled between the processes of one run."""
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


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if _several():
        distributed.barrier()


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
