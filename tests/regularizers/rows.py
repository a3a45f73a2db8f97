"""One row a regularizer: how it is built, and its formula written again on one flat vector in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp

from twofold.curvature.probes import signs
from twofold.regularizers import (
    ASAM,
    GSAM,
    SAM,
    USAM,
    WSAM,
    EigenSAM,
    FriendlySAM,
    GaussNewtonTrace,
    GradientPenalty,
    HessianTrace,
    LookSAM,
    WeightNoise,
)


class Problem:
    """A small model and batch as functions of one flat vector theta."""

    def __init__(self, model=None, loss_fn=F.cross_entropy, batch=None):
        self.model = model or nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3)).double()
        self.loss_fn = loss_fn
        self.batch = batch or (torch.randn(6, 3).double(), torch.randint(3, (6,)))
        self.parameters = dict(self.model.named_parameters())
        self.theta = torch.cat([p.detach().reshape(-1) for p in self.parameters.values()])

    def outputs(self, theta):
        parts = theta.split([p.numel() for p in self.parameters.values()])
        named = {n: part.view(p.shape) for part, (n, p) in zip(parts, self.parameters.items(), strict=True)}
        return functional_call(self.model, named, (self.batch[0],))

    def loss(self, theta):
        return self.loss_fn(self.outputs(theta), self.batch[1])

    def gradient(self, theta=None):
        return grad(self.loss)(self.theta if theta is None else theta)

    def output_hessian(self, z):
        return hessian(lambda q: self.loss_fn(q.view(z.shape), self.batch[1]))(z.reshape(-1))

    def gauss_newton(self, theta, z=None):
        """J' H_z J, with H_z at z where z is given."""
        J = jacrev(lambda t: self.outputs(t).reshape(-1))(theta)
        return J.T @ self.output_hessian(self.outputs(theta) if z is None else z) @ J

    def matrix(self, kind):
        H, GN = hessian(self.loss)(self.theta), self.gauss_newton(self.theta)
        return {"hessian": H, "gauss_newton": GN, "nme": H - GN}[kind]

    def mask(self, names):
        return torch.cat([torch.full((p.numel(),), float(n in names)) for n, p in self.parameters.items()]).double()

    def draws(self):
        """The generator that a regularizer draws from when torch's global one is in its present state."""
        return torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def normal(self, generator):
        return self.each(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype))

    def signs(self, generator):
        return self.each(lambda p: signs(p.numel(), generator).double())

    def each(self, f):
        return torch.cat([f(p.detach()).reshape(-1) for p in self.parameters.values()])


def unit(v):
    return v / (v.norm() + 1e-12)


def sam(problem, rho, mask):
    return problem.gradient(problem.theta + rho * unit(problem.gradient() * mask))


def usam(problem, rho, mask):
    return problem.gradient(problem.theta + rho * problem.gradient() * mask)


def asam(problem, rho, mask, eta=0.01):
    T = problem.theta.abs() + eta
    biases = problem.mask([name for name in problem.parameters if name.endswith("bias")]).bool()
    T = torch.where(biases, torch.ones_like(T), T)
    g = problem.gradient() * mask
    return problem.gradient(problem.theta + rho * T * T * g / ((T * g).norm() + 1e-12))


def wsam(problem, rho, mask, gamma=0.9):
    a = gamma / (1 - gamma)
    return (1 - a) * problem.gradient() + a * sam(problem, rho, mask)


def gsam(problem, rho, mask, alpha=0.4):
    g, uphill = problem.gradient(), sam(problem, rho, mask)
    return uphill - alpha * mask * (g - (g * mask) @ unit(uphill * mask) * unit(uphill * mask))


def top_eigenvector(problem, mask):
    chosen = mask.bool()
    vector = torch.zeros_like(mask)
    vector[chosen] = torch.linalg.eigh(problem.matrix("hessian")[chosen][:, chosen]).eigenvectors[:, -1]
    return vector


def eigen_sam(problem, rho, mask, alpha=0.2):
    direction, v = unit(problem.gradient() * mask), top_eigenvector(problem, mask)
    u = direction + alpha * (direction @ v).sign() * (v - direction @ v * direction)
    return problem.gradient(problem.theta + rho * u)


def penalty(problem, rho, mask, kind="hessian", p=1):
    g = problem.gradient()
    direction = unit(g * mask) if p == 1 else 2 * g * mask
    return g + rho * mask * (problem.matrix(kind) @ direction)


def penalty_difference(problem, rho, mask, p=1, radius=0.05):
    g = problem.gradient()
    change = problem.gradient(problem.theta + radius * unit(g * mask)) - g
    factor = rho if p == 1 else 2 * rho * (g * mask).norm()
    return g + factor / radius * mask * change


