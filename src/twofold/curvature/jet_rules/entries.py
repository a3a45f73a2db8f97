"""Functions of each entry on its own: y1 = phi' x1, y2 = phi' x2 + phi'' x1^2."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from twofold.curvature.jet_rules.jet import Jet, NotCarriedError, each, leaves, parts, plus, times

_aten = torch.ops.aten


def entrywise(func: Callable, input: Any, *args: Any, **kwargs: Any) -> Jet:
    """A function of each entry that is not spelled out below."""
    if not isinstance(input, Jet):  # a number to the power of a tensor
        if len(args) != 1 or not isinstance(args[0], Jet):
            raise NotCarriedError(func.__name__)
        return of_entries(lambda t: func(input, t, **kwargs), _spread(args[0], [input]))
    others = list(leaves((args, kwargs)))
    if any(isinstance(other, Jet) for other in others):
        raise NotCarriedError(f"{func.__name__} of two tensors that are differentiated")
    return of_entries(lambda t: func(t, *args, **kwargs), _spread(input, others))


def piecewise_linear(func: Callable, input: Jet, *args: Any, **kwargs: Any) -> Jet:
    """A function of each entry whose phi'' is zero wherever there is one."""
    return of_entries(lambda t: func(t, *args, **kwargs), input, curved=False)


def _spread(x: Jet, others: Sequence[Any]) -> Jet:
    """Broadcast against the other tensors of a call."""
    shapes = [other.shape for other in others if isinstance(other, Tensor)]
    shape = torch.broadcast_shapes(x.z0.shape, *shapes) if shapes else x.z0.shape
    return x if shape == x.z0.shape else each(lambda t: t.expand(shape), x)


def of_entries(f: Callable[[Tensor], Tensor], x: Jet, *, curved: bool = True) -> Jet:
    """Any function of each entry on its own, its derivatives taken in reverse."""
    graph = torch.is_grad_enabled()
    x0, x1, _ = x
    with torch.enable_grad():
        at = x0 if graph and x0.requires_grad else x0.detach().requires_grad_()
        y = f(at)
        slope = None
        if y.requires_grad:
            ones = torch.ones_like(y)
            (slope,) = torch.autograd.grad(y, at, ones, create_graph=curved, retain_graph=graph or curved)
        curvature = None
        if x1 is not None and slope is not None and slope.requires_grad:
            ones = torch.ones_like(slope)
            curvature = torch.autograd.grad(slope, at, ones, create_graph=graph, allow_unused=True)[0]
    if curvature is not None and curvature._is_zerotensor():
        curvature = None
    if slope is not None and slope._is_zerotensor():
        slope = slope.clone()
    if not graph:
        y, slope = y.detach(), None if slope is None else slope.detach()
    return chained(y, x, lambda t: None if slope is None else slope * t, curvature)


def chained(
    y: Tensor, x: Jet, slope: Callable[[Tensor], Tensor | None], curvature: Tensor | Callable[[], Tensor] | None
) -> Jet:
    """The jet of phi(x), given t -> phi'(x0) t and phi''(x0)."""
    _, x1, x2 = x
    y1 = None if x1 is None else slope(x1)
    y2 = None if x2 is None else slope(x2)
    if x1 is not None and curvature is not None:
        bend = curvature() if callable(curvature) else curvature
        y2 = plus(bend * x1 * x1, y2)
    return Jet(y, y1, y2)


def relu(func: Callable, input: Jet, inplace: bool = False) -> Jet:
    """max(x, 0)."""
    return chained(torch.relu(input.z0), input, lambda t: _aten.threshold_backward(t, input.z0, 0), None)


def gelu(func: Callable, input: Jet, *, approximate: str = "none") -> Jet:
    """x Phi(x): phi'' = (2 - x^2) exp(-x^2/2) / sqrt(2 pi)."""
    if approximate != "none":
        return of_entries(lambda t: F.gelu(t, approximate=approximate), input)
    x, x1, x2 = input
    if torch.is_grad_enabled() and x1 is not None and x.dtype in (torch.float32, torch.float64):
        return Jet(F.gelu(x), *_GELUTangents.apply(x, x1, x2))  # pyrefly: ignore

    def curvature() -> Tensor:
        square = x * x
        return torch.exp(-0.5 * square) * ((2 - square) / math.sqrt(2 * math.pi))

    return chained(F.gelu(x), input, lambda t: _aten.gelu_backward(t, x), curvature)


