"""Curvature matrices by brute force: one entry's derivative after another, from the definition, all data at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Batches = list[tuple[Tensor, Tensor]]


def whole(batches: Batches) -> tuple[Tensor, Tensor]:
    """All batches as one."""
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def hessian(model: nn.Module, loss_fn: nn.Module, batches: Batches) -> Tensor:
    """H [P, P]: the derivatives of every entry of the gradient of the loss of the whole set."""
    x, y = whole(batches)
    parameters = list(model.parameters())
    with _right_kernels():
        gradient = _flat(torch.autograd.grad(loss_fn(model(x), y), parameters, create_graph=True))
        return _jacobian(gradient, parameters)


def gauss_newton(model: nn.Module, loss_fn: nn.Module, batches: Batches) -> Tensor:
    """GN [P, P] = J' H_z J, with J the derivatives of every output and H_z the Hessian of the loss in the outputs."""
    x, y = whole(batches)
    with _right_kernels():
        outputs = model(x)
        J = _jacobian(outputs.flatten(), list(model.parameters()))
    z = outputs.detach().requires_grad_()
    (residual,) = torch.autograd.grad(loss_fn(z, y), z, create_graph=True)
    return J.T @ _jacobian(residual.flatten(), [z]) @ J


def by_differences(model: nn.Module, loss_fn: nn.Module, batches: Batches, step: float = 1e-5) -> Tensor:
    """H [P, P] by central differences of the gradient: no second derivative by autograd is in it."""
    x, y = whole(batches)
    parameters = list(model.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(point: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(point, parameters)
        return _flat(torch.autograd.grad(loss_fn(model(x), y), parameters))

    columns = [(gradient(start + e) - gradient(start - e)) / (2 * step) for e in step * torch.eye(len(start))]
    nn.utils.vector_to_parameters(start, parameters)
    return torch.stack(columns, dim=1)


def of_products(product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The matrix [P, P] that a product multiplies with."""
    return torch.stack([product(e).detach() for e in torch.eye(size)], dim=1)


def error(matrix: Tensor, truth: Tensor) -> float:
    """||matrix - truth||_F / ||truth||_F."""
    return (torch.linalg.norm(matrix - truth) / torch.linalg.norm(truth)).item()


@contextmanager
def _right_kernels() -> Iterator[None]:
    """torch's fused attention has no second derivative, and that of its weight norm is wrong."""

    def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
        others = [d for d in range(v.dim()) if d != dim]
        return g * v / torch.linalg.vector_norm(v, dim=others, keepdim=True)

    with sdpa_kernel(SDPBackend.MATH), mock.patch.object(torch, "_weight_norm", weight_norm):
        yield


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _jacobian(outputs: Tensor, variables: list[Tensor]) -> Tensor:
    rows = [
        _flat(torch.autograd.grad(output, variables, retain_graph=True, materialize_grads=True)) for output in outputs
    ]
    return torch.stack(rows)