def weight_noise(problem, sigma, mask, scale="isotropic", n=2, antithetic=False):
    generator = problem.draws()
    spread = {
        "isotropic": torch.ones_like,
        "multiplicative": torch.abs,
        "filter": lambda p: (
            p.flatten(1).norm(dim=1).view(-1, *[1] * (p.dim() - 1)).expand(p.shape)
            if p.dim() > 1
            else p.norm().expand(p.shape)
        ),
    }[scale]
    noises = [drawn_over(problem, mask, torch.randn, generator) * problem.each(spread) * sigma for _ in range(n)]
    if antithetic:
        noises += [-e for e in noises]
    return sum(problem.gradient(problem.theta + e) for e in noises) / len(noises)


def drawn_over(problem, mask, kind, generator):
    """Draw for the chosen parameters only, in their order."""
    parts = []
    for p, chosen in zip(
        problem.parameters.values(), mask.split([p.numel() for p in problem.parameters.values()]), strict=True
    ):
        if not chosen.any():
            parts.append(torch.zeros(p.numel()).double())
        elif kind is torch.randn:
            parts.append(torch.randn(p.shape, generator=generator, dtype=p.dtype).reshape(-1))
        else:
            parts.append(signs(p.numel(), generator).double())
    return torch.cat(parts)


def hessian_trace(problem, strength, mask, n=2):
    generator = problem.draws()
    total = problem.gradient()
    for _ in range(n):
        v = drawn_over(problem, mask, torch.randint, generator)

        def slope(t, v=v):
            return jvp(problem.loss, (t,), (v,))[1]

        total = total + strength / n * grad(lambda t, v=v, slope=slope: jvp(slope, (t,), (v,))[1])(problem.theta)
    return total


def gauss_newton_trace(problem, strength, mask, through="jacobian", estimator="labels", n=2):
    generator = problem.draws()
    total = problem.gradient()
    z0 = problem.outputs(problem.theta)
    p0 = z0.softmax(1)
    for _ in range(n):
        if estimator == "hutchinson":
            v = drawn_over(problem, mask, torch.randint, generator)

            def value(t, v=v):
                tangent = jvp(lambda s: problem.outputs(s).reshape(-1), (t,), (v,))[1]
                return tangent @ problem.output_hessian(z0 if through == "jacobian" else problem.outputs(t)) @ tangent

        else:
            if through == "jacobian":
                labels = torch.multinomial(p0, 1, generator=generator)[:, 0]

                def residual(z, labels=labels):
                    return (p0 - F.one_hot(labels, 3)) / len(z) ** 0.5

            else:
                xi = torch.randn(z0.shape, generator=generator, dtype=z0.dtype)

                def residual(z, xi=xi):
                    p = z.softmax(1)
                    return (p.sqrt() * xi - p * (p.sqrt() * xi).sum(1, keepdim=True)) / len(z) ** 0.5

            def value(t, residual=residual):
                J = jacrev(problem.outputs)(t)
                s = torch.einsum("ncp,nc->p", J, residual(problem.outputs(t))) * mask
                return s @ s

        total = total + strength / n * grad(value)(problem.theta)
    return total


@dataclass
class Row:
    """A regularizer by its strength, and its direction by the formula: reference(problem, strength, mask).

    passes: how often the model runs; order: the power of the strength with which the correction begins.
    """

    make: Callable[..., Any]
    reference: Callable[..., torch.Tensor]
    passes: int = 1
    closure: bool = False
    draws: bool = False
    remembers: bool = False
    order: int = 1
    half_precision: bool = True
    tolerance: float = 1e-9


class Decoupled(WSAM):
    """Attached to an optimiser over whatever model it is given; what follows the step is part of the update."""

    def backward(self, model, *arguments, **options):
        return super().backward(self.attached_to(model), *arguments, **options)

    def loss(self, model, *arguments, **options):
        return super().loss(self.attached_to(model), *arguments, **options)

    def attached_to(self, model):
        if self._optimizer is None:
            self.attach(torch.optim.SGD(model.parameters(), lr=1.0))
        return model


