"""Extreme eigenpairs of anything symmetric with .shape and @, by thick-restart Lanczos."""

import math
import warnings
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twofold.curvature.differentiable import full_precision
from twofold.curvature.lanczos import ROUNDING, Krylov, dot_of, norm_of, norm_of_difference
from twofold.curvature.linear_map import LinearMap
from twofold.curvature.probes import check_count
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.types import Eigenpairs

Which: TypeAlias = Literal["LA", "SA", "LM", "BE"]

_MISS_PROBABILITY = 0.05
_DENSE = 1024
"""Up to this size a matrix that resists is solved densely: a second or two, and 8 MB."""


@full_precision()
def eigsh(
    operator: Any,
    k: int = 6,
    *,
    which: Which = "LA",
    tol: float | None = None,
    max_matvecs: int | None = None,
    block_size: int = 1,
    basis_size: int | None = None,
    v0: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """Find k eigenpairs at the ends of the spectrum of a symmetric A [P, P]: A v = lambda v.

    Block Lanczos grows an orthonormal V with A V = V T + q C', and restarts from the best Ritz vectors of T ("thick
    restart"). Orthogonalisation is full and done twice, so no eigenvalue appears twice that is simple. A Krylov space
    shows one vector of a multiple eigenvalue: once k pairs have converged, a second look from a random vector that is
    orthogonal to them searches for what was missed, and the iteration goes on with what it finds. The look ends when a
    missed eigenvalue would have shown with a probability of 95 %, or after half as many products as came before it
    (basis_size - k at least). A space that fits the basis (P <= basis_size) is solved densely, by P products and k
    more for the residuals; so is one of P <= 1024 that has not converged after P products, where max_matvecs allows.

    Args:
        operator: anything with .shape (P, P) and @: a twofold operator, a tensor, a SciPy operator.
        k: how many eigenpairs.
        which: SciPy's words: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude, "BE" from both ends
            (one more from the high end if k is odd).
        tol: a pair has converged when ||A v - lambda v|| <= tol * max|lambda|, relative to the largest of all
            eigenvalues and not to each: eigenvalues near zero, as at the low end of a Gauss-Newton matrix, are known
            to that absolute accuracy. None means 1e-8 in float64 and 1e-5 in float32; what rounding forbids (40 eps of
            the operator's dtype) is not tried. The error of a separated eigenvalue is of the order of tol^2.
        max_matvecs: most matrix-vector products, k for the residuals among them; None means max(1000, 50 k), and
            2 P + k at least for P <= 1024.
        block_size: vectors multiplied at once, as A @ [P, block_size]. More than one finds multiple eigenvalues
            sooner, and pays where a product with several vectors is cheaper than several products.
        basis_size: vectors [P] held in memory, block_size more at times; None means max(2 k, k + 20) for blocks of
            one, 10 more for each further vector of a block.
        v0: where to start, [P] or [P, m]: such as the eigenvectors of a matrix nearby, which saves products.
        generator: source of the random directions; None takes a private one with a fixed seed.

    Returns:
        Eigenpairs(values [k] ascending, vectors [P, k], residuals [k], converged, num_matvecs), in the operator's dtype
        and on its device; residuals are computed anew from the vectors returned, and bounds on rounding are added.

    Raises:
        TwofoldError: the operator is not square, not real or not symmetric, a product is not finite, k > P, or an
            argument is out of range.

    Warns:
        TwofoldWarning: not every pair converged, or what A gives is too small for its dtype; the residuals still hold.

    Example:
        >>> eigsh(torch.diag(torch.tensor([5.0, 3.0, 3.0, -8.0])), k=3, which="LA").values
        tensor([3., 3., 5.])

    Source: Wu & Simon 2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix
    Anal. Appl. 22(2); the second look's confidence: Kuczynski & Wozniakowski 1992, ibid. 13(4).
    """
    matrix = LinearMap(operator)
    size = matrix.shape[0]
    check_count(k, "k")
    if k > size:
        raise TwofoldError(f"k = {k} eigenpairs were asked of an operator that has {size}: shape {(size, size)}.")
    if which not in get_args(Which):
        raise TwofoldError(f'which must be "LA", "SA", "LM" or "BE"; {which!r} came.')
    check_count(block_size, "block_size")
    basis_size = max(2 * k, k + 10 * (block_size + 1)) if basis_size is None else basis_size
    check_count(basis_size, "basis_size", at_least=min(k + 2 * block_size, size))
    max_matvecs = max(1000, 50 * k, 2 * size + k if size <= _DENSE else 0) if max_matvecs is None else max_matvecs
    check_count(max_matvecs, "max_matvecs", at_least=2 * k + block_size - 1)
    tol = (1e-8 if matrix.dtype == torch.float64 else 1e-5) if tol is None else tol
    if not 0 <= tol < 1:
        raise TwofoldError(f"tol must be a fraction of the largest eigenvalue, in [0, 1); {tol!r} came.")
    tol = max(tol, 4 * ROUNDING * matrix.eps)

    given = None if v0 is None else _check_start(v0, size)
    krylov = Krylov(matrix, min(basis_size, size), block_size, generator)
    fits = size <= basis_size and size + k <= max_matvecs
    # A small matrix never takes more than 2 P products: what resists P of them is solved by P more.
    may_fall_back = size <= _DENSE and 2 * size + k <= max_matvecs
    if not fits:
        krylov.start(given)
        # Half, so that the residuals of the result are within tol with their bound on rounding.
        if _iterate(krylov, k, which, tol / 2, size if may_fall_back else max_matvecs - k):
            return _result(krylov, k, tol, max_matvecs)
    if fits or may_fall_back:
        krylov = Krylov(matrix, size, block_size, num_matvecs=krylov.num_matvecs)
        krylov.span_everything()
    values, mixing, _ = krylov.ritz()
    krylov.lock(mixing[:, _best_first(values, which)[:k]], tol)
    return _result(krylov, k, tol, max_matvecs)


def _check_start(v0: Tensor, size: int) -> Float[Tensor, "P m"]:
    columns = torch.as_tensor(v0).detach()
    columns = columns.unsqueeze(1) if columns.dim() == 1 else columns
    if columns.dim() != 2 or len(columns) != size or not columns.shape[1]:
        raise TwofoldError(f"v0 must be [{size}] or [{size}, m]; shape {tuple(v0.shape)} came.")
    norms = torch.linalg.vector_norm(columns.double(), dim=0)
    if not torch.isfinite(norms).all() or not (norms > 0).all():
        raise TwofoldError(f"v0 must hold finite vectors other than zero; their norms are {norms.tolist()}.")
    return columns


def _iterate(krylov: Krylov, k: int, which: Which, tol: float, budget: int) -> bool:
    """Run until the first k rows are converged pairs and a second look finds no better; False on a spent budget."""
    while _affordable(krylov, budget) and _advance(krylov, k, which):
        values, mixing, residuals = krylov.ritz()
        wanted = _best_first(values, which)[:k]
        if len(wanted) == k and (residuals[wanted] <= tol * krylov.scale).all():
            krylov.lock(mixing[:, wanted], tol)
            if _nothing_missed(krylov, values[wanted], which, tol, budget):
                return True
    return False


def _affordable(krylov: Krylov, budget: int) -> bool:
    return krylov.num_matvecs + max(krylov.pending, 1) <= budget


def _advance(krylov: Krylov, k: int, which: Which, locked: int = 0) -> bool:
    """One step, after a restart where memory is full; False if the whole space is spanned."""
    if not krylov.has_room:
        values, mixing, _ = krylov.ritz(locked)
        keep = min(k + (krylov.done - k) // 2, krylov.done - 1) - locked
        krylov.restart(mixing[:, _best_first(values, which)[:keep]], locked=locked)
    return krylov.step()


def _nothing_missed(krylov: Krylov, found: Float[Tensor, "k"], which: Which, tol: float, budget: int) -> bool:
    """Look for better eigenvalues from a random vector orthogonal to the k locked pairs.

    False as soon as one shows, or where the budget does not last.

    After s steps with Ritz values theta_i and couplings beta_i, the random r obeys |r_1| prod|x - theta_i| <=
    prod beta_i for its component r_1 along an eigenvector of eigenvalue x. So an eigenvector beyond x can be there only
    if |r_1| is below that ratio, and P(|r_1| < p / sqrt(P)) < p.

    Where that is not reached before the first restart, half of the products that the pairs took are enough: an
    eigenvector shows long before it converges.
    """
    k, slack = len(found), tol * krylov.scale
    low, high = (fence + side * slack for fence, side in zip(_fences(found, which), (-1, 1), strict=True))
    fences = torch.tensor([x for x in (low, high) if math.isfinite(x)], dtype=torch.float64)
    enough = math.log(math.sqrt(krylov.matrix.shape[0]) / _MISS_PROBABILITY)
    end = krylov.num_matvecs + max(len(krylov.T) - k, krylov.num_matvecs // 2)
    restarted = False
    while krylov.num_matvecs < end:
        if not _affordable(krylov, budget):
            return False
        restarted |= not krylov.has_room
        if not _advance(krylov, k, which, locked=k):
            return True
        theta, _, _ = krylov.ritz(locked=k)
        if theta[0] < low or theta[-1] > high:
            return False
        if not krylov.pending:
            return True
        couplings = krylov.T.diagonal(-1)[k : krylov.done]
        growth = (fences[:, None] - theta).abs().log().sum(1) - couplings.log().sum()
        if not restarted and (growth > enough).all():
            return True
    return True


def _best_first(values: Float[Tensor, "n"], which: Which) -> Int[Tensor, "n"]:
    """The order in which ascending values are wanted."""
    count = len(values)
    ascending = torch.arange(count)
    if which == "SA":
        return ascending
    if which == "LA":
        return ascending.flip(0)
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)
    return torch.stack([ascending.flip(0), ascending], dim=1).flatten()[:count]


def _fences(found: Float[Tensor, "k"], which: Which) -> tuple[float, float]:
    """The interval (low, high) outside of which an eigenvalue that is not among those found would be wanted."""
    values = found.sort().values.tolist()
    if which == "LA":
        return -math.inf, values[0]
    if which == "SA":
        return values[-1], math.inf
    if which == "LM":
        least = min(map(abs, values))
        return -least, least
    lower = len(values) // 2
    return (values[lower - 1] if lower else -math.inf), values[lower]


def _result(krylov: Krylov, k: int, tol: float, max_matvecs: int) -> Eigenpairs:
    """The first k rows as eigenpairs, their values and residuals computed anew."""
    vectors = krylov.basis.rows[:k]
    for vector in vectors:
        vector.div_(norm_of(vector))
    values, residuals = torch.empty(k, dtype=torch.float64), []
    for i, rows in enumerate(vectors.split(krylov.block_size)):
        for j, (row, found) in enumerate(zip(rows, krylov.multiply(rows), strict=True), i * krylov.block_size):
            product, unit = krylov.in_range(found)
            value = dot_of(row, product)
            values[j] = unit * value
            residuals.append(unit * norm_of_difference(product, value, row) + krylov.rounding)
    ascending = values.argsort(stable=True)
    bounds = torch.tensor(residuals, dtype=torch.float64)
    limit = tol * krylov.scale
    converged = bool((bounds <= limit).all())
    if not converged:
        remedy = "Raise max_matvecs or basis_size, ask for fewer pairs, or pass a larger tol."
        if 0 < limit < 2 * krylov.matrix.underflow:
            remedy = f"The products are too small for {vectors.dtype}: scale the operator up, or use a wider dtype."
        warnings.warn(
            TwofoldWarning(
                f"eigsh: {int((bounds > limit).sum())} of {k} eigenpairs did not converge: residuals up to "
                f"{bounds.max():.2g}, wanted {limit:.2g}, after {krylov.num_matvecs} products (max_matvecs = "
                f"{max_matvecs}). {remedy}"
            ),
            stacklevel=3,
        )
    like = {"dtype": vectors.dtype, "device": vectors.device}
    return Eigenpairs(
        values=values[ascending].to(**like),
        vectors=vectors[ascending.to(vectors.device)].T,  # a copy, but of the basis' k rows alone
        residuals=bounds[ascending].to(**like),
        converged=converged,
        num_matvecs=krylov.num_matvecs,
    )
