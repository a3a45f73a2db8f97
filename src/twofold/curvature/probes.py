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


def check_square(operator: Any, num_matvecs: int) -> None:
    """Refuse what is no square matrix, and a number of probes that is no positive integer."""
    shape = tuple(getattr(operator, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1] or not hasattr(operator, "__matmul__"):
        raise TwofoldError(
            f"Expected an operator with .shape (P, P) and @; {type(operator).__name__} has shape {shape}."
        )
    check_count(num_matvecs)


def check_count(num_matvecs: int) -> None:
    """Refuse a number of probes that is no positive integer."""
    if isinstance(num_matvecs, bool) or not isinstance(num_matvecs, int) or num_matvecs < 1:
        raise TwofoldError(f"num_matvecs must be a positive integer; {num_matvecs!r} came.")


def private_generator(device: torch.device) -> torch.Generator:
    """A generator with a fixed seed: the same call gives the same numbers, and no global state moves."""
    return torch.Generator(device).manual_seed(0)


def rademacher(operator: Any, num_probes: int, generator: torch.Generator | None) -> Iterator[Float[Tensor, "P"]]:
    """Yield probes [P] with entries +-1, of the operator's dtype and device (float64 on the CPU if it has none)."""
    dtype, device = getattr(operator, "dtype", None), getattr(operator, "device", None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        dtype = torch.float64
    device = torch.device(device) if isinstance(device, torch.device) else torch.device("cpu")
    generator = private_generator(device) if generator is None else generator
    for _ in range(num_probes):
        signs = torch.randint(2, (operator.shape[1],), generator=generator, device=generator.device)
        yield signs.to(device, dtype).mul_(2).sub_(1)


def product_of(operator: Any, probe: Float[Tensor, "P"]) -> Tensor:
    """The operator times a probe, also where it speaks NumPy."""
    if isinstance(getattr(operator, "dtype", None), torch.dtype):
        return operator @ (probe if operator.dtype.is_floating_point else probe.to(operator.dtype))
    return torch.from_numpy(np.asarray(operator @ probe.cpu().numpy()))


def summarise(samples: Sequence[float]) -> Estimate:
    """Mean and standard error of independent samples, one a product."""
    stderr = stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Estimate(fmean(samples), stderr, len(samples))


def root_of(square: Estimate) -> Estimate:
    """The square root of an estimate, its error by the delta method."""
    value = math.sqrt(max(square.value, 0.0))
    return Estimate(value, square.stderr / (2 * value) if value > 0 else square.stderr, square.num_matvecs)
