"""The trace of anything with .shape and @, with its standard error."""

from typing import Any

import torch
from torch import Tensor

from twofold.curvature.probes import check_count, check_square, product_of, rademacher, summarise
from twofold.types import Estimate


def trace(operator: Any, num_matvecs: int = 64, *, generator: torch.Generator | None = None) -> Estimate:
    """Estimate tr A = E v'Av with Rademacher probes v (Hutchinson 1990).

    The estimate is unbiased; its variance is 2 (||A||_F^2 - sum_i A_ii^2) / num_matvecs for symmetric A, so it is
    exact for a diagonal matrix.

    Args:
        operator: anything with .shape (P, P) and @: a twofold operator, a tensor, a SciPy operator.
        num_matvecs: the number of probes.
        generator: source of the probes; None takes a private one with a fixed seed (same call, same numbers).

    Returns:
        Estimate(value, stderr, num_matvecs); stderr is nan with a single probe.

    Raises:
        TwofoldError: the operator is not square, or num_matvecs is not positive.

    Example:
        >>> float(trace(torch.diag(torch.tensor([1.0, 2.0, 3.0])), num_matvecs=4))
        6.0
    """
    check_square(operator)
    check_count(num_matvecs)
    samples = [_quadratic_form(operator, probe) for probe in rademacher(operator, num_matvecs, generator)]
    return summarise(samples)


def _quadratic_form(operator: Any, probe: Tensor) -> float:
    return torch.dot(probe.double(), product_of(operator, probe).double()).item()
