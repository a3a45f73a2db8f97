"""An activation with another second derivative, as a pair of autograd functions.

    _Activation   y = phi(x)              derivative: _Slope
    _Slope        g, x -> g phi'(x)       derivatives: phi'(x) in g (itself), g f(x) in x, f in the place of phi''

Values and first derivatives come from torch's own operation and its own backward; only the derivative of the slope is
new. All further derivatives are those that autograd finds for f. What the functions need they carry with them, since
backward passes run in other threads and after the context that made them. torch takes overrides off during a backward
pass, so a context that is active then swaps neither f's own pieces nor the operation asked for its backward.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError

SecondDerivative = Callable[[Tensor], Tensor]
"""f, an elementwise function that stands in for phi''."""

Autocast = tuple[str, torch.dtype] | None
"""Device and type that operations are cast to; None where autocast is off."""


@dataclass(frozen=True)
class Call:
    """One call of an elementwise operation on a tensor, and f, the stand-in for its second derivative."""

    func: Callable
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    in_place: bool
    f: SecondDerivative
    backward: Callable[..., Tensor] | None
    autocast: Autocast

    def value(self, x: Tensor) -> Tensor:
        """Return phi(x) as torch computes it; x is left alone also where the operation works in place."""
        return self.func(x.clone() if self.in_place else x, *self.args, **self.kwargs)

    def slope(self, g: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        """Return g phi'(x) by torch's own backward of the operation: some take another one under create_graph."""
        if self.backward is not None and g.dtype == x.dtype:
            return self.backward(g, x, **{key: value for key, value in self.kwargs.items() if key != "inplace"})
        with _cast_by(self.autocast, x), torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.value(x), x, g, create_graph=create_graph)[0].detach()

    def curvature(self, x: Tensor) -> Tensor:
        """Return f(x), differentiable in x."""
        result = self.f(x)
        if not isinstance(result, Tensor) or result.shape != x.shape:
            came = f"a tensor of shape {list(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise TwofoldError(
                f"The stand-in for phi'' must be elementwise: for x of shape {list(x.shape)}, {self.f!r} gave {came}. "
                "Return a tensor of the shape of x; for a constant pass the number itself to second_derivative."
            )
        return result


class Flat(Call):
    """The zero function with f as its second derivative, to be added to an operation that is piecewise linear.

    Zeros are negative ones, since only they leave every number that they are added to as it is, +0 and -0 included.
    """

    def value(self, x: Tensor) -> Tensor:
        """Return zeros."""
        return torch.full_like(x, -0.0)

    def slope(self, g: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        """Return zeros."""
        return torch.full_like(x, -0.0)


def activation(x: Tensor, call: Call) -> Tensor:
    """Return phi(x) with f as its second derivative in every graph that is made of it."""
    return (_here.taker or swapped)(x, call)


def swapped(x: Tensor, call: Call) -> Tensor:
    """Do what `activation` does where nobody takes the calls over."""
    return _Activation.apply(x, call)  # pyrefly: ignore


class _Here(threading.local):
    taker: Callable[[Tensor, Call], Tensor] | None = None


_here = _Here()


@contextmanager
def taken_by(taker: Callable[[Tensor, Call], Tensor]) -> Iterator[None]:
    """Let another function answer the calls of `activation` in this thread."""
    before, _here.taker = _here.taker, taker
    try:
        yield
    finally:
        _here.taker = before


def slope(g: Tensor, x: Tensor, call: Call) -> Tensor:
    """Return g phi'(x), with f in the place of phi'' in every graph that is made of it."""
    return _Slope.apply(g, x, call, torch.is_grad_enabled())  # pyrefly: ignore


def saving_is_hooked() -> bool:
    """Say whether tensors saved for backward go through hooks (torch.utils.checkpoint, offloading) at present."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, call: Call) -> Tensor:
        if not saving_is_hooked():
            return call.value(x)
        # A checkpoint recomputes the pass, maybe after the context has gone, and finds what was saved by counting. So
        # save just what torch's own operation saves; x itself is kept beside the hooks.
        with torch.enable_grad():
            return call.value(x.detach().requires_grad_(x.requires_grad)).detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Call], output: Tensor) -> None:
        x, ctx.call = inputs
        _keep(ctx, x)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = _kept(ctx)
        return slope(g, x, ctx.call), None

    @staticmethod
    # pyrefly: ignore[bad-override]
    def jvp(ctx: Any, x_tangent: Tensor, _: None) -> Tensor:
        (x,) = _kept(ctx)
        return slope(x_tangent, x, ctx.call)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, call: Call) -> tuple[Tensor, int | None]:
        return activation(x, call), in_dims[0]


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(g: Tensor, x: Tensor, call: Call, create_graph: bool) -> Tensor:
        return call.slope(g, x, create_graph)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Call, bool], output: Tensor) -> None:
        g, x, ctx.call, _ = inputs
        _keep(ctx, g, x)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        g, x = _kept(ctx)
        in_g = slope(c, x, ctx.call) if ctx.needs_input_grad[0] else None
        in_x = (g * c * ctx.call.curvature(x)).to(x.dtype) if ctx.needs_input_grad[1] else None
        return in_g, in_x, None, None

    @staticmethod
    # pyrefly: ignore[bad-override]
    def jvp(ctx: Any, g_tangent: Tensor, x_tangent: Tensor, *_: None) -> Tensor:
        g, x = _kept(ctx)
        from_x = (g * x_tangent * ctx.call.curvature(x)).to(x.dtype)
        return slope(g_tangent, x, ctx.call) + from_x

    @staticmethod
    # pyrefly: ignore[bad-override]
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, x: Tensor, *carried: Any) -> tuple[Tensor, int]:
        g, x = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((g, x), in_dims, strict=False)
        )
        return _Slope.apply(g, x, *carried), 0  # pyrefly: ignore


# `apply` inspects the signature of forward at each call, which costs more than a small activation itself.
for _function in (_Activation, _Slope):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # pyrefly: ignore


def _keep(ctx: Any, *tensors: Tensor) -> None:
    ctx.beside_hooks = tensors if saving_is_hooked() else None
    if ctx.beside_hooks is None:
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


def _kept(ctx: Any) -> tuple[Tensor, ...]:
    return ctx.saved_tensors if ctx.beside_hooks is None else ctx.beside_hooks


def autocast_of(x: Tensor) -> Autocast:
    """Return the autocast in force for a tensor's device."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return device, torch.get_autocast_dtype(device)


@contextmanager
def _cast_by(autocast: Autocast, x: Tensor) -> Iterator[None]:
    """Cast as the forward pass did, whatever holds where the backward pass runs."""
    if autocast == autocast_of(x):
        yield
    elif autocast is None:
        with torch.autocast(x.device.type, enabled=False):
            yield
    else:
        with torch.autocast(autocast[0], dtype=autocast[1], cache_enabled=False):
            yield
