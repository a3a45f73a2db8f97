"""The diagonal of anything with .shape and @, with its standard errors."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.curvature.differentiable import full_precision
from twofold.curvature.linear_map import LinearMap
from twofold.curvature.probes import FEWEST, check_atol, check_count, rademacher, warn_imprecise
from twofold.types import DiagonalEstimate


@full_precision()
def diagonal(
    operator: Any, num_matvecs: int = 64, *, atol: float | None = None, generator: torch.Generator | None = None
) -> DiagonalEstimate:
    """Estimate diag A = E v * (A v), entry by entry, with Rademacher probes v.

    The estimate is unbiased; entry i has variance (sum_{j != i} A_ij^2) / num_matvecs, so it is exact for a diagonal
    matrix.

    Args:
        operator: anything with .shape (P, P) and @.
        num_matvecs: the number of probes.
        atol: stop as soon as every entry's standard error is this at most, in the entries' own units, after 10 probes
            at least; num_matvecs is then the most.
        generator: source of the probes; None takes a private one with a fixed seed (same call, same numbers).

    Returns:
        DiagonalEstimate(value [P], stderr [P], num_matvecs), in the dtype of the operator's vectors and on its device;
        stderr is nan with a single probe.

    Raises:
        TwofoldError: the operator is not square, or num_matvecs or atol is not positive.

    Warns:
        TwofoldWarning: a standard error did not come down to atol.

    Example:
        >>> diagonal(torch.diag(torch.tensor([3.0, -1.0])), num_matvecs=4).value
        tensor([ 3., -1.])

    Source: Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix", Appl. Numer. Math. 57.
    """
    matrix = LinearMap(operator)
    check_count(num_matvecs)
    check_atol(atol)
    mean = torch.zeros(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    squares, count = torch.zeros_like(mean), 0
    for count, probe in enumerate(rademacher(matrix, num_matvecs, generator), start=1):
        sample = probe * (matrix @ probe)
        # Welford's update: a sum of squares would lose the spread where the mean is large.
        change = sample - mean
        mean = mean + change / count
        squares += change * (sample - mean)
        if atol is not None and count >= FEWEST and _standard_error(squares, count).max() <= atol:
            break
    stderr = _standard_error(squares, count)
    warn_imprecise("diagonal", stderr.max().item(), count, atol)
    return DiagonalEstimate(mean, stderr, count)


def _standard_error(squares: Float[Tensor, "P"], count: int) -> Float[Tensor, "P"]:
    if count == 1:
        return torch.full_like(squares, math.nan)
    return (squares / (count - 1) / count).sqrt()
