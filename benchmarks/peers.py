"""The other libraries behind one interface, each called as its documentation says.

They need help that twofold's users do not give, and get it here: attention by the MATH kernel (`helped`) and BatchNorm
in train mode without running statistics (`without_statistics`). Their checks for determinism are off while they are
timed. Adding a library: its functions, and a row in PEERS.
"""

import contextlib
import copy
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Batches = list[tuple[Tensor, Tensor]]
Make = Callable[[nn.Module, nn.Module, Batches], Any]


@dataclass(frozen=True)
class Peer:
    """One library: what makes its operators of (model, loss, batches), and what it computes from such an operator.

    Attributes:
        package: its name on PyPI.
        module: its name in Python.
        hessian: makes H, with @; None for what it does not offer, here and below.
        gauss_newton: makes GN, with @.
        trace: trace(operator, number of probes), by Hutchinson's estimator.
        lanczos: lanczos(operator, number of products) -> approximate eigenvalues.
    """

    package: str
    module: str
    hessian: Make
    gauss_newton: Make | None
    trace: Callable[[Any, int], float]
    lanczos: Callable[[Any, int], Tensor]


def installed() -> dict[str, Peer]:
    """The libraries that this environment has."""
    return {name: peer for name, peer in PEERS.items() if importlib.util.find_spec(peer.module)}


def helped() -> Any:
    """A context in which attention can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH)


def without_statistics(model: nn.Module) -> nn.Module:
    """A copy whose train-mode BatchNorm keeps no running statistics, for libraries that cannot have them move."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


# curvlinops


def _curvlinops_hessian(model: nn.Module, loss_fn: nn.Module, batches: Batches) -> Any:
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(model, loss_fn, list(model.parameters()), batches, check_deterministic=False)


def _curvlinops_gauss_newton(model: nn.Module, loss_fn: nn.Module, batches: Batches) -> Any:
    from curvlinops import GGNLinearOperator

    return GGNLinearOperator(model, loss_fn, list(model.parameters()), batches, check_deterministic=False)


def _curvlinops_trace(operator: Any, probes: int) -> float:
    from curvlinops import hutchinson_trace

    # One by one: all at once takes the memory of as many graphs, and no less time here.
    return sum(hutchinson_trace(operator, 1).item() for _ in range(probes)) / probes


def _curvlinops_lanczos(operator: Any, steps: int) -> Tensor:
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    return fast_lanczos(operator, steps)[0]


def lanczos_by_scipy(operator: Any, steps: int) -> None:
    """The same number of products in SciPy's eigsh, which orthogonalises, with a curvlinops operator."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    class Enough(Exception):  # noqa: N818
        pass

    def product(vector: Any) -> Any:
        if next(count) == steps:
            raise Enough
        return exported.matvec(vector)

    count, exported = itertools.count(), operator.to_scipy(dtype="float32")
    with contextlib.suppress(Enough):
        eigsh(LinearOperator(operator.shape, product, dtype="float32"), 10, which="LM", ncv=steps, tol=0)


# hessian-eigenthings


def _eigenthings_hessian(model: nn.Module, loss_fn: nn.Module, batches: Batches) -> Any:
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(model, batches, supervised_loss(loss_fn))


def _eigenthings_gauss_newton(model: nn.Module, loss_fn: nn.Module, batches: Batches) -> Any:
    from hessian_eigenthings import GGNOperator, supervised_forward, supervised_loss_of_output

    return GGNOperator(model, batches, supervised_forward, supervised_loss_of_output(loss_fn))


def _eigenthings_trace(operator: Any, probes: int) -> float:
    from hessian_eigenthings import hutchinson

    return hutchinson(operator, num_samples=probes, seed=0).estimate


def _eigenthings_lanczos(operator: Any, steps: int) -> Tensor:
    from hessian_eigenthings import lanczos

    return lanczos(operator, k=10, max_iter=steps, seed=0).eigenvalues


# PyHessian


class _PyHessian:
    """PyHessian's object, with @. A single batch's graph is kept, as it does; it puts the model into eval mode."""

    def __init__(self, model: nn.Module, loss_fn: nn.Module, batches: Batches) -> None:
        from pyhessian import hessian

        training = model.training
        source = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
        if len(batches) > 1:
            loss_fn(model(batches[0][0]), batches[0][1]).backward()  # it takes .grad for granted
        self.computer = hessian(model, loss_fn, cuda=False, **source)
        model.train(training)

    def __matmul__(self, vector: Tensor) -> Tensor:
        from pyhessian.utils import hessian_vector_product

        shapes = [parameter.shape for parameter in self.computer.params]
        parts = [part.view(s) for part, s in zip(vector.split([s.numel() for s in shapes]), shapes, strict=True)]
        if self.computer.full_dataset:
            product = self.computer.dataloader_hv_product(parts)[1]
        else:
            product = hessian_vector_product(self.computer.gradsH, self.computer.params, parts)
        return torch.cat([part.flatten() for part in product])


def _pyhessian_trace(operator: _PyHessian, probes: int) -> float:
    samples = operator.computer.trace(maxIter=probes, tol=-1.0)
    return sum(samples) / len(samples)


def _pyhessian_lanczos(operator: _PyHessian, steps: int) -> Tensor:
    with _torch_eig():
        return torch.as_tensor(operator.computer.density(iter=steps, n_v=1)[0][0])


@contextlib.contextmanager
def _torch_eig() -> Iterator[None]:
    """PyHessian's density needs torch.eig, which torch has removed."""

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    removed = torch.eig
    torch.eig = eig
    try:
        yield
    finally:
        torch.eig = removed


PEERS = {
    "curvlinops": Peer(
        "curvlinops-for-pytorch",
        "curvlinops",
        _curvlinops_hessian,
        _curvlinops_gauss_newton,
        _curvlinops_trace,
        _curvlinops_lanczos,
    ),
    "hessian-eigenthings": Peer(
        "hessian-eigenthings",
        "hessian_eigenthings",
        _eigenthings_hessian,
        _eigenthings_gauss_newton,
        _eigenthings_trace,
        _eigenthings_lanczos,
    ),
    "PyHessian": Peer("PyHessian", "pyhessian", _PyHessian, None, _pyhessian_trace, _pyhessian_lanczos),
}
