"""Whether the same batch gives the same numbers twice, and what it is that does not."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from twofold.batches import tensors_in

_PIECES = 7


def checksum(tensors: Iterable[Tensor]) -> list[float]:
    """A few sums over pieces of tensors, and their norm: 8 numbers that tell tensors apart."""
    sums, square = torch.zeros(_PIECES, dtype=torch.float64), 0.0
    for i, tensor in enumerate(tensors):
        flat = _entries(tensor).reshape(-1)
        parts = [part.sum(dtype=torch.float64) for part in flat.tensor_split(_PIECES)]
        sums += (i + 1) * torch.stack(parts).cpu()
        square += float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
    return [*sums.tolist(), math.sqrt(square)]


def alike(one: Sequence[float], other: Sequence[float], tolerance: float = 0.0) -> bool:
    """Tell whether two checksums are equal, up to differences of `tolerance` relative to the norm."""
    slack = tolerance * max(one[-1], other[-1])
    return all(
        a == b or abs(a - b) <= slack or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True)
    )


def same_value(one: float, other: float, dtype: torch.dtype) -> bool:
    """Tell whether two values of a loss are the same but for the order in which a device sums."""
    eps = torch.finfo(dtype).eps
    return abs(one - other) <= math.sqrt(eps) * max(abs(one), abs(other)) + 8 * eps


def _entries(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout != torch.strided:
        tensor = tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.is_floating_point() else tensor.double()


@dataclass(frozen=True)
class Event:
    """A module is entered, or left, with these tensors."""

    module: str
    leaves: bool
    tensors: list[float]


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Event]]:
    """Write down what goes into and comes out of every module."""
    events: list[Event] = []
    handles: list[RemovableHandle] = []

    def note(name: str, leaves: bool, value: Any) -> None:
        events.append(Event(name, leaves, checksum(tensors_in(value))))

    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: note(name, False, (args, kwargs)), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda _, args, output, name=name: note(name, True, output)))
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


def culprit(model: nn.Module, run: Callable[[], list[Event]], tolerance: float) -> str | None:
    """Name the innermost place where two runs of the same batch part; None where they do not.

    Args:
        model: whose modules are named.
        run: runs the same batch once and returns its events.
        tolerance: differences up to this, relative to a tensor's norm, are rounding.
    """
    inside: list[str] = []
    modules = dict(model.named_modules())
    for one, other in zip_longest(run(), run()):
        here = inside[-1] if inside else None
        if one is None or other is None or (one.module, one.leaves) != (other.module, other.leaves):
            return _described(modules, here, "does not call the same modules twice")
        if not alike(one.tensors, other.tensors, tolerance):
            if one.leaves:
                return _described(modules, one.module, "gives different outputs for the same inputs")
            return _described(modules, here, f"hands other inputs to {one.module!r}")
        if one.leaves:
            inside.pop()
        else:
            inside.append(one.module)
    return None


def _described(modules: dict[str, nn.Module], name: str | None, does: str) -> str:
    if name is None:
        return "forward= hands other inputs to the model"
    kind = type(modules[name]).__name__
    return f"module {name!r} ({kind}) {does}" if name else f"the model's own forward ({kind}) {does}"
