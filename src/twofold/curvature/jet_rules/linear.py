"""Operations without a second derivative: y_i = f(x_i)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twofold.curvature.jet_rules.jet import Jet, NotCarriedError, Rule, each, leaves, like, parts, times


def linear_in_first(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """y_i = f(x_i), for an operation that is linear in its first argument, whose others say how."""
    if not args:
        name = "self" if "self" in kwargs else "input"
        args, kwargs = (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}
    x, *rest = args
    if any(isinstance(other, Jet) for other in leaves((rest, kwargs))):
        if not func.__name__.endswith(("_as", "to")):
            raise NotCarriedError(func.__name__)
        rest = [other.z0 if isinstance(other, Jet) else other for other in rest]
    return _rejoined([None if part is None else func(part, *rest, **kwargs) for part in x])


def linear_in_all(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """y_i = f(a_i, b_i, ...), for an operation that is linear in all its real tensors together."""

    def part(value: Any, i: int) -> Any:
        if isinstance(value, Jet):
            return value.z0 if i == 0 else torch.zeros_like(value.z0) if value[i] is None else value[i]
        if isinstance(value, list | tuple):
            return type(value)(part(one, i) for one in value)
        real = isinstance(value, Tensor) and value.is_floating_point()
        return torch.zeros_like(value) if real and i else value

    jets = [jet for jet in leaves((args, kwargs)) if isinstance(jet, Jet)]
    orders = [0, *(i for i in (1, 2) if any(jet[i] is not None for jet in jets))]
    found = {i: func(*part(args, i), **{key: part(value, i) for key, value in kwargs.items()}) for i in orders}
    return _rejoined([found.get(i) for i in range(3)])


def _rejoined(outputs: Sequence[Any]) -> Any:
    """One jet for each result of an operation, from its results for z0, z1 and z2 (None: zero)."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return Jet(*outputs)
    if not isinstance(first, list | tuple):
        return first
    _, second, third = outputs
    return tuple(
        Jet(z0, None if second is None else second[i], None if third is None else third[i])
        for i, z0 in enumerate(first)
    )


def _sum(sign: float) -> Rule:
    def rule(func: Callable, input: Any, other: Any, *, alpha: float = 1) -> Jet:
        (a0, a1, a2), (b0, b1, b2) = parts(input), parts(other)
        z0 = func(a0, b0) if alpha == 1 else func(a0, b0, alpha=alpha)

        def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            if a is not None and b is not None:
                return torch.add(a, b, alpha=sign * alpha)
            return like(z0, a if b is None else b if sign * alpha == 1 else b * (sign * alpha))

        return Jet(z0, plus(a1, b1), plus(a2, b2))

    return rule


add, subtract = _sum(1), _sum(-1)
"""input + alpha other and input - alpha other."""


def subtract_swapped(func: Callable, input: Any, other: Any, *, alpha: float = 1) -> Jet:
    """other - alpha input."""
    return subtract(lambda a, b, **factor: func(b, a, **factor), other, input, alpha=alpha)


def where(func: Callable, condition: Tensor, input: Any, other: Any) -> Jet:
    """Pick from two jets."""
    if isinstance(condition, Jet) or condition.dtype != torch.bool:  # the method: input.where(condition, other)
        condition, input = input, condition
    (a0, a1, a2), (b0, b1, b2) = parts(input), parts(other)
    z0 = torch.where(condition, a0, b0)

    def pick(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None and b is None:
            return None
        return torch.where(condition, 0.0 if a is None else a, 0.0 if b is None else b)

    return Jet(z0, pick(a1, b1), pick(a2, b2))


def masked_fill(func: Callable, input: Any, mask: Tensor, value: Any) -> Jet:
    """Put a value in the place of some entries."""
    if isinstance(value, Jet) or not isinstance(input, Jet):
        return where(func, mask, value, input)
    x0, x1, x2 = input
    z0 = x0.masked_fill(mask, value)
    return Jet(z0, *(None if part is None else part.masked_fill(mask, 0) for part in (x1, x2)))


def set_item(func: Callable, input: Any, index: Any, value: Any) -> Jet:
    """x[index] = value, out of place."""
    (x0, *xs), (v0, *vs) = parts(input), parts(value)

    def put(x: Tensor, v: Any) -> Tensor:
        x = x.clone()
        x[index] = v
        return x

    others = (
        None if x is None and v is None else put(torch.zeros_like(x0) if x is None else x, 0.0 if v is None else v)
        for x, v in zip(xs, vs, strict=True)
    )
    return Jet(put(x0, v0), *others)


def copied(func: Callable, input: Any, src: Any, non_blocking: bool = False) -> Jet:
    """x.copy_(src)."""
    x0 = parts(input)[0]
    return each(lambda t: t.to(x0).expand_as(x0), src)


def filled_with(func: Callable, input: Any, value: float = 0.0) -> Jet:
    """x.fill_(value), x.zero_()."""
    return Jet(torch.full_like(parts(input)[0], value), None, None)


def pad(func: Callable, input: Jet, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Jet:
    """Padding; the constant belongs to z0 alone."""
    x0, *others = input
    return Jet(func(x0, pad, mode, value), *(None if part is None else func(part, pad, mode) for part in others))


def dropout(func: Callable, input: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Jet:
    """The mask that torch draws, by what it does to ones."""
    if not training or p == 0:
        return input
    mask = func(torch.ones_like(input.z0), p, True)
    return each(lambda t: t * mask, input)


def embedding(  # noqa: PLR0917
    func: Callable,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Jet:
    """Rows of the weight; the row at padding_idx is a constant."""
    if func is torch.embedding or max_norm is not None or scale_grad_by_freq:
        raise NotCarriedError("an embedding whose gradient is not its derivative")
    w0, *tangents = weight
    rows = [None if w is None else F.embedding(input, w) for w in tangents]
    if padding_idx is not None:
        kept = (input != padding_idx % len(w0)).unsqueeze(-1)
        rows = [times(part, kept) for part in rows]
    return Jet(F.embedding(input, w0), *rows)
