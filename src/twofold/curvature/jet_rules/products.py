"""Operations that are linear in each of several tensors, and division."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.curvature.jet_rules.jet import Jet, NotCarriedError, Rule, each, filled, leaves, like, parts, plus
from twofold.curvature.jet_rules.linear import add


def multilinear(func: Callable, *args: Any, **kwargs: Any) -> Jet:
    """An operation that is linear in each of its tensors."""
    values = (leaf.z0 for leaf in leaves((args, kwargs)) if isinstance(leaf, Jet))
    return Jet(func(*filled(args, values), **filled(kwargs, values)), *_tangents(func, *args, **kwargs))


def _tangents(func: Callable, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    """y1 = sum_i f(.., x1_i, ..), y2 = sum_i f(.., x2_i, ..) + 2 sum_{i<j} f(.., x1_i, .., x1_j, ..)."""
    jets: list[Jet] = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Jet)]

    def at(orders: dict[int, int]) -> Tensor | None:
        parts = [jet[orders.get(i, 0)] for i, jet in enumerate(jets)]
        if any(part is None for part in parts):
            return None
        given = iter(parts)
        return func(*filled(args, given), **filled(kwargs, given))

    y1 = y2 = None
    for i in range(len(jets)):
        y1 = plus(y1, at({i: 1}))
        y2 = plus(y2, at({i: 2}))
        for j in range(i):
            y2 = plus(y2, at({i: 1, j: 1}), 2)
    return y1, y2


def layer(func: Callable, input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Jet:
    """A linear map or a convolution with its bias."""
    b0, *biases = parts(bias)
    z0 = func(parts(input)[0], parts(weight)[0], b0, *args, **kwargs)
    tangents = _tangents(lambda x, w: func(x, w, None, *args, **kwargs), input, weight)
    shape = [-1] + [1] * (0 if func is F.linear else parts(weight)[0].dim() - 2)
    z1, z2 = (plus(z, None if b is None else b.view(shape)) for z, b in zip(tangents, biases, strict=True))
    return Jet(z0, like(z0, z1), like(z0, z2))


def bilinear(func: Callable, input1: Any, input2: Any, weight: Any, bias: Any = None) -> Jet:
    """x1' W x2 + b."""
    product = multilinear(func, input1, input2, weight)
    return product if bias is None else add(torch.add, product, bias)


def added_product(product: Callable) -> Rule:
    """beta input + alpha product(a, b), as addmm and its like."""

    def rule(func: Callable, input: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Jet:
        ab = multilinear(product, a, b) if isinstance(a, Jet) or isinstance(b, Jet) else product(a, b)
        return add(torch.add, _scaled(ab, alpha), _scaled(input, beta))

    return rule


def _scaled(x: Any, factor: float) -> Any:
    if factor == 1:
        return x
    return each(lambda t: t * factor, x) if isinstance(x, Jet) else x * factor


def divide(func: Callable, input: Any, other: Any, *, rounding_mode: None = None) -> Jet:
    """q = a / b: q1 = (a1 - q b1) / b, q2 = (a2 - 2 q1 b1 - q b2) / b."""
    if rounding_mode is not None:
        raise NotCarriedError("div with rounding")
    (a0, a1, a2), (b0, b1, b2) = parts(input), parts(other)
    q = a0 / b0
    if b1 is None and b2 is None:
        return Jet(q, *(like(q, None if a is None else a / b0) for a in (a1, a2)))
    q1 = plus(None if b1 is None else q * b1 * -1, a1)
    q1 = None if q1 is None else q1 / b0
    q2 = plus(None if b2 is None else q * b2 * -1, a2)
    if q1 is not None and b1 is not None:
        q2 = plus(q1 * b1 * -2, q2)
    return Jet(q, q1, None if q2 is None else q2 / b0)


def divide_swapped(func: Callable, input: Jet, other: Any) -> Jet:
    """other / input."""
    return divide(func, other, input)
