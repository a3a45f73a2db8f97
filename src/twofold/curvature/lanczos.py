"""Orthonormal vectors grown from products: what every Krylov method here stands on."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.curvature.probes import generator_for, product_of, vectors_of
from twofold.errors import TwofoldError

_CHUNK = 1 << 16


class Basis:
    """Up to `capacity` orthonormal vectors, the rows of one block of memory [capacity, P].

    Orthogonalisation is always against all of them and always done twice, which keeps V'V = I to rounding ("twice is
    enough", Giraud et al. 2005). That is what rules out ghosts, the repeated copies of one eigenvalue that Lanczos
    without it returns.

    Attributes:
        rows: the memory; the first `size` rows are the basis.
        size: how many vectors it holds.
    """

    def __init__(self, operator: Any, capacity: int, generator: torch.Generator | None) -> None:
        dtype, device = vectors_of(operator)
        self.rows = torch.empty(capacity, operator.shape[0], dtype=dtype, device=device)
        self.size = 0
        self._generator = generator_for(device, generator)

    def orthogonalise(self, vector: Float[Tensor, "P"]) -> tuple[Float[Tensor, "size"], float]:
        """Take the basis out of a vector in place.

        Returns:
            The coefficients V'w (float64, on the CPU) and the norm of what is left.
        """
        held = self.rows[: self.size]
        coefficients = torch.zeros(self.size, dtype=torch.float64)
        for _ in range(2):
            part = held @ vector
            torch.addmv(vector, held.T, part, alpha=-1, out=vector)
            coefficients += part.double().cpu()
        return coefficients, norm_of(vector)

    def append(self, vector: Float[Tensor, "P"], norm: float) -> None:
        """Add a vector that is orthogonal to the basis and has this norm."""
        torch.div(vector, norm, out=self.rows[self.size])
        self.size += 1

    def append_random(self) -> bool:
        """Add a random direction orthogonal to the basis; False if the basis spans the whole space."""
        if self.size >= self.rows.shape[1]:
            return False
        like = self.rows
        vector = torch.randn(like.shape[1], generator=self._generator, device=self._generator.device, dtype=like.dtype)
        vector = vector.to(like.device)
        vector /= norm_of(vector)
        _, norm = self.orthogonalise(vector)
        vector /= norm
        _, norm = self.orthogonalise(vector)
        self.append(vector, norm)
        return True

    def combine(self, mixing: Float[Tensor, "size new"]) -> None:
        """Replace the first rows by linear combinations of them, in place: memory for one more basis is not needed."""
        old, new = mixing.shape
        mixing = mixing.T.to(self.rows.device, torch.float64)
        for columns in self.rows.split(_CHUNK, dim=1):
            columns[:new] = (mixing @ columns[:old].double()).to(columns.dtype)


def norm_of(vector: Tensor) -> float:
    """The norm, summed in float64."""
    return torch.linalg.vector_norm(vector, dtype=torch.float64).item()


def finite_product(operator: Any, vectors: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
    """The operator times the rows, one vector alone as [P] and several as [P, K].

    Raises:
        TwofoldError: the product has another shape, or is not finite.
    """
    given = vectors[0] if len(vectors) == 1 else vectors.T
    product = product_of(operator, given).to(vectors.device, vectors.dtype)
    if product.shape != given.shape:
        raise TwofoldError(
            f"{type(operator).__name__} @ [{', '.join(map(str, given.shape))}] gave shape {tuple(product.shape)}; "
            "a product must have the shape of the vectors."
        )
    product = product.reshape(1, -1) if len(vectors) == 1 else product.T.contiguous()
    if not torch.isfinite(product).all():
        raise TwofoldError(
            f"{type(operator).__name__} @ v is not finite for a finite v: it holds NaN or infinity, or overflows "
            f"{vectors.dtype}. Look for diverged parameters or NaN in the data, or measure in float64."
        )
    return product
