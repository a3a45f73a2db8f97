"""Softmax and the normalisation layers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.curvature.jet_rules.entries import of_entries
from twofold.curvature.jet_rules.jet import Jet, NotCarriedError, each, like, parts, plus, times
from twofold.curvature.jet_rules.linear import add, linear_in_first
from twofold.curvature.jet_rules.products import multilinear


def softmax(func: Callable, input: Jet, dim: int | None = None, *args: Any, **kwargs: Any) -> Jet:
    """With s the softmax of x: s1 = S x1, s2 = S (x2 + d^2), with d = x1 - <s, x1> and S t = s (t - <s, t>)."""
    if dim is None:
        raise NotCarriedError("softmax without dim")
    x0, x1, x2 = input
    s = func(x0, dim, *args, **kwargs)

    def through(t: Tensor) -> Tensor:
        return s * (t - (s * t).sum(dim, keepdim=True))

    s1, bent = None, x2
    if x1 is not None:
        d = x1 - (s * x1).sum(dim, keepdim=True)
        s1, bent = s * d, plus(d * d, x2)
    return Jet(s, s1, None if bent is None else through(bent))


def log_softmax(func: Callable, input: Jet, dim: int | None = None, *args: Any, **kwargs: Any) -> Jet:
    """l = x - log sum exp x: l1 = d = x1 - <s, x1>, l2 = x2 - <s, x2 + d^2>."""
    if dim is None:
        raise NotCarriedError("log_softmax without dim")
    x0, x1, x2 = input
    log_s = func(x0, dim, *args, **kwargs)
    s = log_s.exp()
    d = None if x1 is None else x1 - (s * x1).sum(dim, keepdim=True)
    bent = plus(None if d is None else d * d, x2)
    l2 = (
        None
        if bent is None
        else -(s * bent).sum(dim, keepdim=True)
        if x2 is None
        else x2 - (s * bent).sum(dim, keepdim=True)
    )
    return Jet(log_s, d, like(log_s, l2))


def logsumexp(func: Callable, input: Jet, dim: Any, keepdim: bool = False) -> Jet:
    """The log of the sum of exponentials."""
    x0, x1, x2 = input
    y = torch.logsumexp(x0, dim, keepdim=True)
    s = (x0 - y).exp()
    mean = None if x1 is None else (s * x1).sum(dim, keepdim=True)
    bent = plus(None if x1 is None or mean is None else (x1 - mean).square(), x2)
    y2 = None if bent is None else (s * bent).sum(dim, keepdim=True)
    return each(lambda t: t if keepdim else t.squeeze(dim), Jet(y, mean, y2))


def layer_norm(  # noqa: PLR0917
    func: Callable,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Jet:
    """Standardised over the last dimensions."""
    shape = tuple(normalized_shape)
    x = _wide(input)
    y = _affine(_standardise(x, tuple(range(-len(shape), 0)), eps), weight, bias, shape)
    return _cast_as(lambda: F.layer_norm(parts(input)[0], shape), input, y)


def rms_norm(
    func: Callable, input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Jet:
    """x / sqrt(<x^2> + eps)."""
    shape = tuple(normalized_shape)
    x = _wide(input)
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(parts(input)[0].dtype).eps if eps is None else eps

    square = linear_in_first(torch.mean, multilinear(torch.mul, x, x), dims, keepdim=True)
    r = of_entries(torch.rsqrt, add(torch.add, square, eps))
    return _cast_as(
        lambda: F.rms_norm(parts(input)[0], shape), input, _affine(multilinear(torch.mul, x, r), weight, None, shape)
    )


def group_norm(  # noqa: PLR0917
    func: Callable, input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Jet:
    """Standardised over groups of channels."""
    x = _wide(input)
    rows = _reshaped(x, (x.z0.shape[0], num_groups, -1))
    y = _affine(_reshaped(_standardise(rows, (-1,), eps), x.z0.shape), weight, bias, _channels(x))
    return _cast_as(lambda: F.group_norm(parts(input)[0], num_groups), input, y)


def batch_norm(  # noqa: PLR0917
    func: Callable,
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Jet:
    """Standardised over all but the channels; running statistics move as they do natively."""
    x = _wide(input)
    if training:
        if running_mean is not None:
            with torch.no_grad():
                F.batch_norm(x.z0, running_mean, running_var, None, None, True, momentum, eps)
        y = _standardise(x, tuple(axis for axis in range(x.z0.dim()) if axis != 1), eps)
    else:
        y = _by_statistics(x, running_mean, running_var, eps)
    x0 = parts(input)[0]
    return _cast_as(lambda: F.batch_norm(x0, None, None, training=True), input, _affine(y, weight, bias, _channels(x)))


def instance_norm(  # noqa: PLR0917
    func: Callable,
    input: Any,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Jet:
    """Standardised over the positions of each channel."""
    x = _wide(input)
    if use_input_stats:
        if running_mean is not None:
            with torch.no_grad():
                F.instance_norm(x.z0, running_mean, running_var, None, None, True, momentum, eps)
        y = _standardise(x, tuple(range(2, x.z0.dim())), eps)
    else:
        y = _by_statistics(x, running_mean, running_var, eps)
    return _cast_as(lambda: F.instance_norm(parts(input)[0]), input, _affine(y, weight, bias, _channels(x)))


def _standardise(x: Jet, dims: tuple[int, ...], eps: float) -> Jet:
    """y = (x - mean x) / sqrt(var x + eps): y1 = Y x1, y2 = Y x2 - 2 m y1 - y (<y1^2> + eps r^2 m^2).

    With r = 1 / sqrt(var x + eps), m = r <y x1> and Y t = r (t - <t>) - y r <y t>, which is symmetric.
    """
    x0, x1, x2 = x
    centred = x0 - x0.mean(dims, keepdim=True)
    r = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    y = centred * r

    def through(t: Tensor) -> tuple[Tensor, Tensor]:
        m = (y * t).mean(dims, keepdim=True) * r
        return r * (t - t.mean(dims, keepdim=True)) - y * m, m

    y1 = None
    y2 = None if x2 is None else through(x2)[0]
    if x1 is not None:
        y1, m = through(x1)
        spread = (y1 * y1).mean(dims, keepdim=True) + eps * (r * m).square()
        y2 = plus(-2 * m * y1 - y * spread, y2)
    return Jet(y, y1, y2)


def _by_statistics(x: Jet, mean: Any, var: Any, eps: float) -> Jet:
    r = torch.rsqrt(var + eps).view(_channels(x))
    return Jet((x.z0 - mean.view(_channels(x))) * r, times(x.z1, r), times(x.z2, r))


def _affine(x: Any, weight: Any, bias: Any, shape: Sequence[int]) -> Jet:
    if weight is not None:
        x = multilinear(torch.mul, x, _reshaped(weight, shape))
    return x if bias is None else add(torch.add, x, _reshaped(bias, shape))


def _reshaped(x: Any, shape: Sequence[int]) -> Jet:
    return each(lambda t: t.reshape(shape), x)


def _channels(x: Jet) -> list[int]:
    return [1, -1] + [1] * (x.z0.dim() - 2)


def _wide(x: Any) -> Jet:
    """At least in float32, as the native norms compute."""
    dtype = torch.promote_types(parts(x)[0].dtype, torch.float32)
    return each(lambda t: t.to(dtype), x)


def _cast_as(native: Callable[[], Tensor], given: Any, y: Jet) -> Jet:
    """The result in the type that the native norm gives; it has to be asked only in half precision."""
    x0 = parts(given)[0]
    if x0.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x0.device.type):
        return y
    with torch.no_grad():
        dtype = native().dtype
    return each(lambda t: t.to(dtype), y)
