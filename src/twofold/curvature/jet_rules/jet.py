"""A jet, z0 + e z1 + e^2/2 z2, and what all rules share."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


class NotCarriedError(Exception):
    """A jet met something that it cannot be carried through; says what."""


class Jet(NamedTuple):
    """z0 + e z1 + e^2/2 z2; None is zero."""

    z0: Tensor
    z1: Tensor | None
    z2: Tensor | None


Rule: TypeAlias = Callable[..., Any]
"""rule(func, *args, **kwargs), with jets among the arguments and as results."""


def parts(x: Any) -> tuple[Any, Tensor | None, Tensor | None]:
    """(x0, x1, x2) of a jet or a constant."""
    return x if isinstance(x, Jet) else (x, None, None)


def each(f: Callable[[Tensor], Tensor], x: Any) -> Jet:
    """A linear function of a jet, or of a constant."""
    x0, x1, x2 = parts(x)
    return Jet(f(x0), None if x1 is None else f(x1), None if x2 is None else f(x2))


def plus(a: Tensor | None, b: Tensor | None, factor: float = 1) -> Tensor | None:
    """a + factor b; a has just been made here and may be overwritten."""
    if b is None:
        return a
    if a is None:
        return b if factor == 1 else b * factor
    if torch.is_grad_enabled() or a.shape != b.shape or a.dtype != b.dtype:
        return torch.add(a, b, alpha=factor)
    return a.add_(b, alpha=factor)


def times(a: Tensor | None, b: Any) -> Tensor | None:
    """A part times a constant."""
    return None if a is None else a * b


def like(z: Tensor, part: Tensor | None) -> Tensor | None:
    """A part that an operation broadcasts, in the shape of the result."""
    return part if part is None or part.shape == z.shape else part.expand(z.shape)


def leaves(value: Any) -> Iterable[Any]:
    """Yield what the arguments of a call hold, jets whole."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple) and not isinstance(value, Jet):
        for one in value:
            yield from leaves(one)
    else:
        yield value


def filled(value: Any, parts: Iterator[Any]) -> Any:
    """Put the next of the parts in the place of each jet."""
    if isinstance(value, Jet):
        return next(parts)
    if isinstance(value, dict):
        return {key: filled(one, parts) for key, one in value.items()}
    return type(value)(filled(one, parts) for one in value) if isinstance(value, list | tuple) else value
