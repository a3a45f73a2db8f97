"""Batch norm whose double backward is a closed form.

torch composes its own from dozens of passes over tensors as large as the activations. With x^ = r (x - m), means over
the n entries of a channel, and the self-adjoint

    Pi t = t - mean(t) - x^ mean(x^ t)          (Pi t = t where m and r are running statistics)

the norm y = w x^ + b has the adjoint g -> (gx, gw, gb), whose derivatives along (cx, cw, cb) are (dg, dx, dw):

    gx = r Pi(w g)      gw = sum(g x^)      gb = sum(g)

    e  = r Pi cx
    dg = w e + cw x^ + cb
    dx = r Pi(cw g) - r (mean(w g x^) e + mean(cx x^) gx + mean(cx gx) x^)      (r cw g where Pi t = t)
    dw = sum(g e)

Values, first derivatives and e come from torch's kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.curvature.asked import asked

_aten = torch.ops.aten

_Three: TypeAlias = Sequence[Tensor | None]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, norm: "_BatchNorm") -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.norm = norm
        return norm.value(x, w, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return *_Adjoint.apply(g, *ctx.saved_tensors, ctx.norm, asked(ctx, 3)), None  # pyrefly: ignore


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, g: Tensor, x: Tensor, w: Tensor | None, norm: "_BatchNorm", of: Sequence[bool]
    ) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, w)
        ctx.norm = norm
        gradients, ctx.held = norm.adjoint(g, x, w, of)
        return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, of, strict=True))

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *along: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("norms in closed form cannot be differentiated a third time")
        return *ctx.norm.derivatives(ctx.saved_tensors, ctx.held, along, asked(ctx, 3)), None, None


class _BatchNorm:
    """One call of a batch norm; it does not keep its value, which holds the graph that holds it."""

    def __init__(self, running: Sequence[Any], training: bool, momentum: float, eps: float) -> None:
        self._running, self._training, self._momentum, self._eps = running, training, momentum, eps

    def value(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        """y; sets m and r."""
        m, variance = self._running
        y, *self._saved = torch.native_batch_norm(x, w, b, m, variance, self._training, self._momentum, self._eps)
        self._m, self._r = self._saved if self._training else (m, (variance + self._eps).rsqrt())
        self._n = x.numel() // x.shape[1]
        return y

    def _kernel(self, g: Tensor, x: Tensor, w: Tensor | None, of: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """r Pi(w g), sum(g x^), sum(g)."""
        return _aten.native_batch_norm_backward(
            g, x, w, *self._running, *self._saved, self._training, self._eps, list(of)
        )

    def adjoint(self, g: Tensor, x: Tensor, w: Tensor | None, of: Sequence[bool]) -> tuple[_Three, list[Tensor]]:
        """(gx, gw, gb), and what the derivatives need beside g, x and w."""
        gx, gw, gb = self._kernel(g, x, w, [of[0], True, True])
        return (gx, gw, gb), [gw / self._n, gb / self._n]

    def derivatives(self, at: Sequence[Any], held: list[Tensor], along: _Three, of: Sequence[bool]) -> _Three:
        """(dg, dx, dw) at (g, x, w), each where asked for; None is zero."""
        # Everything is a sum of g, x, w e and 1, each times one factor for a channel.
        (g, x, w), (cx, cw, cb), (of_g, of_x, of_w) = at, along, of
        r, (mean_gx, mean_g) = self._r, held
        dg, dx, dw = None, None, None
        of_x = of_x and (self._training or cw is not None)
        times_g = torch.zeros_like(r) if cw is None else cw * r
        times_x = torch.zeros_like(r)
        if cx is not None:
            rw = r if w is None else r * w
            dg, sum_cx, sum_c = self._kernel(cx, x, w, [of_g or of_x, True, True])
            product = self._products(cx, g) if of_x or of_w else torch.zeros_like(r)
            if self._training:
                product = product - sum_c * mean_g - sum_cx * mean_gx
                times_g = times_g - rw * r * sum_cx / self._n
                times_x = -rw * r * product / self._n
            dw = r * product if of_w else None
        if of_x and self._training:
            times_x = times_x - times_g * mean_gx
            dx = self._affine(x, times_x, -times_g * mean_g).addcmul_(g, _channels(times_g, g))
            dx = dx if dg is None else dx.addcmul_(dg, _channels(-r * mean_gx, g))
        elif of_x:
            dx = g * _channels(times_g, g)
        if of_g and (cw is not None or cb is not None):
            zero = torch.zeros_like(r)
            parameters = self._affine(x, zero if cw is None else cw, zero if cb is None else cb)
            dg = parameters if dg is None else dg.add_(parameters)
        return dg if of_g else None, dx, dw

    def _affine(self, x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
        """factor x^ + shift, in one pass."""
        slope = factor * self._r
        zero, one = torch.zeros_like(slope), torch.ones_like(slope)
        return torch.native_batch_norm(x, slope, shift - slope * self._m, zero, one, False, 0.0, 0.0)[0]

    def _products(self, a: Tensor, b: Tensor) -> Tensor:
        """sum(a b) of each channel, in one pass: the kernel's gradient of the factor for m = 0 and r = 1."""
        zero, one = torch.zeros_like(self._r), torch.ones_like(self._r)
        return _aten.native_batch_norm_backward(a, b, None, None, None, zero, one, True, 0.0, [False, True, False])[1]


def _channels(t: Tensor, like: Tensor) -> Tensor:
    return t.view([1, -1] + [1] * (like.dim() - 2))


def _batch_norm(  # noqa: PLR0917
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        F._verify_batch_size(input.size())  # pyrefly: ignore[missing-attribute]
    norm = _BatchNorm((running_mean, running_var), training, momentum, eps)
    return _Normalise.apply(input, weight, bias, norm)  # pyrefly: ignore


NORMS: dict[Callable[..., Any], Callable[..., Tensor]] = {F.batch_norm: _batch_norm}
"""torch's norms whose double backward costs, and what to call in their place."""
