"""The trace of anything with .shape and @, with its standard error."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from twofold.curvature.differentiable import full_precision
from twofold.curvature.linear_map import LinearMap
from twofold.curvature.probes import (
    check_atol,
    check_count,
    generator_for,
    precise,
    rademacher,
    summarise,
    warn_imprecise,
)
from twofold.errors import TwofoldError
from twofold.types import Estimate

_SHARED_PROBES = 1.5
"""Variance of XTrace's mean, over what its estimates' spread would give were they independent.

Estimates i and j share what probes i and j do to each other. Where only that matters (a degenerate U-statistic of
degree 2) the factor is 2, where it does not, 1; measured, 1.0 to 1.8. The paper's own error estimate takes 1.
"""


@full_precision()
def trace(
    operator: Any,
    num_matvecs: int = 64,
    *,
    method: Literal["hutchinson", "xtrace"] = "hutchinson",
    atol: float | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Estimate tr A from products with random vectors.

    "hutchinson": tr A = E v'Av with Rademacher probes v. Unbiased; its variance is
    2 (||A||_F^2 - sum_i A_ii^2) / num_matvecs for symmetric A, so it is exact for a diagonal matrix.

    "xtrace": half of the products find a basis Q of the range of A, tr Q'AQ is taken exactly and only the rest is
    sampled, each probe with the basis that the others span. Unbiased, and far more exact where a few eigenvalues make
    up the trace; where the spectrum is flat it gains nothing. It holds num_matvecs vectors [P] in memory.

    Args:
        operator: anything with .shape (P, P) and @: a twofold operator, a tensor, a SciPy operator.
        num_matvecs: the number of products; for "xtrace" at least 2, and an odd one is left.
        method: "hutchinson" or "xtrace".
        atol: for "hutchinson", stop as soon as the standard error is this at most, in the trace's own units (absolute,
            since the trace of an indefinite matrix may be near 0), after 10 probes at least; num_matvecs is then the
            most.
        generator: source of the probes; None takes a private one with a fixed seed (same call, same numbers).

    Returns:
        Estimate(value, stderr, num_matvecs); stderr is nan with a single probe.

    Raises:
        TwofoldError: the operator is not square, num_matvecs is too small, atol is not positive or came with "xtrace",
            or the method is unknown.

    Warns:
        TwofoldWarning: the standard error did not come down to atol.

    Example:
        >>> float(trace(torch.diag(torch.tensor([1.0, 2.0, 3.0])), num_matvecs=4))
        6.0

    Source: Hutchinson 1990, Commun. Stat. Simul. Comput. 19(2); XTrace, normalised: 2301.07825.
    """
    matrix = LinearMap(operator)
    check_atol(atol)
    if method == "hutchinson":
        check_count(num_matvecs)
        samples = []
        for probe in rademacher(matrix, num_matvecs, generator):
            samples.append(_quadratic_form(matrix, probe))
            if atol is not None and precise([summarise(samples)], atol):
                break
        found = summarise(samples)
        warn_imprecise("trace", found.stderr, found.num_matvecs, atol)
        return found
    if method == "xtrace":
        if atol is not None:
            raise TwofoldError('atol goes with method="hutchinson": XTrace needs its number of probes beforehand.')
        check_count(num_matvecs, at_least=2)
        return _xtrace(matrix, num_matvecs, generator)
    raise TwofoldError(f'method must be "hutchinson" or "xtrace"; {method!r} came.')


def _quadratic_form(matrix: LinearMap, probe: Tensor) -> float:
    return torch.dot(probe.double(), (matrix @ probe).double()).item()


def _xtrace(matrix: LinearMap, num_matvecs: int, generator: torch.Generator | None) -> Estimate:
    """One estimate for each probe w_i: tr Q_i'AQ_i + c (w_i - Q_i u)'A(w_i - Q_i u), Q_i the basis without probe i.

    Q_i Q_i' = Q Q' - (Q s_i)(Q s_i)' for the unit s_i orthogonal to all columns of R but the i-th, where A W = Q R; so
    all estimates follow from products of small matrices. c makes ||w_i - Q_i u||^2 its mean.
    """
    size, dtype, device = matrix.shape[0], matrix.dtype, matrix.device
    generator = generator_for(matrix, generator)
    probes = torch.randn(size, min(num_matvecs // 2, size), generator=generator, device=generator.device, dtype=dtype)
    probes = (probes * (size**0.5 / torch.linalg.vector_norm(probes, dim=0))).to(device)
    images = _products(matrix, probes)
    Q, R = torch.linalg.qr(images)
    left, singular, right = torch.linalg.svd(R.double())
    rank = int((singular > len(R) * torch.finfo(dtype).eps * singular[0]).sum())
    if rank == len(R):
        S = torch.linalg.inv(R.double()).T
        S = S / torch.linalg.vector_norm(S, dim=0)
    else:
        # The range is found already, and the other probes span it without probe i.
        Q, R = Q @ left[:, :rank].to(dtype), singular[:rank, None] * right[:rank]
        S = torch.zeros_like(R)
    through = _products(matrix, Q)
    H, T, W, R = (Q.T @ through).double(), (through.T @ probes).double(), (Q.T @ probes).double(), R.double()
    dots = (S * W).sum(0)
    U = W - S * dots
    quadratic = ((W - U) * R).sum(0) - (T * U).sum(0) + (U * (H @ U)).sum(0)
    free = size - rank + (1 if rank == probes.shape[1] else 0)
    remaining = (size - U.square().sum(0)).clamp(min=torch.finfo(dtype).eps * size)
    samples = H.trace() - (S * (H @ S)).sum(0) + quadratic * free / remaining
    spread, count = summarise(samples.tolist()), len(samples)
    # The spread of few samples is as often too small as too large, and where it is too small it misleads: as in the
    # variance of Student's t.
    few = (count - 1) / (count - 3) if count > 3 else 3.0
    return Estimate(spread.value, spread.stderr * math.sqrt(_SHARED_PROBES * few), probes.shape[1] + rank)


def _products(matrix: LinearMap, vectors: Tensor) -> Tensor:
    """The operator times vectors [P, K], one at a time."""
    columns = [matrix @ vector.contiguous() for vector in vectors.T]
    return torch.stack(columns, dim=1) if columns else torch.empty_like(vectors)
