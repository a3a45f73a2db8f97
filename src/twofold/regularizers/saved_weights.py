"""Room for a copy of the weights while they are perturbed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class SavedWeights:
    """Puts weights back from a copy, bit for bit.

    The room for the copy stays from step to step: on a CPU, to allocate that much anew takes longer than to fill it.
    """

    def __init__(self) -> None:
        self._room: list[Tensor] = []

    @contextmanager
    def kept(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Put these weights back on leaving, also after an exception."""
        # Taken out while in use, so that a pass within a pass has room of its own.
        room, self._room = self._room, []
        if [_kind(tensor) for tensor in room] != [_kind(weight) for weight in weights]:
            room = [torch.empty_like(weight) for weight in weights]
        with torch.no_grad():
            torch._foreach_copy_(room, list(weights))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(weights), room)
            self._room = room


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
