"""Whether what a recording was made from is still what it was, bit for bit.

Fused optimisers and writes through .data do not bump a tensor's version, and sums of any kind miss some change (two
neurons that swap, a row that turns its sign). So copies are kept and compared at the speed of memory.
"""

import ctypes
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from twofold.activations.second_derivative import active_second_derivatives
from twofold.batches import tensors_in


class Snapshot:
    """The state that decides a recording.

    That is all tensors of the model and the loss, modes, the second_derivative context, and which tensors the batches
    are.

    Args:
        model: a plain module.
        loss_fn: the loss, whose own tensors (class weights) count.
        batches: the batches that are in memory. They are known by place and version, not copied.
    """

    def __init__(self, model: nn.Module, loss_fn: Any, batches: Sequence[Any]) -> None:
        self._watched = _watched(model, loss_fn)
        self._copies = [[_bits(part).clone() for part in _parts(tensor)] for tensor in self._watched]
        self._marks = _marks(model, self._watched, batches)

    def holds(self, model: nn.Module, loss_fn: Any, batches: Sequence[Any]) -> bool:
        """Tell whether everything is as it was."""
        watched = _watched(model, loss_fn)
        return self._marks == _marks(model, watched, batches) and all(
            len(parts := _parts(tensor)) == len(copies)
            and all(_same(_bits(part), copy) for part, copy in zip(parts, copies, strict=True))
            for tensor, copies in zip(watched, self._copies, strict=True)
        )


def _watched(model: nn.Module, loss_fn: Any) -> list[Tensor]:
    plain = [value for module in model.modules() for value in module.__dict__.values() if type(value) is Tensor]
    return [*model.parameters(), *model.buffers(), *plain, *_tensors_of_loss(loss_fn)]


def _tensors_of_loss(loss_fn: Any) -> list[Tensor]:
    found = list(tensors_in(getattr(loss_fn, "keywords", {})))
    if isinstance(loss_fn, nn.Module):
        found += [*loss_fn.parameters(), *loss_fn.buffers()]
    inner = getattr(loss_fn, "func", None)
    return found if inner is None else found + _tensors_of_loss(inner)


def _marks(model: nn.Module, watched: Iterable[Tensor], batches: Sequence[Any]) -> tuple[Any, ...]:
    return (
        [(id(module), module.training) for module in model.modules()],
        [(id(tensor), tensor.dtype, tensor.device, tensor.shape) for tensor in watched if not is_lazy(tensor)],
        [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors_in(batches)],
        active_second_derivatives(),
    )


def _parts(tensor: Tensor) -> list[Tensor]:
    """The dense real tensors that a tensor is made of."""
    tensor = tensor.detach()
    if is_lazy(tensor) or tensor.is_meta:
        return []
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), *_parts(tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), *_parts(tensor.values())]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), *_parts(tensor.values())]
    tensor = tensor.resolve_conj().resolve_neg()
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's entries as integers, so that NaN equals itself and -0 is not 0."""
    return tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])


# At the speed of memory: six times as fast as torch.equal, which matters for small models.
_memcmp = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def _same(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(a, b) if a.device.type != "cpu" else _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes) == 0