ROWS = {
    "SAM": Row(lambda s, **o: SAM(rho=s, **o), sam, 2, closure=True),
    "USAM": Row(lambda s, **o: USAM(rho=s, **o), usam, 2, closure=True),
    "ASAM": Row(lambda s, **o: ASAM(rho=s, **o), asam, 2, closure=True),
    "WSAM": Row(lambda s, **o: WSAM(rho=s, decoupled=False, **o), wsam, 2, closure=True),
    "WSAM decoupled": Row(lambda s, **o: Decoupled(rho=s, gamma=0.8, **o), partial(wsam, gamma=0.8), 2, closure=True),
    "EigenSAM": Row(lambda s, **o: EigenSAM(rho=s, **o), eigen_sam, 3, tolerance=1e-2),
    "GSAM": Row(lambda s, **o: GSAM(rho=s, **o), gsam, 2, closure=True),
    "FriendlySAM": Row(lambda s, **o: FriendlySAM(rho=s, **o), sam, 2, closure=True, remembers=True),
    "LookSAM": Row(lambda s, **o: LookSAM(rho=s, **o), sam, 2, closure=True, remembers=True),
    "GradientPenalty": Row(lambda s, **o: GradientPenalty(rho=s, **o), penalty),
    "GradientPenalty GN": Row(
        lambda s, **o: GradientPenalty(rho=s, curvature="gauss_newton", **o), partial(penalty, kind="gauss_newton")
    ),
    "GradientPenalty NME": Row(
        lambda s, **o: GradientPenalty(rho=s, curvature="nme", **o), partial(penalty, kind="nme")
    ),
    "GradientPenalty p=2": Row(lambda s, **o: GradientPenalty(rho=s, p=2, **o), partial(penalty, p=2)),
    "GradientPenalty p=2 GN": Row(
        lambda s, **o: GradientPenalty(rho=s, p=2, curvature="gauss_newton", **o),
        partial(penalty, p=2, kind="gauss_newton"),
    ),
    "GradientPenalty difference": Row(
        lambda s, **o: GradientPenalty(rho=s, method="finite_difference", **o), penalty_difference, 2, closure=True
    ),
    "GradientPenalty difference p=2": Row(
        lambda s, **o: GradientPenalty(rho=s, p=2, method="finite_difference", radius=0.01, **o),
        partial(penalty_difference, p=2, radius=0.01),
        2,
        closure=True,
    ),
    "WeightNoise": Row(
        lambda s, **o: WeightNoise(sigma=s, num_samples=2, **o), weight_noise, 2, closure=True, draws=True
    ),
    "WeightNoise filter": Row(
        lambda s, **o: WeightNoise(sigma=s, num_samples=2, scale="filter", **o),
        partial(weight_noise, scale="filter"),
        2,
        closure=True,
        draws=True,
    ),
    "WeightNoise multiplicative": Row(
        lambda s, **o: WeightNoise(sigma=s, num_samples=2, scale="multiplicative", **o),
        partial(weight_noise, scale="multiplicative"),
        2,
        closure=True,
        draws=True,
    ),
    "WeightNoise antithetic": Row(
        lambda s, **o: WeightNoise(sigma=s, num_samples=2, antithetic=True, **o),
        partial(weight_noise, antithetic=True),
        4,
        closure=True,
        draws=True,
        order=2,
    ),
    "HessianTrace": Row(
        lambda s, **o: HessianTrace(strength=s, num_probes=2, **o), hessian_trace, passes=2, draws=True
    ),
    "HessianTrace difference": Row(
        lambda s, **o: HessianTrace(strength=s, num_probes=2, method="difference", **o),
        hessian_trace,
        5,
        closure=True,
        draws=True,
        half_precision=False,
        tolerance=1e-5,
    ),
}
for _through in ("jacobian", "full"):
    for _estimator in ("labels", "hutchinson"):
        ROWS[f"GaussNewtonTrace {_estimator} {_through}"] = Row(
            lambda s, through=_through, estimator=_estimator, **o: GaussNewtonTrace(
                strength=s, num_samples=2, through=through, estimator=estimator, **o
            ),
            partial(gauss_newton_trace, through=_through, estimator=_estimator),
            draws=True,
        )


def flat(model):
    """.grad of every parameter as one vector, zeros for None."""
    return torch.cat(
        [torch.zeros(p.numel()).to(p) if p.grad is None else p.grad.reshape(-1) for p in model.parameters()]
    )


def update(model, regularizer, scale=1.0):
    """What moves the weights at a learning rate of 1: .grad, and what decoupled WSAM adds after the step."""
    gradient = flat(model) / scale
    if not isinstance(regularizer, Decoupled) or regularizer.memory.arrived is None:
        return gradient
    return gradient + torch.cat([tensor.reshape(-1) for tensor in regularizer.memory.arrived])


def attached(regularizer, model):
    """So that several backward calls belong to one step."""
    return regularizer.attach(torch.optim.SGD(model.parameters(), lr=1.0))
