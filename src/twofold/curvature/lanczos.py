"""Block Lanczos with full orthogonalisation: what eigenpairs and spectral densities stand on."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.curvature.linear_map import LinearMap
from twofold.curvature.probes import generator_for
from twofold.errors import TwofoldError

_CHUNK = 1 << 16
_LONG_CHUNK = 1 << 12
_PIECE = 1 << 18
_MOST_PASSES = 5

ROUNDING = 10
"""How far rounding may move a product, in units of eps ||A||."""


class Basis:
    """Up to `capacity` orthonormal vectors, the rows of one block of memory [capacity, P].

    Orthogonalisation is always against all of them, in two passes at least, which keeps V'V = I to rounding ("twice is
    enough", Giraud et al. 2005). That is what rules out ghosts, the repeated copies of one eigenvalue that Lanczos
    without it returns.

    Attributes:
        rows: the memory; the first `size` rows are the basis.
        size: how many vectors it holds.
    """

    def __init__(self, matrix: LinearMap, capacity: int, generator: torch.Generator | None) -> None:
        self.rows = torch.empty(capacity, matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        self.size = 0
        self._generator = generator_for(matrix, generator)

    def orthogonalise(self, vector: Float[Tensor, "P"], first: int = 0) -> tuple[Float[Tensor, "size"], float]:
        """Take the basis out of a vector in place.

        A pass reads the whole basis twice from memory, which is what it costs. So the first one takes out only the rows
        from `first` on, those that the vector is known to lean on; the second takes out all, and is repeated as long
        as it takes out more than it leaves.

        Returns:
            The coefficients V'w (float64, on the CPU) and the norm of what is left.
        """
        coefficients, left = torch.zeros(self.size, dtype=torch.float64), 0.0
        coefficients[first:] = self._taken_out(vector, first)
        for _ in range(1, _MOST_PASSES):
            part = self._taken_out(vector, 0)
            coefficients += part
            left = norm_of(vector)
            if norm_of(part) < left:
                break
        return coefficients, left

    def _taken_out(self, vector: Float[Tensor, "P"], first: int) -> Float[Tensor, "n"]:
        """Subtract V V'w for the rows from `first` on, and return V'w."""
        held = self.rows[first : self.size]
        part = held @ vector
        # By pieces that stay in the cache while the rows pass.
        for columns, piece in zip(held.split(_CHUNK, dim=1), vector.split(_CHUNK), strict=True):
            torch.addmv(piece, columns.T, part, alpha=-1, out=piece)
        return part.double().cpu()

    def beside(self, vector: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        """Copy a vector to where the next row will be, if there is room for one."""
        if self.size == len(self.rows):
            return vector.clone(memory_format=torch.contiguous_format)
        return self.rows[self.size].copy_(vector)

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
        for columns in self.rows.split(_LONG_CHUNK, dim=1):
            columns[:new] = (mixing @ columns[:old].double()).to(columns.dtype)


class Krylov:
    """V, and T = V'AV, with A V[:done] = V T[:, :done]: the rows from `done` on are not yet multiplied ("pending")."""

    def __init__(
        self,
        matrix: LinearMap,
        basis_size: int,
        block_size: int,
        generator: torch.Generator | None = None,
        *,
        num_matvecs: int = 0,
    ) -> None:
        self.matrix = matrix
        self.block_size = block_size
        capacity = min(basis_size + block_size, matrix.shape[0])
        self.basis = Basis(matrix, capacity, generator)
        self.T = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.done = 0
        self.num_matvecs = num_matvecs
        self.scale = 0.0
        """The largest ||A v|| met, which bounds ||A|| from below."""
        self.locked_residual = 0.0
        """The largest residual, relative to the scale, that was dropped when vectors were locked."""
        self._leans_on = [0 if row < block_size else row for row in range(capacity)]
        """For each row v, the first row that A v has a part along, rounding aside."""

    @property
    def pending(self) -> int:
        """How many vectors are not yet multiplied."""
        return self.basis.size - self.done

    @property
    def has_room(self) -> bool:
        """Whether the pending vectors can be multiplied and followed by as many."""
        most = len(self.T)
        return self.basis.size + self.pending <= most or most == self.matrix.shape[0]

    def start(self, given: Float[Tensor, "P m"] | None) -> None:
        """Fill the pending block: sums of every block_size-th vector given, then random ones."""
        if given is not None:
            given = given.to(self.basis.rows.device, self.basis.rows.dtype)
            given = given / torch.linalg.vector_norm(given, dim=0)
            for first in range(min(self.block_size, given.shape[1])):
                vector = given[:, first :: self.block_size].sum(1)
                size = norm_of(vector)
                _, left = self.basis.orthogonalise(vector)
                if left > math.sqrt(torch.finfo(given.dtype).eps) * size:
                    self.basis.append(vector, left)
        while self.basis.size < self.block_size and self.basis.append_random():
            pass

    def span_everything(self) -> None:
        """Take the unit vectors as the basis and multiply them all."""
        torch.eye(len(self.T), out=self.basis.rows)
        self.basis.size = len(self.T)
        products = torch.cat([self.multiply(rows).clone() for rows in self.basis.rows.split(self.block_size)])
        products, unit = self.in_range(products)
        self.scale = unit * torch.linalg.vector_norm(products, dim=1, dtype=torch.float64).max().item()
        self._check_symmetric(unit * (products - products.T).abs().max().item())
        self.T = unit * (products.double() + products.T).cpu() / 2
        self.done = self.basis.size

    def multiply(self, rows: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """A times the rows, one vector alone as [P] and several as [P, K]."""
        products = (self.matrix @ rows[0]).unsqueeze(0) if len(rows) == 1 else (self.matrix @ rows.T).T
        self.num_matvecs += len(rows)
        return products  # not to be written into: the operator's own memory, or the very vectors that it was given

    def in_range(self, products: Float[Tensor, "*K P"]) -> tuple[Float[Tensor, "*K P"], float]:
        """Return products over a power of two, and this: 1 where squares of them stay in the range of their dtype.

        The scale tells which do, and the largest entry as long as there is none.
        """
        size = self.scale or products.abs().max().item()
        limits = torch.finfo(products.dtype)
        if size == 0 or limits.tiny ** (1 / 3) < size < limits.max ** (1 / 3):
            return products, 1.0
        exponent = math.frexp(size)[1]
        half = exponent // 2  # 2^-exponent may be out of range itself
        return products * 2.0**-half * 2.0 ** (half - exponent), 2.0**exponent

    def step(self) -> bool:
        """Multiply the pending block and append what is new; False if the whole space is spanned already."""
        if not self.pending and not self.basis.append_random():
            return False
        block = range(self.done, self.basis.size)
        products = self.multiply(self.basis.rows[block.start : block.stop])
        for row, product in zip(block, products, strict=True):
            scaled, unit = self.in_range(product)
            vector = self.basis.beside(scaled)
            coefficients, left = self.basis.orthogonalise(vector, self._leans_on[row])
            size, reached = len(coefficients), unit * math.hypot(norm_of(coefficients), left)
            coefficients *= unit
            self.scale = max(self.scale, reached)
            if row:
                self._check_symmetric((coefficients[:row] - self.T[row, :row]).abs().max().item())
            self.T[row, :size] = self.T[:size, row] = coefficients
            if unit * left > ROUNDING * self.matrix.eps * self.scale and size < len(self.T):
                self._leans_on[size] = row
                self.basis.append(vector, left)
                self.T[row, size] = self.T[size, row] = unit * left
        self.done = block.stop
        return True

    @property
    def rounding(self) -> float:
        """How far rounding, or underflow, may move a product with a unit vector."""
        return ROUNDING * self.matrix.eps * self.scale + (self.matrix.underflow if self.scale else 0.0)

    def _check_symmetric(self, difference: float) -> None:
        """Compare v_i'A v_j with v_j'A v_i, known from before."""
        allowed = (10 * math.sqrt(self.matrix.eps) + self.locked_residual) * self.scale + self.matrix.underflow
        if difference > allowed:
            raise TwofoldError(
                f"{self.matrix.name} is not symmetric: u'Av and v'Au differ by {difference:.2g} for unit "
                f"vectors u and v, where ||Av|| reaches {self.scale:.2g}. Lanczos needs A = A'; pass (A + A') / 2 if "
                "that is what you mean, and look for products that are not repeatable (dropout, shuffled data)."
            )

    def ritz(self, locked: int = 0) -> tuple[Float[Tensor, "n"], Float[Tensor, "n n"], Float[Tensor, "n"]]:
        """Ritz values (ascending) of the rows from `locked` on, their vectors, and the norms of their residuals."""
        values, mixing = torch.linalg.eigh(self.T[locked : self.done, locked : self.done])
        unit = self.scale or 1.0  # squares of what is huge or tiny leave the range
        coupling = self.T[self.done : self.basis.size, locked : self.done] / unit @ mixing
        return values, mixing, unit * torch.linalg.vector_norm(coupling, dim=0)

    def restart(self, mixing: Float[Tensor, "n kept"], *, locked: int = 0) -> None:
        """Go on from the first `locked` rows, combinations of those that follow, and the pending block."""
        kept, pending = locked + mixing.shape[1], self.pending
        mixing = torch.block_diag(torch.eye(locked, dtype=torch.float64), mixing)
        coupling = self.T[self.done : self.basis.size, : self.done] @ mixing
        projected = mixing.T @ self.T[: self.done, : self.done] @ mixing
        self.basis.combine(mixing)
        self.basis.rows[kept : kept + pending] = self.basis.rows[self.done : self.basis.size].clone()
        self.T.zero_()
        self.T[:kept, :kept] = projected
        self.T[kept : kept + pending, :kept] = coupling
        self.T[:kept, kept : kept + pending] = coupling.T
        self.done, self.basis.size = kept, kept + pending
        self._leans_on = [locked if row < kept + pending else row for row in range(len(self.T))]

    def lock(self, mixing: Float[Tensor, "n kept"], tol: float) -> None:
        """Keep combinations of the rows alone: what couples them to the pending block, at most tol, is dropped."""
        self.basis.size = self.done
        self.locked_residual = max(self.locked_residual, tol)
        self.restart(mixing)


def norm_of(vector: Tensor) -> float:
    """The norm, summed in float64, by pieces: torch makes a float64 copy of what it sums, and long ones fill memory."""
    pieces = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in vector.split(_PIECE)]
    return torch.linalg.vector_norm(torch.stack(pieces)).item()


def dot_of(a: Float[Tensor, "P"], b: Float[Tensor, "P"]) -> float:
    """The inner product in float64, by pieces."""
    pieces = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in pieces]).sum().item()


def norm_of_difference(a: Float[Tensor, "P"], factor: float, b: Float[Tensor, "P"]) -> float:
    """||a - factor b|| in float64, by pieces."""
    pieces = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return torch.stack([(x.double() - factor * y.double()).square().sum() for x, y in pieces]).sum().sqrt().item()
