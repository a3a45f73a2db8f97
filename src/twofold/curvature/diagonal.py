"""The diagonal of anything with .shape and @, with its standard errors."""

import math
from typing import Any

import torch

from twofold.curvature.differentiable import full_precision
from twofold.curvature.linear_map import LinearMap
from twofold.curvature.probes import check_count, rademacher
from twofold.types import DiagonalEstimate


@full_precision()
def diagonal(operator: Any, num_matvecs: int = 64, *, generator: torch.Generator | None = None) -> DiagonalEstimate:
    """Estimate diag A = E v * (A v), entry by entry, with Rademacher probes v.

    The estimate is unbiased; entry i has variance (sum_{j != i} A_ij^2) / num_matvecs, so it is exact for a diagonal
    matrix.

    Args:
        operator: anything with .shape (P, P) and @.
        num_matvecs: the number of probes.
        generator: source of the probes; None takes a private one with a fixed seed (same call, same numbers).

    Returns:
        DiagonalEstimate(value [P], stderr [P], num_matvecs), in the dtype of the operator's vectors and on its device;
        stderr is nan with a single probe.

    Raises:
        TwofoldError: the operator is not square, or num_matvecs is not positive.

    Example:
        >>> diagonal(torch.diag(torch.tensor([3.0, -1.0])), num_matvecs=4).value
        tensor([ 3., -1.])

    Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix", Appl. Numer. Math. 57.
    """
    matrix = LinearMap(operator)
    check_count(num_matvecs)
    mean = squares = torch.zeros(())
    for count, probe in enumerate(rademacher(matrix, num_matvecs, generator), start=1):
        sample = probe * (matrix @ probe)
        if count == 1:
            mean, squares = sample, torch.zeros_like(sample)
            continue
        # Welford's update: a sum of squares would lose the spread where the mean is large.
        change = sample - mean
        mean = mean + change / count
        squares += change * (sample - mean)
    variance = squares / (num_matvecs - 1) if num_matvecs > 1 else torch.full_like(mean, math.nan)
    return DiagonalEstimate(mean, (variance / num_matvecs).sqrt(), num_matvecs)
