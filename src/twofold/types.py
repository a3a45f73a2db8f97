"""Types and result classes that the whole library shares.

Legend of symbols, used in every docstring:

    N  terms that the loss averages (examples, tokens, pixels)      theta  the chosen parameters, as one vector [P]
    C  outputs per term                                            z      model outputs, any shape
    P  number of chosen parameter entries                          J      dz/dtheta
    K  number of vectors handled at once                           H_z    second derivative of the loss in the outputs
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

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

Matrix: TypeAlias = Literal["hessian", "gauss_newton", "nme"]
"""One of the three matrices of H = GN + NME."""

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
    """

    values: Float[Tensor, "k"]
    vectors: Float[Tensor, "P k"]
    residuals: Float[Tensor, "k"]
    converged: bool
    num_matvecs: int

    def __str__(self) -> str:
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        found = ", ".join(f"{value:.4g} ± {residual:.1g}" for value, residual in pairs)
        return f"{found} ({self.num_matvecs} matvecs{'' if self.converged else ', not converged'})"
