"""Dense brute force: H, GN and NME of small models, by torch.func alone, sharing no code with twofold."""

import sys
from dataclasses import dataclass
from unittest import mock

import torch
from torch.func import functional_call, hessian
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class Dense:
    hessian: torch.Tensor
    gauss_newton: torch.Tensor

    @property
    def nme(self):
        return self.hessian - self.gauss_newton


def as_function(model, *, forward=None, params=None):
    """Return (theta, f) with f(theta, batch) -> (outputs, targets), a function of the chosen parameters as a vector."""
    chosen = {
        n: p.detach() for n, p in model.named_parameters() if (p.requires_grad if params is None else n in params)
    }
    buffers = {n: b.detach() for n, b in model.named_buffers()}
    sizes = [p.numel() for p in chosen.values()]
    theta = torch.cat([p.reshape(-1) for p in chosen.values()])
    run = forward or (lambda m, batch: (m(batch[0]), batch[1]))

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return run(self.inner, batch)

    def outputs(vector, batch):
        parts = vector.split(sizes)
        named = {f"inner.{n}": q.view(p.shape) for (n, p), q in zip(chosen.items(), parts, strict=True)}
        named |= {f"inner.{n}": b.clone() for n, b in buffers.items()}
        # torch's own second derivative of weight norm is wrong, so the reference spells it out.
        hooked = sys.modules["torch.nn.utils.weight_norm"]
        with (
            sdpa_kernel(SDPBackend.MATH),
            mock.patch.object(torch, "_weight_norm", weight_norm),
            mock.patch.object(hooked, "_weight_norm", weight_norm),
        ):
            return functional_call(call, named, (batch,))

    call = Call()
    return theta, outputs


def dense(model, loss_fn, batches, counts=None, *, forward=None, params=None):
    """Average the dense matrices of each batch with weights `counts` (None: plain sum)."""
    theta, outputs = as_function(model, forward=forward, params=params)
    total = torch.zeros(2, theta.numel(), theta.numel(), dtype=theta.dtype)
    for batch, count in zip(batches, counts or [1.0] * len(batches), strict=True):
        z, y = outputs(theta, batch)
        z = z.detach()
        full = torch.autograd.functional.hessian(lambda v, b=batch, t=y: loss_fn(outputs(v, b)[0], t), theta)
        J = jacobian_of(outputs, theta, batch)
        H_z = hessian(lambda q, s=z.shape, t=y: loss_fn(q.view(s), t))(z.reshape(-1))
        total += count * torch.stack([full, J.T @ H_z @ J])
    if counts is not None:
        total /= sum(counts)
    return Dense(*total)


def jacobian_of(outputs, theta, batch):
    """dz/dtheta of one batch, [outputs, P]."""
    return torch.autograd.functional.jacobian(lambda v: outputs(v, batch)[0].reshape(-1), theta)


def weight_norm(v, g, dim=0):
    return v * (g / v.square().sum([axis for axis in range(v.dim()) if axis != dim], keepdim=True).sqrt())


def relative(a, b):
    """||a - b|| / ||b||, or ||a|| where b is zero."""
    scale = b.norm()
    return ((a - b).norm() / scale if scale > 0 else a.norm()).item()