class _GELUTangents(torch.autograd.Function):
    """phi' x1 and phi' x2 + phi'' x1^2 with their gradients: autograd would take a dozen operations more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x1: Tensor, x2: Tensor | None) -> tuple[Tensor, Tensor]:
        density = (-0.5 * x * x).exp_().mul_(1 / math.sqrt(2 * math.pi))
        slope = (x * math.sqrt(0.5)).erf_().add_(1).mul_(0.5).addcmul_(x, density)
        curvature = (2 - x * x).mul_(density)
        ctx.save_for_backward(x, x1, x2, density, slope, curvature)
        y2 = (curvature * x1).mul_(x1)
        return slope * x1, y2 if x2 is None else y2.addcmul_(slope, x2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g1: Tensor, g2: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, x1, x2, density, slope, curvature = ctx.saved_tensors
        bent = curvature * x1
        in_x = (x * x).sub_(4).mul_(x).mul_(density).mul_(x1).mul_(x1)  # the third derivative is x (x^2 - 4) density
        if x2 is not None:
            in_x.addcmul_(curvature, x2)
        in_x.mul_(g2).addcmul_(bent, g1)
        in_x1 = (slope * g1).addcmul_(bent, g2, value=2) if ctx.needs_input_grad[1] else None
        return in_x, in_x1, slope * g2 if x2 is not None else None


def tanh(func: Callable, input: Jet) -> Jet:
    """phi' = 1 - y^2, phi'' = -2 y phi'."""
    y = torch.tanh(input.z0)
    slope = 1 - y * y
    return chained(y, input, lambda t: slope * t, lambda: -2 * y * slope)


def sigmoid(func: Callable, input: Jet) -> Jet:
    """phi' = y (1 - y), phi'' = phi' (1 - 2 y)."""
    y = torch.sigmoid(input.z0)
    slope = y * (1 - y)
    return chained(y, input, lambda t: slope * t, lambda: slope * (1 - 2 * y))


def silu(func: Callable, input: Jet, inplace: bool = False) -> Jet:
    """x s with s = sigmoid(x): phi' = s (1 + x (1 - s)), phi'' = s (1 - s) (2 + x (1 - 2 s))."""
    x = input.z0
    s = torch.sigmoid(x)
    slope = s * (1 + x * (1 - s))
    return chained(F.silu(x), input, lambda t: slope * t, lambda: s * (1 - s) * (2 + x * (1 - 2 * s)))


def exp(func: Callable, input: Jet) -> Jet:
    """phi' = phi'' = y."""
    y = torch.exp(input.z0)
    return chained(y, input, lambda t: y * t, y)


def prelu(func: Callable, input: Any, weight: Any) -> Jet:
    """max(x, 0) + a min(x, 0): a product below zero."""
    (x0, x1, x2), (a0, a1, a2) = parts(input), parts(weight)
    z0 = torch.prelu(x0, a0)
    shape = [1, -1] + [1] * (x0.dim() - 2) if x0.dim() > 1 else [-1]
    slope, below = torch.where(x0 > 0, 1.0, a0.view(shape)), torch.where(x0 > 0, 0.0, x0)
    z1, z2 = (plus(times(x, slope), None if a is None else below * a.view(shape)) for x, a in ((x1, a1), (x2, a2)))
    if x1 is not None and a1 is not None:
        z2 = plus(torch.where(x0 > 0, 0.0, x1) * a1.view(shape) * 2, z2)
    return Jet(z0, z1, z2)


def maximum(func: Callable, input: Any, other: Any) -> Jet:
    """The greater or the smaller of two; both alike where they are equal, as torch has it."""
    (a0, a1, a2), (b0, b1, b2) = parts(input), parts(other)
    z0 = func(a0, b0)
    share = torch.where(a0 == b0, 0.5, (z0 == a0).to(z0.dtype)).to(z0.dtype)
    z1, z2 = (plus(times(a, share), None if b is None else b * (1 - share)) for a, b in ((a1, b1), (a2, b2)))
    return Jet(z0, z1, z2)
