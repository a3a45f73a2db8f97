"""Memory: what a regularizer keeps from one optimiser step to the next."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twofold.batches import describe
from twofold.errors import TwofoldError
from twofold.parameters import norm


class Memory:
    """Tensors over parameters that outlive a step, and what the backward passes of the present step add to them.

    Lists of tensors are replaced, never changed in place, so that a shallow copy and a state keep their values.

    Attributes:
        kept: what earlier steps left, one tensor for each parameter; None before there is any.
        kept_at: the step in which it was found.
        arrived: the weighted sum of what the backward passes of this step gave.
        weight: the sum of their weights.
    """

    def __init__(self) -> None:
        self.kept: list[Tensor] | None = None
        self.kept_at: int | None = None
        self.arrived: list[Tensor] | None = None
        self.weight = 0.0

    def keep(self, tensors: Sequence[Tensor] | None, step: int) -> None:
        """Put these in the place of what was kept."""
        self.kept = None if tensors is None else list(tensors)
        self.kept_at = step

    def add(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Add what one backward pass gives, to be changed by nobody afterwards; what is not finite is left out."""
        if not norm(tensors).isfinite():
            return
        if self.arrived is None:
            self.arrived = list(tensors if weight == 1 else torch._foreach_mul(list(tensors), weight))
        else:
            self.arrived = list(torch._foreach_add(self.arrived, list(tensors), alpha=weight))
        self.weight += weight

    def take(self) -> tuple[list[Tensor], float] | None:
        """Return the sum that arrived and its weight, and begin anew; None where nothing arrived."""
        arrived, weight = self.arrived, self.weight
        self.drop()
        return None if arrived is None else (arrived, weight)

    def drop(self) -> None:
        """Forget what arrived in this step."""
        self.arrived, self.weight = None, 0.0

    def fit(self, parameters: Sequence[Tensor]) -> None:
        """Bring everything to the parameters' devices and dtypes.

        Raises:
            TwofoldError: the shapes are not those of the parameters.
        """
        shapes = [tuple(parameter.shape) for parameter in parameters]
        for tensors in (self.kept, self.arrived):
            if tensors is not None and (found := [tuple(tensor.shape) for tensor in tensors]) != shapes:
                raise TwofoldError(
                    f"The regularizer remembers tensors of shapes {_some(found)}, and the parameters have "
                    f"{_some(shapes)}: it was used with, or its state comes from, another model or other params=. "
                    "Build one regularizer for each model."
                )
        self.kept = _like(self.kept, parameters)
        self.arrived = _like(self.arrived, parameters)

    def state_dict(self) -> dict[str, Any]:
        """All of it, by name."""
        return dict(self.__dict__)

    def load_state_dict(self, state: Any) -> None:
        """Take over what `state_dict` gave.

        Raises:
            TwofoldError: it is something else.
        """
        if not isinstance(state, Mapping) or state.keys() != self.__dict__.keys():
            raise TwofoldError(f"A regularizer's memory has {sorted(self.__dict__)}; {describe(state)} came.")
        for name in ("kept", "arrived"):
            tensors = state[name]
            known = tensors is None or (
                isinstance(tensors, list | tuple)
                and all(isinstance(one, Tensor) and one.is_floating_point() for one in tensors)
            )
            if not known:
                raise TwofoldError(
                    f"{name!r} of a regularizer's memory is a list of tensors; {describe(tensors)} came."
                )
        self.__dict__.update(state)


def _like(tensors: list[Tensor] | None, parameters: Sequence[Tensor]) -> list[Tensor] | None:
    if tensors is None:
        return None
    return [tensor.to(parameter.device, parameter.dtype) for tensor, parameter in zip(tensors, parameters, strict=True)]


def _some(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(map(str, shapes[:6])) + (", ..." if len(shapes) > 6 else "")
