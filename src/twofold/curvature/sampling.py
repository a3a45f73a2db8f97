"""Joint probes: traces, norms, cosines and blocks of all matrices from the same products."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.curvature.probes import cosine_of, root_of, summarise
from twofold.curvature.products import Products
from twofold.types import Estimate, Matrix

SPLIT: tuple[Matrix, ...] = ("gauss_newton", "activation_nme", "rest")
HALVES: tuple[Matrix, ...] = ("gauss_newton", "nme")

_PIECE = 1 << 20


class Samples:
    """What Rademacher probes v say of H = GN + NME: v'A v by parameter, and the inner products of the A v.

    One pass over the data gives everything for a probe; H is the sum of its terms, so nothing is computed twice, and
    the estimates add up as the matrices do.

    Args:
        products: the products of one model and data set.
        terms: the matrices that are computed, `SPLIT` or `HALVES`; the others are sums of them.
    """

    def __init__(self, products: Products, terms: Sequence[Matrix]) -> None:
        self._products = products
        self._terms = tuple(terms)
        self.names = list(products.layout.shapes)
        self._forms: list[Float[Tensor, "terms params"]] = []
        self._grams: list[Float[Tensor, "terms terms"]] = []

    def __len__(self) -> int:
        return len(self._forms)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All matrices that can be told: H, GN, NME and, from `SPLIT`, the NME's parts."""
        return ("hessian", "gauss_newton", "nme", *(term for term in self._terms if term not in HALVES))

    def take(self, probe: Float[Tensor, "P"]) -> None:
        """Multiply one probe, whose entries are +-1."""
        rows = self._products.matmat(probe.unsqueeze(0), self._terms)
        self._grams.append(gram_of([row[0] for row in rows]))
        # exact also in float32, as multiplying with +-1 is
        signs = self._parts(probe)
        forms = [
            torch.stack([(part * sign).sum(dtype=torch.float64) for part, sign in zip(parts, signs, strict=True)])
            for parts in (self._parts(row[0]) for row in rows)
        ]
        self._forms.append(torch.stack(forms).cpu())

    def trace(self, matrix: Matrix, names: Iterable[str] | None = None) -> Estimate:
        """The trace of a matrix, or of its diagonal blocks of these parameters."""
        columns = slice(None) if names is None else [self.names.index(name) for name in names]
        members = self._members(matrix)
        return summarise([(members @ form)[columns].sum().item() for form in self._forms])

    def frobenius(self, matrix: Matrix) -> Estimate:
        """||A||_F."""
        return root_of(summarise(self._inner(matrix, matrix)))

    def cosine(self, first: Matrix, second: Matrix) -> Estimate:
        """<A, B>_F / (||A||_F ||B||_F)."""
        return cosine_of(self._inner(first, second), self._inner(first, first), self._inner(second, second))

    def ratio(self, above: Matrix, below: Matrix) -> Estimate:
        """||A||_F / ||B||_F, its error by the delta method; nan where B is 0."""
        a, b = self._inner(above, above), self._inner(below, below)
        if fmean(b) == 0:
            return Estimate(math.nan, math.nan, len(a))
        ratio = math.sqrt(fmean(a) / fmean(b))
        if fmean(a) == 0:
            return Estimate(0.0, 0.0 if len(a) > 1 else math.nan, len(a))
        influence = [ratio / 2 * (x / fmean(a) - y / fmean(b)) for x, y in zip(a, b, strict=True)]
        return Estimate(ratio, summarise(influence).stderr, len(a))

    def _parts(self, vector: Float[Tensor, "P"]) -> list[Tensor]:
        return list(self._products.layout.as_dict(vector).values())

    def _members(self, matrix: Matrix) -> Float[Tensor, "terms"]:
        """Which terms a matrix is the sum of, as ones and zeros."""
        return torch.tensor(
            [matrix in ("hessian", term) or (matrix == "nme" and term != "gauss_newton") for term in self._terms],
            dtype=torch.float64,
        )

    def _inner(self, first: Matrix, second: Matrix) -> list[float]:
        a, b = self._members(first), self._members(second)
        return [(a @ gram @ b).item() for gram in self._grams]


def gram_of(vectors: Sequence[Tensor]) -> Float[Tensor, "K K"]:
    """All inner products of some vectors, in float64 a piece at a time: no whole copies of them are made.

    The factors are widened, not their products, which leave the range of float16, or of float32, much sooner.
    """
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors[0].device)
    for pieces in zip(*(vector.split(_PIECE) for vector in vectors), strict=True):
        rows = [piece.double() for piece in pieces]
        for i, a in enumerate(rows):
            for j, b in enumerate(rows[: i + 1]):
                gram[i, j] += torch.dot(a, b)
    return (gram + gram.tril(-1).T).cpu()
