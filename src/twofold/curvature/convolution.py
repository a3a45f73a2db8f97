"""A convolution whose double backward computes only what is asked for.

torch's own double backward of a convolution computes every output whatever is needed: J v then costs four forward
passes in place of two. Values and gradients are those of torch's kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twofold.curvature.asked import asked

_aten = torch.ops.aten


@dataclass(frozen=True)
class _Geometry:
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def __call__(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution, bilinear in x and w."""
        return _aten.convolution(
            x, w, bias, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    def adjoints(self, g: Tensor, x: Tensor, w: Tensor, *, of_x: bool, of_w: bool) -> tuple[Tensor, Tensor]:
        """The gradients of <g, convolution(x, w)> in x and in w, each where asked for."""
        gx, gw, _ = _aten.convolution_backward(
            g,
            x,
            w,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            [of_x, of_w, False],
        )
        return gx, gw


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return geometry(x, w, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, w = ctx.saved_tensors
        of_x, of_w, of_bias = asked(ctx, 3)
        gx, gw = None, None
        if of_x or of_w:
            gx, gw = _Adjoints.apply(g, x, w, ctx.geometry, of_x, of_w)  # pyrefly: ignore
        others = [axis for axis in range(g.dim()) if axis != 1]
        return gx, gw, g.sum(others) if of_bias else None, None


class _Adjoints(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, of_x: bool, of_w: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(g, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return geometry.adjoints(g, x, w, of_x=of_x, of_w=of_w)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, cx: Tensor | None, cw: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, w = ctx.saved_tensors
        of_g, of_x, of_w = asked(ctx, 3)
        geometry, dg = ctx.geometry, None
        if of_g and cx is not None:
            dg = geometry(cx, w)
        if of_g and cw is not None:
            from_w = geometry(x, cw)
            dg = from_w if dg is None else dg + from_w
        dx = geometry.adjoints(g, x, cw, of_x=True, of_w=False)[0] if of_x and cw is not None else None
        dw = geometry.adjoints(g, cx, w, of_x=False, of_w=True)[1] if of_w and cx is not None else None
        return dg, dx, dw, None, None, None


def _convolve(num_dims: int, transposed: bool, native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def conv(  # noqa: PLR0917
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if isinstance(padding, str) or input.dim() != num_dims + 2 or not input.is_floating_point():
            return native(input, weight, bias, stride, padding, dilation, groups)
        strides, paddings, dilations = (_entries(value, num_dims) for value in (stride, padding, dilation))
        geometry = _Geometry(strides, paddings, dilations, False, [0] * num_dims, groups)
        return _Convolution.apply(input, weight, bias, geometry)  # pyrefly: ignore

    def conv_transpose(  # noqa: PLR0917
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        if input.dim() != num_dims + 2 or not input.is_floating_point():
            return native(input, weight, bias, stride, padding, output_padding, groups, dilation)
        strides, paddings, dilations = (_entries(value, num_dims) for value in (stride, padding, dilation))
        geometry = _Geometry(strides, paddings, dilations, True, _entries(output_padding, num_dims), groups)
        return _Convolution.apply(input, weight, bias, geometry)  # pyrefly: ignore

    return conv_transpose if transposed else conv


def _entries(value: Any, num_dims: int) -> list[int]:
    return [value] * num_dims if isinstance(value, int) else list(value) * (num_dims if len(value) == 1 else 1)


CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    native: _convolve(num_dims, transposed, native)
    for transposed, natives in (
        (False, (torch.conv1d, torch.conv2d, torch.conv3d)),
        (True, (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)),
    )
    for num_dims, native in enumerate(natives, start=1)
}
"""torch's convolutions, and what to call in their place."""
