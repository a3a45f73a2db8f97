"""Derivatives by brute force, and the stand-ins that the tests put in the place of phi''."""

import torch
import torch.nn.functional as F

from twofold.activations import gaussian

NATIVE = {
    "gelu": (F.gelu, lambda x: (2 - x * x) * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5),
    "tanh": (torch.tanh, lambda x: -2 * torch.tanh(x) * (1 - torch.tanh(x) ** 2)),
    "sin": (torch.sin, lambda x: -torch.sin(x)),
    "relu": (torch.relu, torch.zeros_like),
}
STAND_INS = {"zero": 0, "one": 1, "gaussian": gaussian(3.0), "function": torch.cos}


def evaluated(f, x):
    return f(x) if callable(f) else torch.full_like(x, f)


def slope(phi, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(phi(x).sum(), x)[0]


def second(y, x):
    """The second derivative of a sum of elementwise y in x."""
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return torch.autograd.grad(g.sum(), x)[0]


def flat_grad(y, parameters, **kwargs):
    return torch.cat([g.flatten() for g in torch.autograd.grad(y, parameters, **kwargs)])


def dense_hessian(loss, parameters):
    gradient = flat_grad(loss, parameters, create_graph=True)
    rows = [flat_grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in gradient]
    return torch.stack(rows)
