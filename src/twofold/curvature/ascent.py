"""The highest loss in a ball around the weights, by projected gradient ascent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from twofold.curvature.probes import private_generator
from twofold.curvature.products import Products
from twofold.parameters import norm


@dataclass(frozen=True)
class Ascent:
    """How far the loss rises within a ball: a lower bound on the highest rise, found by ascent.

    Attributes:
        rise: the highest L(theta + e) - L(theta) met; 0 at least, since e = 0 is in the ball, and infinite where the
            loss is not finite.
        one_step: that of the first step, to the boundary along the gradient: SAM's (p = 2) or ASAM's.
        num_gradients: how many gradients of the whole set it took.
    """

    rise: float
    one_step: float
    num_gradients: int

    def __str__(self) -> str:
        return f"{self.rise:.4g} (one step {self.one_step:.4g}, {self.num_gradients} gradients)"


def ascend(
    products: Products,
    rho: float,
    *,
    scale: Float[Tensor, "P"] | None = None,
    p: float = 2,
    steps: int = 20,
    starts: Sequence[Float[Tensor, "P"]] = (),
) -> Ascent:
    """Search for the highest L(theta + scale u) - L(theta) over ||u||_p <= rho.

    u <- project(u + a d) from the best u so far, d the steepest direction of length rho: rho G / ||G||_2, or rho sign G
    for p = inf, with G = scale grad L. The first step has a = 2 and ends where SAM's does; a doubles when the loss
    rises and is halved when it does not.

    Args:
        products: of the model and data.
        rho: radius of the ball.
        scale: what an entry of u counts, such as |theta|; None means 1.
        p: 2 or inf.
        steps: how many gradients to spend beyond the one at theta.
        starts: directions u to try beside the gradient, each out to the boundary.
    """
    loss, gradient = products.loss_and_gradient()
    scaled = (lambda v: v) if scale is None else (lambda v: scale * v)
    direction, project = (_unit, _into_ball) if p == 2 else (torch.sign, _into_box)
    best, u, size, one_step, taken = loss, torch.zeros_like(gradient), 2.0, 0.0, 1
    for first in range(steps):
        slope = scaled(gradient)
        if not slope.any() and not first:
            # Every way leads up or down alike, to first order.
            generator = private_generator(slope.device)
            slope = torch.randn(slope.shape, generator=generator, device=generator.device).to(slope)
        tried = project(u + size * rho * direction(slope), rho)
        found, gradient_there = products.loss_and_gradient(step=scaled(tried))
        found = found if math.isfinite(found) else math.inf
        taken += 1
        if not first:
            one_step = found - loss
            for start in starts:
                other = rho * direction(start)
                there = products.loss_at(scaled(other))
                if there > max(best, found):
                    found, gradient_there = products.loss_and_gradient(step=scaled(other))
                    tried, taken = other, taken + 1
        if found > best:
            best, u, gradient, size = found, tried, gradient_there, 2 * size
            if not math.isfinite(best):
                break
        else:
            size /= 2
    return Ascent(best - loss, one_step, taken)


def _unit(vector: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    size = norm([vector]).item()
    return vector / size if size > 0 else vector


def _into_ball(u: Float[Tensor, "P"], rho: float) -> Float[Tensor, "P"]:
    size = norm([u]).item()
    return u * (rho / size) if size > rho else u


def _into_box(u: Float[Tensor, "P"], rho: float) -> Float[Tensor, "P"]:
    return u.clamp(-rho, rho)
