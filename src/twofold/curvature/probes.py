"""Random probes, and what their samples say: shared by every stochastic estimator."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from statistics import fmean, stdev
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from twofold.distributed import same_generator
from twofold.errors import SAMPLE_NOT_FINITE, NotFiniteError, TwofoldError, TwofoldWarning
from twofold.types import Estimate

FEWEST = 10
"""Samples before a standard error is believed: fewer are too often alike by chance."""


def check_count(count: int, name: str = "num_matvecs", *, at_least: int = 1) -> None:
    """Refuse a count that is no integer, or too small."""
    if isinstance(count, bool) or not isinstance(count, int) or count < at_least:
        wanted = "a positive integer" if at_least == 1 else f"an integer of at least {at_least}"
        raise TwofoldError(f"{name} must be {wanted}; {count!r} came.")


def private_generator(device: torch.device) -> torch.Generator:
    """A generator with a fixed seed: the same call gives the same numbers, and no global state moves."""
    return torch.Generator(device).manual_seed(0)


def generator_for(operator: Any, generator: torch.Generator | None) -> torch.Generator:
    """The caller's generator, or a private one; in the state that the first of an operator's ranks gives it."""
    same_generator(generator, getattr(operator, "group", None))
    return private_generator(operator.device) if generator is None else generator


def signs(count: int, generator: torch.Generator) -> Int8[Tensor, "count"]:
    """Draw signs +-1 on the generator's device, one from each byte of what it draws."""
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=generator.device).random_(generator=generator)
    return words.view(torch.int8)[:count].bitwise_and_(1).mul_(2).sub_(1)


def rademacher(operator: Any, num_probes: int, generator: torch.Generator | None) -> Iterator[Float[Tensor, "P"]]:
    """Yield probes [P] with entries +-1, in float32 at least."""
    dtype = torch.promote_types(operator.dtype, torch.float32)
    generator = generator_for(operator, generator)
    for _ in range(num_probes):
        yield signs(operator.shape[1], generator).to(operator.device, dtype)


def summarise(samples: Sequence[float]) -> Estimate:
    """Mean and standard error of independent samples, one a product.

    Raises:
        NotFiniteError: a sample is NaN or infinite.
    """
    bad = next((sample for sample in samples if not math.isfinite(sample)), None)
    if bad is not None:
        raise NotFiniteError(SAMPLE_NOT_FINITE.format(came=bad))
    stderr = stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Estimate(fmean(samples), stderr, len(samples))


def check_atol(atol: float | None) -> None:
    """Refuse a standard error that cannot be reached or is no number."""
    if atol is not None and (isinstance(atol, bool) or not isinstance(atol, Real) or not 0 < float(atol) < math.inf):
        raise TwofoldError(f"atol must be a positive standard error, or None; {atol!r} came.")


def precise(estimates: Iterable[Estimate], atol: float) -> bool:
    """Tell whether all standard errors are atol at most, and from enough samples to be believed."""
    return all(estimate.num_matvecs >= FEWEST and estimate.stderr <= atol for estimate in estimates)


def warn_imprecise(what: str, worst: float, num_matvecs: int, atol: float | None) -> None:
    """Say that the most probes were not enough, and about how many would be."""
    if atol is None or worst <= atol:
        return
    needed = "more"
    if math.isfinite(worst):
        needed = f"about {math.ceil(num_matvecs * (worst / atol) ** 2)}"
    warnings.warn(
        TwofoldWarning(
            f"{what}: the standard error is {worst:.2g} after {num_matvecs} products, not {atol:.2g} as asked for by "
            f"atol. Raise num_matvecs: {needed} would do."
        ),
        stacklevel=4,
    )


def root_of(square: Estimate) -> Estimate:
    """The square root of an estimate, its error by the delta method."""
    value = math.sqrt(max(square.value, 0.0))
    return Estimate(value, square.stderr / (2 * value) if value > 0 else square.stderr, square.num_matvecs)


def cosine_of(dots: Sequence[float], first: Sequence[float], second: Sequence[float]) -> Estimate:
    """E a'b / sqrt(E ||a||^2 E ||b||^2) from samples of the three, its error by the delta method."""
    a, b, c = fmean(dots), fmean(first), fmean(second)
    if b == 0 or c == 0:
        return Estimate(math.nan, math.nan, len(dots))
    size = math.sqrt(b) * math.sqrt(c)  # b c may leave the range of float64
    cosine = a / size
    influence = [x / size - cosine / 2 * (y / b + z / c) for x, y, z in zip(dots, first, second, strict=True)]
    return Estimate(cosine, summarise(influence).stderr, len(dots))
