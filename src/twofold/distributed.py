"""Several processes as one: sums over a process group, and errors that no rank waits for in vain.

A group of None is this process alone: nothing here does anything then. Everything else is collective: all ranks of the
group take the same steps. Each sum is announced by a header of a few numbers that says whether a rank has failed, so
that an error on one rank becomes an error on all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from twofold.errors import NotFiniteError, TwofoldError
from twofold.types import ProcessGroup

_NUMBERS = 20
"""How many numbers a header has room for; all headers are of one size, so that any two of them meet."""


class RankError(TwofoldError):
    """Another rank of the group has failed; the message says which, and why."""


def check_group(group: ProcessGroup) -> None:
    """Refuse what is no process group that this process belongs to."""
    if group is None:
        return
    if not dist.is_available() or not dist.is_initialized():
        raise TwofoldError("group= needs torch.distributed.init_process_group first; for one process leave it out.")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise TwofoldError("This process is not a member of the group that was given; measure on its members only.")
    if not isinstance(group, dist.ProcessGroup):
        raise TwofoldError(
            f"group must be a torch.distributed process group (torch.distributed.group.WORLD is that of all ranks) or "
            f"None; a {type(group).__name__} came."
        )


def world_size(group: ProcessGroup) -> int:
    """How many ranks the group has; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: ProcessGroup) -> int:
    """This process's number in the group; 0 without a group."""
    return 0 if group is None else dist.get_rank(group)


@contextmanager
def together(group: ProcessGroup) -> Iterator[None]:
    """Let an exception on this rank be seen by the others, where they next `agree`, instead of letting them wait.

    May be nested: an error is told once. What happens after the last `agree` inside is told at the others' next one.
    """
    try:
        yield
    except Exception as error:
        if world_size(group) > 1 and not getattr(error, "told_to_group", False):
            _headers(group, [1.0])
            error.told_to_group = True  # pyrefly: ignore
            gathered((type(error).__name__, str(error)), group)
        raise


def agree(group: ProcessGroup, numbers: Sequence[float] = ()) -> list[list[float]]:
    """Exchange a few numbers, and learn that no rank has failed.

    Args:
        group: the process group.
        numbers: at most 19, as many on every rank.

    Returns:
        The numbers of each rank, in the order of ranks.

    Raises:
        RankError: another rank raised inside `together`; NotFiniteError where that is what it raised.
    """
    if world_size(group) == 1:
        return [list(numbers)]
    every = _headers(group, [0.0, *numbers])
    if any(header[0] for header in every):
        errors = gathered(None, group)
        texts = [f"rank {i} of the group: {': '.join(error)}" for i, error in enumerate(errors) if error is not None]
        kinds = {error[0] for error in errors if error is not None}
        kind = NotFiniteError if kinds == {NotFiniteError.__name__} else RankError
        error = kind("Another rank failed, so this one stops too.\n" + "\n".join(texts))
        error.told_to_group = True  # pyrefly: ignore
        raise error
    return [header[1 : 1 + len(numbers)] for header in every]


def _headers(group: ProcessGroup, numbers: Sequence[float]) -> list[list[float]]:
    device = _device(group, torch.device("cpu"))
    mine = torch.zeros(_NUMBERS, dtype=torch.float64, device=device)
    mine[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    every = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(every, mine, group=group)
    return torch.stack(every).tolist()


def gathered(value: Any, group: ProcessGroup) -> list[Any]:
    """Return the picklable value of each rank, in the order of ranks."""
    if world_size(group) == 1:
        return [value]
    every: list[Any] = [None for _ in range(world_size(group))]
    dist.all_gather_object(every, value, group=group)
    return every


def summed(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of a tensor over the ranks, the same to the bit on all; it may write into the tensor."""
    if world_size(group) == 1:
        return tensor
    moved = tensor.contiguous().to(_device(group, tensor.device))
    dist.all_reduce(moved, group=group)
    return moved.to(tensor.device)


def from_first(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the first rank's tensor; it may write into the tensor."""
    if world_size(group) == 1:
        return tensor
    moved = tensor.contiguous().to(_device(group, tensor.device))
    dist.broadcast(moved, group=group, group_src=0)
    return moved.to(tensor.device)


def same_generator(generator: torch.Generator | None, group: ProcessGroup) -> None:
    """Put a generator into the state that it has on the first rank.

    Raises:
        TwofoldError: some ranks have a generator and others have none.
    """
    if world_size(group) == 1:
        return
    given = [bool(has) for (has,) in agree(group, [float(generator is not None)])]
    if any(given) != all(given):
        raise TwofoldError(
            f"A generator came on ranks {[i for i, has in enumerate(given) if has]} of the group only: pass one on all "
            "ranks, or on none."
        )
    if generator is not None:
        generator.set_state(from_first(generator.get_state(), group))


def _device(group: ProcessGroup, device: torch.device) -> torch.device:
    """Where the group can exchange a tensor of this device: there, else on the accelerator that it speaks for."""
    spoken = str(dist.get_backend_config(group))
    if device.type in [entry.split(":")[0] for entry in spoken.split(",")]:
        return device
    return torch.device("cuda", torch.cuda.current_device())
