"""Several processes that train one run together, each on its part of every batch; torchrun starts them."""

import atexit
import gc
import os
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from twofold.distributed import agree, gathered, rank, world_size
from twofold.errors import TwofoldError
from twofold.lab.orphans import end_with
from twofold.regularizers.ranks import Ranks
from twofold.types import ProcessGroup

T = TypeVar("T")

_PATIENCE = timedelta(days=2)  # the first rank may wait for another job that computes the same run


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process speaks for those that torchrun has started."""
    return int(os.environ.get("RANK", "0")) == 0


def join(ranks: int, device: str) -> ProcessGroup:
    """The process group of a run's ranks, joined once a process; None for one rank.

    Raises:
        TwofoldError: torchrun has started another number of processes.
    """
    if ranks == 1:
        return None
    if not dist.is_initialized() and launched() == ranks:
        cuda = device.startswith("cuda")
        if cuda and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
        atexit.register(_leave)
        end_with(os.getppid())
    if not dist.is_initialized() or dist.get_world_size() != ranks:
        there = dist.get_world_size() if dist.is_initialized() else launched()
        raise TwofoldError(
            f"RunConfig.ranks is {ranks}, and {there} process{'es are' if there > 1 else ' is'} there: start with "
            f"`torchrun --nproc-per-node {ranks} -m twofold ...`, or set ranks to {there}."
        )
    return dist.group.WORLD


def _leave() -> None:
    """Leave the group, and let go of what still holds it: its threads must have ended before the process does."""
    dist.destroy_process_group()
    gc.collect()


def num_batches(count: int, batch_size: int, ranks: int = 1) -> int:
    """Batches of an epoch; a last one that is too small for every rank to have an example is left out."""
    full, rest = divmod(count, batch_size)
    return full + (rest >= ranks)


def share(rows: Tensor, group: ProcessGroup = None) -> Tensor:
    """This rank's part of a batch; parts are of one size, so up to ranks - 1 rows are left out."""
    size = len(rows) // world_size(group)
    return rows[rank(group) * size : (rank(group) + 1) * size]


def mean(number: float, group: ProcessGroup = None) -> float:
    """The mean over the ranks."""
    every = agree(group, [number])
    return sum(value for (value,) in every) / len(every)


def from_first(value: T, group: ProcessGroup = None) -> T:
    """What the first rank has."""
    agree(group)
    return gathered(value if rank(group) == 0 else None, group)[0]


def average_statistics(model: nn.Module, group: ProcessGroup = None) -> None:
    """Give all ranks the mean of their running statistics."""
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if world_size(group) == 1 or not statistics:
        return
    with torch.no_grad():
        for buffer, total in zip(statistics, Ranks(group, "global").total(statistics), strict=True):
            buffer.copy_(total / world_size(group))
