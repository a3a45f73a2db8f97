"""The ranks of a group that make a step together, and means over them."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from twofold.distributed import agree, from_first, rank, summed, world_size
from twofold.regularizers.gradients import Gradients
from twofold.types import ProcessGroup

Ascent: TypeAlias = Literal["global", "local"]

_APART = 1_000_003
"""What the seeds of two ranks differ by."""


class Ranks:
    """What a regularizer asks of the other ranks. All of them take the same steps, in the same order.

    Args:
        group: a process group; None for this process alone, which changes nothing then.
        ascent: "global": one perturbation for all ranks; "local": each rank has its own.

    Attributes:
        group: the process group.
        size: the number of ranks.
        alike: whether all ranks perturb alike.
    """

    def __init__(self, group: ProcessGroup, ascent: Ascent) -> None:
        self.group = group
        self.size = world_size(group)
        self.alike = ascent == "global"

    def mean(self, gradients: Gradients, parameters: Sequence[Tensor], *, counts: bool = True) -> Gradients:
        """Average gradients over the ranks; an entry stays None where it is None on all of them.

        Args:
            gradients: this rank's.
            parameters: what they are gradients of.
            counts: whether this rank's gradient takes part; where it has no term it does not.
        """
        if self.size == 1:
            return gradients
        given = [float(gradient is not None) for gradient in gradients]
        pairs = zip(gradients, parameters, strict=True)
        parts = [torch.zeros_like(p) if g is None or not counts else g for g, p in pairs]
        marks = torch.tensor([*given, float(counts)], device=parts[0].device)
        averaged, found = self._summed(parts, marks)
        taking_part = max(found[-1].item(), 1.0)
        return [
            (part / taking_part).to(like.dtype) if known else None
            for part, like, known in zip(averaged, parts, found.tolist()[:-1], strict=True)
        ]

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors, of the same shapes on all ranks."""
        if self.size == 1:
            return list(tensors)
        summed_up, _ = self._summed(tensors)
        return [part.to(like.dtype) for part, like in zip(summed_up, tensors, strict=True)]

    def everywhere(self, condition: bool | Tensor) -> bool:
        """Tell whether something holds on every rank, so that all of them decide alike."""
        return all(holds for (holds,) in agree(self.group, [float(condition)]))

    def count(self, number: float) -> float:
        """Sum a number over the ranks."""
        return sum(one for (one,) in agree(self.group, [number]))

    def seed(self, own: Tensor, *, of_terms: bool) -> int:
        """Return the seed of a generator, given one that this rank has drawn.

        What is drawn for weights is the same on all ranks that perturb alike; what is drawn for the terms of the
        loss, and for ranks of their own, differs from rank to rank.
        """
        if self.size == 1:
            return int(own)
        if self.alike:
            agree(self.group)
            own = from_first(own.cpu(), self.group)
        apart = of_terms or not self.alike
        return (int(own) + (_APART * rank(self.group) if apart else 0)) % 2**62

    def _summed(self, tensors: Sequence[Tensor], marks: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Sum tensors over the ranks, as one vector in float32 or better with a few marks behind."""
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        device = tensors[0].device
        parts = [tensor.detach().reshape(-1).to(device, dtype) for tensor in tensors]
        marks = torch.empty(0, device=device) if marks is None else marks
        agree(self.group)
        flat = summed(torch.cat([*parts, marks.to(dtype)]), self.group)
        *pieces, marks = flat.split([*(part.numel() for part in parts), marks.numel()])
        return [p.view(t.shape).to(t.device) for p, t in zip(pieces, tensors, strict=True)], marks


def group_of(model: Any) -> ProcessGroup:
    """The process group of a DistributedDataParallel model, below any compiled wrapper; None for another model."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None


def same_buffers(model: Any, group: ProcessGroup) -> None:
    """Give all ranks the first one's buffers where a DistributedDataParallel model would, as its forward pass does."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    if world_size(group) == 1 or not isinstance(model, nn.parallel.DistributedDataParallel):
        return
    if not model.broadcast_buffers:
        return
    agree(group)
    by_kind: dict[Any, list[Tensor]] = {}
    for buffer in model.module.buffers():
        by_kind.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    with torch.no_grad():
        for buffers in by_kind.values():
            flat = from_first(torch.cat([buffer.detach().reshape(-1) for buffer in buffers]), group)
            for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(part.view(buffer.shape))
