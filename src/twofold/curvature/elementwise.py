"""Smooth activations whose derivatives are worked out once for all vectors.

A product meets an activation only through derivatives that the recorded pass decides:

    y = phi(x)            derivative g -> g phi'(x)
    s = g phi'(x)         derivatives c -> c phi'(x) in g, c -> c (g phi''(x)) in x

So phi'(x) and g phi''(x) are kept, and every vector takes one multiplication where torch goes through the formula of
phi'' anew; x itself is let go once both are there. The derivatives themselves are torch's, or those of the
second_derivative context that holds.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from twofold.activations.known import OUTPUT_KEPT, PIECEWISE_LINEAR, SPELLINGS, activation_name, works_in_place
from twofold.curvature.asked import asked

# The others cost little as they are, and a model may overwrite the input of those that keep their output.
_SMOOTH = SPELLINGS.keys() - PIECEWISE_LINEAR - OUTPUT_KEPT


def can_be_kept(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Say whether a call is one of an activation that keeps its derivatives."""
    if activation_name(func, args, kwargs) not in _SMOOTH or works_in_place(func, kwargs):
        return False
    return bool(args) and args[0].requires_grad and kwargs.get("out") is None


def kept(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Call an activation so that it keeps its derivatives."""
    curve = _Curve(args[0], lambda x: func(x, *args[1:], **kwargs))
    return _Activation.apply(_Place.apply(args[0]), curve)  # pyrefly: ignore


class _Curve:
    """y = phi(x) and its derivatives, on a graph of its own."""

    def __init__(self, x: Tensor, phi: Callable[[Tensor], Tensor]) -> None:
        self._x = x.detach().requires_grad_()
        self._y = phi(self._x)

    def value(self) -> Tensor:
        """phi(x): not kept, since it will hold the graph that holds this."""
        return self._y.detach()

    @cached_property
    def graphed_slope(self) -> Tensor:
        """phi'(x) as a function of x."""
        with torch.enable_grad():
            return self._derivative(self._y, create_graph=True)

    @property
    def slope(self) -> Tensor:
        """phi'(x)."""
        return self.graphed_slope.detach()

    def bend(self) -> Tensor:
        """phi''(x), to be asked for once; x is forgotten."""
        bend = self._derivative(self.graphed_slope)
        self.graphed_slope = self.slope
        del self._x, self._y
        return bend

    def _derivative(self, values: Tensor, *, create_graph: bool = False) -> Tensor:
        one = torch.ones((), dtype=values.dtype, device=values.device).expand_as(values)
        return torch.autograd.grad(values, self._x, one, retain_graph=True, create_graph=create_graph)[0]


class _Place(torch.autograd.Function):
    """Stands for a tensor in the graph without holding its memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros((), dtype=x.dtype, device=x.device).expand_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        return g


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: _Curve) -> Tensor:
        ctx.save_for_backward(x)
        ctx.curve = curve
        return curve.value()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        if not torch.is_grad_enabled():
            return g * ctx.curve.slope, None
        return _Slope.apply(g, *ctx.saved_tensors, ctx.curve), None  # pyrefly: ignore


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, curve: _Curve) -> Tensor:
        ctx.curve, ctx.bent = curve, None
        ctx.held = [curve.graphed_slope, g.detach()]
        return g * curve.slope

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyrefly: ignore[bad-override]
        if torch.is_grad_enabled():
            raise RuntimeError("activations that keep their derivatives cannot be differentiated a third time")
        of_g, of_x = asked(ctx, 2)
        if of_x and ctx.bent is None:
            slope, g = ctx.held
            ctx.bent = g * ctx.curve.bend() if slope.requires_grad else 0.0
            ctx.held = [slope.detach(), ctx.bent]
        return c * ctx.curve.slope if of_g else None, c * ctx.bent if of_x else None, None
