"""Gradients written into one vector as they come, so that they do not stand in memory beside it."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.parameters import ParameterLayout

_SHARE = 1 / 3
"""Of the entries that have come when the vector is made: while the last layers' gradients come, those of all others may
wait for their second half, and need the room."""


class Gathering:
    """Within this context the gradients of leaves that a backward pass returns are written away and let go.

    Args:
        leaves: what torch.autograd.grad is asked for, in the vector's order.
        layout: where each lies in the vector.
    """

    def __init__(self, leaves: Sequence[Tensor], layout: ParameterLayout) -> None:
        self._leaves, self._layout = leaves, layout
        self._zeros: dict[Any, Tensor] = {}
        self._lock = threading.Lock()  # the gradients of each device come in a thread of its own
        self._reset()

    def _reset(self) -> None:
        self._waiting: dict[int, Tensor] = {}
        self._come = 0
        self._places: list[Tensor] = []
        self._written: set[int] = set()
        self._vector: Tensor | None = None

    def __enter__(self) -> "Gathering":
        self._hooks = [leaf.register_hook(partial(self._take, at)) for at, leaf in enumerate(self._leaves)]
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def vector(self, found: Sequence[Tensor]) -> Float[Tensor, "P"]:
        """Return the gradients of the last pass as one vector.

        Args:
            found: what the pass returned; it holds the gradients that did not come (zeros of what was not reached).
        """
        if self._vector is None:
            vector = self._layout.flatten([self._waiting.get(at, one) for at, one in enumerate(found)])
        else:
            vector = self._vector
            for at, one in enumerate(found):
                if at not in self._written:
                    self._places[at].copy_(one)
        self._reset()
        return vector

    def _take(self, at: int, gradient: Tensor | None) -> Tensor | None:
        """Take a gradient and return what stands in its place, which holds no memory."""
        if gradient is None or torch.is_grad_enabled():  # a pass whose own graph is wanted
            return None
        with self._lock:
            self._write_away(at, gradient)
            like = (gradient.dtype, gradient.device)
            if like not in self._zeros:
                self._zeros[like] = gradient.new_zeros(())
        return self._zeros[like].expand(gradient.shape)

    def _write_away(self, at: int, gradient: Tensor) -> None:
        self._waiting[at] = gradient
        self._come += gradient.numel()
        if self._vector is None and self._come >= _SHARE * self._layout.size:
            self._vector = torch.empty(self._layout.size, dtype=self._layout.dtype, device=self._layout.device)
            self._places = list(self._layout.as_dict(self._vector).values())
        if self._vector is not None:
            for place, one in self._waiting.items():
                self._places[place].copy_(one)
            self._written |= self._waiting.keys()
            self._waiting.clear()
