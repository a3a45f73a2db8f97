"""Reductions and selections of entries."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twofold.curvature.jet_rules.entries import maximum
from twofold.curvature.jet_rules.jet import Jet, NotCarriedError, Rule, each, plus

_aten = torch.ops.aten


def variance(func: Callable, input: Jet, dim: Any = None, *args: Any, **kwargs: Any) -> Jet:
    """Var is quadratic: y1 = 2 cov(x, x1), y2 = 2 cov(x, x2) + 2 var(x1)."""
    if args or kwargs.keys() - {"correction", "unbiased", "keepdim"} or isinstance(dim, bool):
        raise NotCarriedError("var with these arguments")
    keepdim, unbiased = kwargs.get("keepdim", False), kwargs.get("unbiased", True)
    x0, x1, x2 = input
    z0 = func(x0, dim, *args, **kwargs)
    correction = kwargs.get("correction", int(unbiased))
    size = x0.numel() // max(1, z0.numel())
    factor = 2 * size / (size - correction)

    def centred(t: Tensor) -> Tensor:
        return t - t.mean(dim, keepdim=True)

    c = centred(x0)
    y1 = None if x1 is None else factor * (c * centred(x1)).mean(dim, keepdim=keepdim)
    y2 = None if x2 is None else factor * (c * centred(x2)).mean(dim, keepdim=keepdim)
    if x1 is not None:
        y2 = plus(factor * centred(x1).square().mean(dim, keepdim=keepdim), y2)
    return Jet(z0, y1, y2)


def vector_norm(func: Callable, input: Jet, p: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Jet:
    """n = ||x||: n1 = <x, x1> / n, n2 = (<x1, x1> + <x, x2> - n1^2) / n."""
    if "ord" in kwargs:
        p = kwargs.pop("ord")
    if (p not in (2, None, "fro")) or any(value is not None for value in kwargs.values()):
        raise NotCarriedError(f"{func.__name__} of order {p}")
    x0, x1, x2 = input
    dims = tuple(range(x0.dim())) if dim is None else dim

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims, keepdim=keepdim)

    n = torch.linalg.vector_norm(x0, 2, dim, keepdim)
    n1 = None if x1 is None else inner(x0, x1) / n
    n2 = None if x2 is None else inner(x0, x2)
    if x1 is not None and n1 is not None:
        n2 = plus(inner(x1, x1) - n1 * n1, n2)
    return Jet(n, n1, None if n2 is None else n2 / n)


def extremum(func: Callable, input: Jet, dim: int | None = None, keepdim: bool = False) -> Any:
    """max, min and the like along a dimension: the entries that win."""
    if dim is None or isinstance(dim, Jet | Tensor):
        if dim is not None:
            return maximum(func, input, dim)
        return _evenly(func, input, None, False)
    found = func(input.z0, dim, keepdim=keepdim)
    index = found.indices if keepdim else found.indices.unsqueeze(dim)

    def picked(t: Tensor) -> Tensor:
        return t.gather(dim, index) if keepdim else t.gather(dim, index).squeeze(dim)

    parts = (None if t is None else picked(t) for t in input[1:])
    return type(found)((Jet(picked(input.z0), *parts), found.indices))


def _evenly(func: Callable, x: Jet, dim: Any, keepdim: bool) -> Jet:
    z0 = func(x.z0) if dim is None else func(x.z0, dim, keepdim)
    dims = tuple(range(x.z0.dim())) if dim is None else dim
    wins = (x.z0 == (z0 if dim is None else func(x.z0, dim, True))).to(x.z0.dtype)
    share = wins / wins.sum(dims, keepdim=True)
    return Jet(z0, *(None if t is None else (t * share).sum(dims, keepdim=keepdim) for t in x[1:]))


def amax(func: Callable, input: Jet, dim: Any = (), keepdim: bool = False) -> Jet:
    """The greatest or smallest entries, equal ones alike."""
    whole = dim in ((), [])
    return _evenly(func, input, tuple(range(input.z0.dim())) if whole else dim, keepdim)


def ordered(func: Callable, input: Jet, *args: Any, **kwargs: Any) -> Any:
    """sort and topk: entries in another order."""
    found = func(input.z0, *args, **kwargs)
    dim = next((value for value in args[func.__name__ == "topk" :] if not isinstance(value, bool)), -1)
    dim = kwargs.get("dim", dim)
    parts = (None if t is None else t.gather(dim, found.indices) for t in input[1:])
    return type(found)((Jet(found.values, *parts), found.indices))


def pooled(pool: Callable, num_dims: int) -> Rule:
    """Max pooling, by the indices that `pool` returns."""

    def rule(func: Callable, input: Jet, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        _, index = pool(input.z0, *args, **kwargs)

        def picked(t: Tensor) -> Tensor:
            return t.flatten(-num_dims).gather(-1, index.flatten(-num_dims)).view(index.shape)

        jet = each(picked, input)
        return (jet, index) if return_indices or "with_indices" in func.__name__ else jet

    return rule
