"""Norms of anything with .shape and @, with their standard errors."""

from typing import Any

import torch

from twofold.curvature.differentiable import full_precision
from twofold.curvature.linear_map import LinearMap
from twofold.curvature.probes import check_atol, check_count, precise, rademacher, root_of, summarise, warn_imprecise
from twofold.types import Estimate


@full_precision()
def frobenius_norm(
    operator: Any, num_matvecs: int = 64, *, atol: float | None = None, generator: torch.Generator | None = None
) -> Estimate:
    """Estimate ||A||_F from E ||Av||^2 = ||A||_F^2 with Rademacher probes v.

    The square is unbiased; its root and the root's standard error are those of the delta method.

    Args:
        operator: anything with .shape (P, P) and @.
        num_matvecs: the number of probes.
        atol: stop as soon as the standard error is this at most, in the norm's own units, after 10 probes at least;
            num_matvecs is then the most.
        generator: source of the probes; None takes a private one with a fixed seed (same call, same numbers).

    Returns:
        Estimate(value, stderr, num_matvecs); stderr is nan with a single probe.

    Raises:
        TwofoldError: the operator is not square, or num_matvecs or atol is not positive.

    Warns:
        TwofoldWarning: the standard error did not come down to atol.

    Example:
        >>> float(frobenius_norm(torch.diag(torch.tensor([3.0, 4.0])), num_matvecs=4))
        5.0
    """
    matrix = LinearMap(operator)
    check_count(num_matvecs)
    check_atol(atol)
    squares = []
    for probe in rademacher(matrix, num_matvecs, generator):
        squares.append((matrix @ probe).double().square().sum().item())
        if atol is not None and precise([root_of(summarise(squares))], atol):
            break
    found = root_of(summarise(squares))
    warn_imprecise("frobenius_norm", found.stderr, found.num_matvecs, atol)
    return found
