"""Do eigensolvers find the six eigenvalues of largest magnitude, each as often as it is there? Run: make oracles

Symmetric matrices in float32 with known spectra, in random directions. Every solver is called as a user would, with 100
steps where it asks for a number; "right" are values that match a true one, each used once, within 0.5 % of the largest.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import twofold
from results import Table

K, STEPS, TOLERANCE = 6, 100, 5e-3

SPECTRA = {
    "20, 10, 5, 2, 1 and 180 in [0, 0.001]": torch.cat(
        [torch.tensor([20.0, 10, 5, 2, 1]), torch.linspace(0, 1e-3, 180)]
    ),
    "50 once, 1 199 times": torch.cat([torch.tensor([50.0]), torch.ones(199)]),
    "50 100 times, 1 100 times": torch.cat([torch.full((100,), 50.0), torch.ones(100)]),
    "identity": torch.ones(200),
    "zero": torch.zeros(200),
    "-30 to -10, 150 in [-1, 1], 12": torch.cat(
        [torch.linspace(-30, -10, 5), torch.linspace(-1, 1, 150), torch.tensor([12.0])]
    ),
    "9, -9, 8, -8, 7, -7, 150 in [-1, 1]": torch.cat(
        [torch.tensor([9.0, -9, 8, -8, 7, -7]), torch.linspace(-1, 1, 150)]
    ),
    "9 thrice, 7 and -8 twice, 200 in [-2, 2]": torch.cat(
        [torch.tensor([9.0, 9, 9, 7, 7, -8, -8]), torch.linspace(-2, 2, 200)]
    ),
}


class Quadratic(nn.Module):
    """theta'A theta / 2, whose Hessian is A."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A, self.theta = A, nn.Parameter(torch.zeros(len(A)))

    def forward(self, _: Tensor) -> Tensor:
        return self.theta @ (self.A @ self.theta) / 2


def _twofold(A: Tensor) -> Tensor:
    return twofold.eigsh(A, K, which="LM").values


def _curvlinops(A: Tensor) -> Tensor:
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    return fast_lanczos(A, STEPS)[0]


def _scipy(A: Tensor) -> Tensor:
    from scipy.sparse.linalg import eigsh

    return torch.from_numpy(eigsh(A.numpy(), K, which="LM")[0])


def _eigenthings(reorthogonalize: bool | None) -> Callable[[Tensor], Tensor]:
    def values(A: Tensor) -> Tensor:
        from hessian_eigenthings import LambdaOperator, lanczos

        operator = LambdaOperator(A.__matmul__, len(A), dtype=A.dtype)
        return lanczos(operator, k=K, max_iter=STEPS, seed=0, reorthogonalize=reorthogonalize).eigenvalues

    return values


def _pyhessian(A: Tensor) -> Tensor:
    from pyhessian import hessian

    nothing = torch.zeros(1)
    return torch.tensor(
        hessian(Quadratic(A), lambda z, _: z, data=(nothing, nothing), cuda=False).eigenvalues(top_n=K)[0]
    )


SOLVERS: dict[str, Callable[[Tensor], Tensor]] = {
    "twofold": _twofold,
    "curvlinops' Lanczos": _curvlinops,
    "SciPy, by curvlinops' `to_scipy`": _scipy,
    "hessian-eigenthings": _eigenthings(None),
    "hessian-eigenthings, reorthogonalize=True": _eigenthings(True),
    "PyHessian": _pyhessian,
}


def spectra() -> Table:
    """Every spectrum by every solver.

    Raises:
        AssertionError: ours misses an eigenvalue.
    """
    rows = []
    for name, values in SPECTRA.items():
        truth = values[values.abs().argsort(descending=True)[:K]]
        row: dict[str, Any] = {"spectrum": name}
        for solver, solve in SOLVERS.items():
            torch.manual_seed(0)
            try:
                found = solve(_with_spectrum(values))
            except Exception as error:
                row[solver] = type(error).__name__
                continue
            found = found[found.abs().argsort(descending=True)[:K]]
            right = _right(found.tolist(), truth.tolist())
            assert right == K or solver != "twofold", f"{name}: ours found {found.tolist()}"
            row[solver] = f"{right} of {K}" + ("" if right == K else f": {', '.join(f'{v:.3g}' for v in found)}")
        rows.append(row)
    return Table("spectra", rows)


def _with_spectrum(values: Tensor) -> Tensor:
    Q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    A = (Q * values.double()) @ Q.T
    return ((A + A.T) / 2).float()


def _right(found: list[float], truth: list[float]) -> int:
    left, allowed = list(truth), TOLERANCE * max(map(abs, truth)) + 1e-6
    for value in found:
        nearest = min(left, key=lambda t: abs(t - value), default=float("inf"))
        if abs(nearest - value) <= allowed:
            left.remove(nearest)
    return len(truth) - len(left)
