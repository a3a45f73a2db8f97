"""Are the matrices right, ours and others'? Run: make oracles

Every case is a small model in float64, whose H and GN are computed by brute force (`dense.py`); the same matrices are
read off the products of each library, and the table holds ||difference||_F / ||truth||_F. Where a peer is right it is
an independent oracle for ours. Where it is not the table says how far off it is; each case names those, and the run
fails if a library does otherwise.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import dense
import twofold
from oracle_cases import Case, cases, labels, mlp
from peers import Batches, installed
from results import Table, show
from spectra import spectra

EXACT = 1e-9


@contextmanager
def in_float64() -> Iterator[None]:
    """Tensors without a dtype are of float64 here, and drawn alike each time."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def matrices() -> Table:
    """Every case by every library, in float64.

    Raises:
        AssertionError: brute force disagrees with differences, ours with brute force, or a peer with its case.
    """
    rows = []
    for name, build in cases().items():
        with in_float64():
            rows.append(_row(name, build()))
    return Table("matrices", rows)


def _row(name: str, case: Case) -> dict[str, object]:
    problem = (case.loss_fn, case.batches)
    truth = {
        "H": dense.hessian(copy.deepcopy(case.model), *problem),
        "GN": dense.gauss_newton(copy.deepcopy(case.model), *problem),
    }
    by_differences = dense.error(dense.by_differences(copy.deepcopy(case.model), *problem), truth["H"])
    assert by_differences < 1e-7, f"{name}: brute force is {by_differences} off differences of the gradient"
    row: dict[str, object] = {"case": name, "P": len(truth["H"]), "differences": f"{by_differences:.0e}"}
    for column, make in _columns().items():
        row[column] = _judged(case, column, make, truth[column.split()[-1]], f"{name}: {column}")
    return row | {"why": case.why}


def _columns() -> dict[str, Callable]:
    found: dict[str, Callable] = {"twofold H": twofold.Hessian, "twofold GN": twofold.GaussNewton}
    for name, peer in installed().items():
        found[f"{name} H"] = peer.hessian
        if peer.gauss_newton:
            found[f"{name} GN"] = peer.gauss_newton
    return found


def _judged(case: Case, column: str, make: Callable, truth: Tensor, where: str) -> str:
    """What the table says of one matrix, after it was held against what the case says."""
    try:
        operator = make(copy.deepcopy(case.model), case.loss_fn, case.batches)
        matrix = dense.of_products(lambda v: operator @ v, len(truth))
    except (RuntimeError, NotImplementedError) as error:
        if column not in case.refused:
            raise AssertionError(f"{where} refused: {error}") from error
        return "refused"
    error, asymmetry = dense.error(matrix, truth), dense.error(matrix.T, matrix)
    assert (error >= EXACT) == (column in case.wrong), f"{where} is {error} off"
    assert column not in case.refused, f"{where} was not refused"
    if error < EXACT:
        return f"{error:.0e}"
    return f"**{100 * error:.0f} % off**" + (f", {100 * asymmetry:.0f} % asymmetric" if asymmetry > EXACT else "")


def activation_diagonals() -> Table:
    """BackPACK's diag H - diag GGN against the diagonal of our activation NME.

    In a chain of layers the outputs are linear in each single weight but for the activations, so nothing else is on the
    diagonal of the NME.

    Raises:
        AssertionError: they differ.
    """
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact, DiagHessian

    rows = []
    for name, build in _chains().items():
        with in_float64():
            model, loss_fn, ((x, y),) = build()
            ours = twofold.ActivationNME(model, loss_fn, (x, y)).to_dense().diagonal()
            extended = extend(copy.deepcopy(model))
            with backpack(DiagHessian(), DiagGGNExact()):
                extend(loss_fn)(extended(x), y).backward()
        hessian = torch.cat([p.diag_h.flatten() for p in extended.parameters()])
        theirs = hessian - torch.cat([p.diag_ggn_exact.flatten() for p in extended.parameters()])
        difference = (torch.linalg.norm(ours - theirs) / torch.linalg.norm(hessian)).item()
        assert difference < EXACT, f"{name}: the activation NME's diagonal is {difference} off BackPACK's"
        share = (torch.linalg.norm(theirs) / torch.linalg.norm(hessian)).item()
        rows.append({"chain": name, "P": len(ours), "share of diag H": share, "difference": f"{difference:.0e}"})
    return Table("activation_diagonals", rows)


def _chains() -> dict[str, Callable[[], tuple[nn.Module, nn.Module, Batches]]]:
    def classifier(act: Callable[[], nn.Module]) -> Callable:
        return lambda: (mlp(4, 5, 4, 3, act=act), nn.CrossEntropyLoss(), labels(8))

    def regression() -> tuple[nn.Module, nn.Module, Batches]:
        return mlp(4, 5, 4, 2, act=nn.Sigmoid), nn.MSELoss(), [(torch.randn(8, 4), torch.randn(8, 2))]

    def convolution() -> tuple[nn.Module, nn.Module, Batches]:
        model = nn.Sequential(
            *(nn.Conv2d(1, 2, 3, padding=1), nn.Sigmoid(), nn.Conv2d(2, 2, 2), nn.Tanh()),
            *(nn.MaxPool2d(2, padding=1), nn.Flatten(), nn.Linear(8, 3)),
        )
        return model, nn.CrossEntropyLoss(), labels(8, features=(1, 4, 4))

    return {
        "MLP, tanh": classifier(nn.Tanh),
        "MLP, sigmoid, squared error": regression,
        "MLP, ELU": classifier(nn.ELU),
        "MLP, SELU": classifier(nn.SELU),
        "MLP, log sigmoid": classifier(nn.LogSigmoid),
        "MLP, leaky ReLU": classifier(nn.LeakyReLU),
        "convolutions, sigmoid and tanh, max pooling": convolution,
    }


if __name__ == "__main__":
    for make in (matrices, activation_diagonals, spectra):
        show(make())
