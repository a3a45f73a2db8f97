"""Types and result classes that the whole library shares.

Legend of symbols, used in every docstring:

    N  terms that the loss averages (examples, tokens, pixels)      theta  the chosen parameters, as one vector [P]
    C  outputs per term                                            z      model outputs, any shape
    P  number of chosen parameter entries                          J      dz/dtheta
    K  number of vectors handled at once                           H_z    second derivative of the loss in the outputs
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

Params: TypeAlias = str | Sequence[str] | None
"""Names or glob patterns of parameters; None means all that require a gradient."""

LossFn: TypeAlias = Callable[[Any, Any], Tensor]
"""loss_fn(outputs, targets) -> scalar."""

Forward: TypeAlias = Callable[[nn.Module, Any], tuple[Any, Any]]
"""forward(model, batch) -> (outputs, targets)."""

Weight: TypeAlias = Callable[[Any, Any], float]
"""weight(outputs, targets) -> how many terms the loss averages in this batch."""

Mode: TypeAlias = Literal["train", "eval"] | None
"""Measure in train or eval mode; None takes the model as it is."""

Matrix: TypeAlias = Literal["hessian", "gauss_newton", "nme", "activation_nme", "rest"]
"""One of the matrices of H = GN + NME and NME = activation NME (what carries phi'') + rest."""

ProcessGroup: TypeAlias = Any
"""A torch.distributed process group whose ranks each hold a shard of the data; None is this process alone."""

Vectors: TypeAlias = Tensor | Mapping[str, Tensor]
"""[P], [P, K], or a mapping from parameter name to a tensor of the parameter's shape."""


@dataclass(frozen=True)
class Estimate:
    """A random estimate and how far to trust it.

    Attributes:
        value: the estimate.
        stderr: its standard error (nan where one sample cannot tell).
        num_matvecs: how many matrix-vector products it took.

    Example:
        >>> print(Estimate(12.0, 0.5, 64))
        12 ± 0.5 (64 matvecs)
    """

    value: float
    stderr: float
    num_matvecs: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.stderr:.2g} ({self.num_matvecs} matvecs)"


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Some eigenvalues of a symmetric operator and their eigenvectors.

    Attributes:
        values: the eigenvalues, ascending.
        vectors: orthonormal eigenvectors, one a column.
        residuals: ||A v - lambda v|| for each pair; some eigenvalue of A lies within this distance of lambda.
        converged: whether every residual is within the tolerance that was asked for.
        num_matvecs: how many matrix-vector products it took.
        parts: {matrix: v'Av for each eigenvector}, what each half of the Hessian has of the eigenvalue; None where that
            was not asked for (see `Curvature.eigsh`).
    """

    values: Float[Tensor, "k"]
    vectors: Float[Tensor, "P k"]
    residuals: Float[Tensor, "k"]
    converged: bool
    num_matvecs: int
    parts: Mapping[str, Float[Tensor, "k"]] | None = None

    def __str__(self) -> str:
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        found = [f"{value:.4g} ± {residual:.1g}" for value, residual in pairs]
        cost = f"({self.num_matvecs} matvecs{'' if self.converged else ', not converged'})"
        if self.parts is None:
            return f"{', '.join(found)} {cost}"
        width = max(map(len, found))
        columns = {name: [f"{value:.4g}" for value in of.tolist()] for name, of in self.parts.items()}
        shares = [", ".join(f"{name} {column[i]}" for name, column in columns.items()) for i in range(len(found))]
        return "\n".join([*(f"{one:{width}}: {share}" for one, share in zip(found, shares, strict=True)), cost])


@dataclass(frozen=True, eq=False)
class DiagonalEstimate:
    """A random estimate of a diagonal, entry by entry.

    Attributes:
        value: the estimates.
        stderr: their standard errors (nan where one probe cannot tell).
        num_matvecs: how many matrix-vector products it took.
    """

    value: Float[Tensor, "P"]
    stderr: Float[Tensor, "P"]
    num_matvecs: int


@dataclass(frozen=True, eq=False)
class BlockNorms:
    """Estimates of the Frobenius norms of all blocks A_bc of a symmetric matrix.

    Attributes:
        blocks: their names, the same for rows and columns.
        value: the estimates; the squares sum to ||A||_F^2 where the blocks cover everything once.
        stderr: their standard errors (nan where one probe cannot tell).
        num_matvecs: how many matrix-vector products all of them took together.
    """

    blocks: tuple[str, ...]
    value: Float[Tensor, "blocks blocks"]
    stderr: Float[Tensor, "blocks blocks"]
    num_matvecs: int

    def __getitem__(self, pair: tuple[str, str]) -> Estimate:
        """Return the norm of the block in row b and column c, by their names."""
        at = tuple(self.blocks.index(name) for name in pair)
        return Estimate(self.value[at].item(), self.stderr[at].item(), self.num_matvecs)


@dataclass(frozen=True)
class InnerProduct:
    """How two matrices lie to each other.

    Attributes:
        value: their inner product <A, B>_F = tr A'B.
        cosine: <A, B>_F / (||A||_F ||B||_F); nan where one of them is zero.
    """

    value: Estimate
    cosine: Estimate

    def __str__(self) -> str:
        return f"{self.value}, cosine {self.cosine.value:.3g} ± {self.cosine.stderr:.2g}"


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The density of eigenvalues, p(x) = (1/P) sum_i delta(x - lambda_i), as quadrature rules and as a smooth curve.

    Attributes:
        grid: where the curve is given, ascending.
        density: the curve: p broadened by a Gaussian of width sigma. It integrates to 1 over a grid that covers the
            spectrum.
        stderr: its standard error over the probes (nan with a single one).
        nodes: quadrature nodes, one row a probe.
        weights: their weights, not negative; each row sums to 1.
        sigma: the width, in units of eigenvalues.
        num_matvecs: how many matrix-vector products it took.
    """

    grid: Float[Tensor, "G"]
    density: Float[Tensor, "G"]
    stderr: Float[Tensor, "G"]
    nodes: Float[Tensor, "probes steps"]
    weights: Float[Tensor, "probes steps"]
    sigma: float
    num_matvecs: int

    def integrate(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimate (1/P) tr f(A), the mean of f over the eigenvalues; times P it is the trace.

        Args:
            f: takes a tensor of eigenvalues and returns f of each.

        Example:
            >>> density = twofold.spectral_density(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
            >>> print(f"{float(density.integrate(torch.log2)):.4f}")
            1.0000
        """
        samples = (self.weights * f(self.nodes)).sum(1)
        stderr = samples.std().item() / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
        return Estimate(samples.mean().item(), stderr, self.num_matvecs)

    def on(self, grid: Float[Tensor, "G"], sigma: float | None = None) -> "SpectralDensity":
        """The same density on another grid, or of another width, with no further products.

        Args:
            grid: ascending points.
            sigma: the width; None keeps the present one.
        """
        sigma = self.sigma if sigma is None else sigma
        curves = [
            weights @ torch.exp(-0.5 * ((grid - nodes[:, None]) / sigma).square())
            for nodes, weights in zip(self.nodes, self.weights, strict=True)
        ]
        curve = torch.stack(curves) / (math.sqrt(2 * math.pi) * sigma)
        stderr = curve.std(0) / math.sqrt(len(curve)) if len(curve) > 1 else torch.full_like(curve[0], math.nan)
        return replace(self, grid=grid, density=curve.mean(0), stderr=stderr, sigma=sigma)
