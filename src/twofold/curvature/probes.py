"""Random probes, and what their samples say: shared by every stochastic estimator."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.types import Estimate


def check_square(operator: Any) -> None:
    """Refuse what is no square real matrix."""
    shape = tuple(getattr(operator, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1] or not hasattr(operator, "__matmul__"):
        raise TwofoldError(
            f"Expected an operator with .shape (P, P) and @; {type(operator).__name__} has shape {shape}."
        )
    dtype = getattr(operator, "dtype", None)
    if (isinstance(dtype, torch.dtype) and dtype.is_complex) or (isinstance(dtype, np.dtype) and dtype.kind == "c"):
        raise TwofoldError(f"Expected a real operator; {type(operator).__name__} has dtype {dtype}.")


def check_count(count: int, name: str = "num_matvecs", *, at_least: int = 1) -> None:
    """Refuse a count that is no integer, or too small."""
    if isinstance(count, bool) or not isinstance(count, int) or count < at_least:
        wanted = "a positive integer" if at_least == 1 else f"an integer of at least {at_least}"
        raise TwofoldError(f"{name} must be {wanted}; {count!r} came.")


def private_generator(device: torch.device) -> torch.Generator:
    """A generator with a fixed seed: the same call gives the same numbers, and no global state moves."""
    return torch.Generator(device).manual_seed(0)


def generator_for(device: torch.device, generator: torch.Generator | None) -> torch.Generator:
    """The caller's generator, or a private one."""
    return private_generator(device) if generator is None else generator


def vectors_of(operator: Any) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of the vectors that an operator is asked about: its own, in float32 at least.

    float64 on the CPU if it has none, or is of integers.
    """
    dtype, device = getattr(operator, "dtype", None), getattr(operator, "device", None)
    if isinstance(dtype, np.dtype) and dtype.kind == "f" and dtype.itemsize <= 4:
        dtype = torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        dtype = torch.float64
    device = torch.device(device) if isinstance(device, torch.device) else torch.device("cpu")
    return torch.promote_types(dtype, torch.float32), device


def rademacher(operator: Any, num_probes: int, generator: torch.Generator | None) -> Iterator[Float[Tensor, "P"]]:
    """Yield probes [P] with entries +-1."""
    dtype, device = vectors_of(operator)
    generator = generator_for(device, generator)
    for _ in range(num_probes):
        signs = torch.randint(2, (operator.shape[1],), generator=generator, device=generator.device)
        yield signs.to(device, dtype).mul_(2).sub_(1)


def product_of(operator: Any, vectors: Float[Tensor, "P *K"]) -> Tensor:
    """The operator times vectors [P] or [P, K], also where it is of integers or half precision or speaks NumPy."""
    dtype = getattr(operator, "dtype", None)
    if not isinstance(dtype, torch.dtype):
        return torch.from_numpy(np.asarray(operator @ vectors.cpu().numpy()))
    if dtype.is_floating_point:
        return operator @ vectors.to(dtype)
    return operator.to(vectors.dtype) @ vectors


def summarise(samples: Sequence[float]) -> Estimate:
    """Mean and standard error of independent samples, one a product."""
    stderr = stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Estimate(fmean(samples), stderr, len(samples))


def root_of(square: Estimate) -> Estimate:
    """The square root of an estimate, its error by the delta method."""
    value = math.sqrt(max(square.value, 0.0))
    return Estimate(value, square.stderr / (2 * value) if value > 0 else square.stderr, square.num_matvecs)


def cosine_of(dots: Sequence[float], first: Sequence[float], second: Sequence[float]) -> Estimate:
    """E a'b / sqrt(E ||a||^2 E ||b||^2) from samples of the three, its error by the delta method."""
    a, b, c = fmean(dots), fmean(first), fmean(second)
    if b == 0 or c == 0:
        return Estimate(math.nan, math.nan, len(dots))
    cosine = a / math.sqrt(b * c)
    influence = [
        x / math.sqrt(b * c) - cosine / 2 * (y / b + z / c) for x, y, z in zip(dots, first, second, strict=True)
    ]
    return Estimate(cosine, summarise(influence).stderr, len(dots))
