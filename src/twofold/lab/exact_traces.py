"""tr GN and tr NME of a multilayer perceptron without sampling: penalties that no probe makes noisy.

With h_1, ..., h_M the pre-activations (h_M = z, the outputs), a_m = phi(h_m), a_0 = x, s_l = |a_(l-1)|^2 + 1 and
J_ml = dh_m / dh_l, the gradients of h_m over all weights and biases have the products
K_m = sum_(l <= m) s_l J_ml J_ml' [w_m, w_m]. With L_n the loss of an example and H_z its Hessian over z,

    tr GN  = mean_n tr(H_z K_M)
    tr NME = mean_n sum_(m < M) sum_u (dL_n / da_m)_u phi''(h_m)_u (K_m)_uu

A product of weights and activations bends along no single weight, so phi'' is all that the trace of the NME has.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twofold.errors import TwofoldError


class ExactTraces(NamedTuple):
    """The mean cross-entropy of a batch and the traces of both halves of its Hessian, on one graph."""

    loss: Tensor
    gauss_newton: Tensor
    nme: Tensor


def exact_traces(model: nn.Module, inputs: Tensor, targets: Tensor) -> ExactTraces:
    """Loss, tr GN and tr NME over all weights and biases, by the formulas above; they can be differentiated.

    Args:
        model: linear layers with an elementwise activation between each two, as `twofold.lab.models.mlp` builds them.
        inputs: x [N, ...].
        targets: the class of each example [N].

    Raises:
        TwofoldError: the model is built otherwise.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> loss, gauss_newton, nme = exact_traces(model, torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    """
    linears, activations = _layers(model)
    active = hidden = inputs.flatten(1)
    scales, bends = [], []
    jacobians: list[Tensor] = []  # of what is reached so far with respect to h_1, h_2, ...
    for linear, activation in zip(linears, [*activations, None], strict=True):
        scales.append(active.square().sum(1)[:, None, None] + 1)
        hidden = linear(active)
        unit = torch.eye(hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        jacobians = [*(linear.weight @ jacobian for jacobian in jacobians), unit.expand(len(hidden), -1, -1)]
        if activation is not None:
            active, slope, bend = _derivatives(activation, hidden)
            products = torch.stack([(s * j.square()).sum(2) for s, j in zip(scales, jacobians, strict=True)]).sum(0)
            bends.append(bend * products)
            jacobians = [slope[:, :, None] * jacobian for jacobian in jacobians]
    p = hidden.softmax(1)
    gauss_newton = nme = hidden.new_zeros(())
    for s, jacobian in zip(scales, jacobians, strict=True):
        mean = torch.einsum("nc,ncu->nu", p, jacobian)
        spread = torch.einsum("nc,ncu->nu", p, jacobian.square()) - mean.square()  # the diagonal of J' H_z J
        gauss_newton = gauss_newton + (s[:, 0, 0] * spread.sum(1)).mean()
    residual = p - F.one_hot(targets, p.shape[1])
    for jacobian, linear, bend in zip(jacobians[1:], linears[1:], bends, strict=True):
        slope = torch.einsum("nc,ncv->nv", residual, jacobian) @ linear.weight  # dL_n / da_m
        nme = nme + (slope * bend).sum(1).mean()
    return ExactTraces(F.cross_entropy(hidden, targets), gauss_newton, nme)


@dataclass(frozen=True)
class ExactTracePenalty:
    """L + strength tr C with the trace exact: a `backward` for multilayer perceptrons under cross-entropy.

    Args:
        strength: factor of the trace.
        matrix: "hessian" or "gauss_newton".

    Raises:
        TwofoldError: there is no such matrix.
    """

    strength: float
    matrix: Literal["hessian", "gauss_newton"] = "hessian"

    def __post_init__(self) -> None:
        if self.matrix not in ("hessian", "gauss_newton"):
            raise TwofoldError(f'The trace of {self.matrix!r} has no penalty; expected "hessian" or "gauss_newton".')

    def backward(self, model: nn.Module, loss_fn: object, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Add the gradient of the penalised cross-entropy to .grad and return the cross-entropy."""
        loss, gauss_newton, nme = exact_traces(model, *batch)
        trace = gauss_newton + nme if self.matrix == "hessian" else gauss_newton
        (loss + self.strength * trace).backward()
        return loss.detach()


def _layers(model: nn.Module) -> tuple[list[nn.Linear], list[nn.Module]]:
    layers = [layer for layer in model.children() if not isinstance(layer, nn.Flatten)]
    linears = [layer for layer in layers[::2] if isinstance(layer, nn.Linear)]
    activations = layers[1::2]
    if not isinstance(model, nn.Sequential) or len(linears) != len(layers[::2]) or len(layers) % 2 == 0:
        raise TwofoldError(f"Exact traces are for linear layers with an activation between each two, not for\n{model}")
    return linears, activations


def _derivatives(activation: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """phi, phi' and phi'' at each entry, on the graph."""
    active = activation(hidden)
    (slope,) = torch.autograd.grad(active.sum(), hidden, create_graph=True)
    if not slope.requires_grad:
        return active, slope, torch.zeros_like(slope)
    (bend,) = torch.autograd.grad(slope.sum(), hidden, create_graph=True)
    return active, slope, bend
