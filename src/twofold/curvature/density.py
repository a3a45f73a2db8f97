"""The spectral density of anything symmetric with .shape and @, by stochastic Lanczos quadrature."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.curvature.differentiable import full_precision
from twofold.curvature.lanczos import Krylov
from twofold.curvature.linear_map import LinearMap
from twofold.curvature.probes import check_count, generator_for, rademacher
from twofold.errors import TwofoldError
from twofold.types import SpectralDensity

Name = TypeVar("Name")

_POINTS, _MOST_POINTS = 1024, 10**6
_MARGIN = 5
"""Widths by which the default grid reaches beyond the nodes: 3e-7 of a Gaussian lies outside."""


def spectral_density(
    operator: Any,
    *,
    num_probes: int = 8,
    steps: int = 50,
    grid: Float[Tensor, "G"] | None = None,
    sigma: float | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Estimate the density of the eigenvalues of a symmetric A [P, P], p(x) = (1/P) sum_i delta(x - lambda_i).

    For a Rademacher probe v, v'f(A)v / P is a mean of f over the eigenvalues in expectation, and `steps` of Lanczos
    from v give its Gauss quadrature: nodes are the eigenvalues of the tridiagonal T, weights the squared first entries
    of its eigenvectors; exact for polynomials of degree 2 steps - 1. Orthogonalisation is full, so no node is a ghost;
    T is kept in float64. The curve replaces every delta by a Gaussian of width sigma.

    Args:
        operator: anything with .shape (P, P) and @.
        num_probes: how many probes; the standard errors come from their spread.
        steps: products for each probe (fewer where the Krylov space is smaller), and vectors [P] held in memory.
        grid: ascending points for the curve; None covers all nodes. `SpectralDensity.on` moves a result to another
            grid at no cost.
        sigma: the width in units of eigenvalues; None means 1/100 of the nodes' range, or the grid's spacing if larger.
        generator: source of the probes; None takes a private one with a fixed seed.

    Returns:
        SpectralDensity(grid, density, stderr, nodes, weights, sigma, num_matvecs), in float64 on the CPU.

    Raises:
        TwofoldError: the operator is not square, not real or not symmetric, a product is not finite, or an argument is
            out of range.

    Example:
        >>> A, B = torch.diag(torch.linspace(0, 1, 50)), torch.diag(torch.linspace(-2, 2, 50))
        >>> wide = spectral_density(B)
        >>> both = [wide, spectral_density(A, grid=wide.grid)]  # on a common grid
        >>> [round(torch.trapezoid(part.density, part.grid).item(), 4) for part in both]
        [1.0, 1.0]

    Source: Ubaru, Chen & Saad 2017, SIAM J. Matrix Anal. Appl. 38(4); for Hessians, 1901.10159.
    """
    return spectral_densities(
        {"": operator}, num_probes=num_probes, steps=steps, grid=grid, sigma=sigma, generator=generator
    )[""]


@full_precision()
def spectral_densities(
    operators: Mapping[Name, Any],
    *,
    num_probes: int = 8,
    steps: int = 50,
    grid: Float[Tensor, "G"] | None = None,
    sigma: float | None = None,
    generator: torch.Generator | None = None,
) -> dict[Name, SpectralDensity]:
    """Estimate the densities of several matrices of one size from the same probes, on a common grid, equally broadened.

    Arguments and results are those of `spectral_density`, by name; the grid covers the nodes of all.
    """
    check_count(num_probes, "num_probes")
    check_count(steps, "steps")
    grid = None if grid is None else _check_grid(grid)
    if sigma is not None and not 0 < sigma < math.inf:
        raise TwofoldError(f"sigma must be a positive width; {sigma!r} came.")
    matrices = {name: LinearMap(operator) for name, operator in operators.items()}
    first = next(iter(matrices.values()))
    generator = generator_for(first, generator)
    steps = min(steps, first.shape[0])
    rules: dict[Name, list[tuple[Tensor, Tensor, int]]] = {name: [] for name in matrices}
    for probe in rademacher(first, num_probes, generator):
        for name, matrix in matrices.items():
            rules[name].append(_quadrature(matrix, probe, steps))
    every = torch.cat([nodes for rule in rules.values() for nodes, _, _ in rule])
    grid, sigma = _grid_and_width(every.min().item(), every.max().item(), grid, sigma)
    found = {}
    for name, rule in rules.items():
        nodes, weights = (torch.stack(parts) for parts in zip(*(one[:2] for one in rule), strict=True))
        found[name] = SpectralDensity(grid, grid, grid, nodes, weights, sigma, sum(one[2] for one in rule)).on(grid)
    return found


def _grid_and_width(
    low: float, high: float, grid: Float[Tensor, "G"] | None, sigma: float | None
) -> tuple[Float[Tensor, "G"], float]:
    """What was asked for, or what shows nodes from low to high."""
    if sigma is None:
        # Nodes of a multiple of the identity differ by rounding alone.
        sigma = (max(high - low, 1e-4 * max(abs(low), abs(high))) or 1.0) / 100
        sigma = sigma if grid is None else max(sigma, (grid[-1] - grid[0]).item() / (len(grid) - 1))
    if grid is not None:
        return grid, sigma
    low, high = low - _MARGIN * sigma, high + _MARGIN * sigma
    points = max(_POINTS, math.ceil(4 * (high - low) / sigma))
    if points > _MOST_POINTS:
        raise TwofoldError(
            f"A grid that shows a width of sigma = {sigma:.3g} over all eigenvalues, {low:.3g} to {high:.3g}, has "
            f"{points} points. Pass a grid for the part that you want to see, or a larger sigma."
        )
    return torch.linspace(low, high, points, dtype=torch.float64), sigma


def _quadrature(matrix: LinearMap, probe: Tensor, steps: int) -> tuple[Tensor, Tensor, int]:
    """Nodes [steps] and weights [steps] for one probe, and the number of products."""
    krylov = Krylov(matrix, steps, 1, None)
    krylov.start(probe.unsqueeze(1))
    while krylov.pending and krylov.done < steps:
        krylov.step()
    values, mixing, _ = krylov.ritz()
    unused = steps - krylov.done
    return (
        torch.cat([values, values[-1:].expand(unused)]),
        torch.cat([mixing[0].square(), torch.zeros(unused, dtype=torch.float64)]),
        krylov.num_matvecs,
    )


def _check_grid(grid: Tensor) -> Tensor:
    grid = torch.as_tensor(grid).detach().to("cpu", torch.float64)
    if grid.dim() != 1 or len(grid) < 2 or not torch.isfinite(grid).all() or not (grid.diff() > 0).all():
        raise TwofoldError(f"grid must be finite ascending points [G], two at least; shape {tuple(grid.shape)} came.")
    return grid
