"""WeightNoise: the mean gradient at randomly perturbed weights."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.parameters import norm
from twofold.regularizers.base import Direction, Regularizer, check_choice, check_count, check_strength, plain
from twofold.regularizers.gradients import Gradients, add_scaled
from twofold.regularizers.passes import Passes


@dataclass(kw_only=True, eq=False)
class WeightNoise(Regularizer):
    """Descend the loss averaged over noise in the weights, E_e L(theta + e).

    With isotropic noise e ~ N(0, sigma^2 I) this is L + sigma^2/2 tr H + O(sigma^4): half of what eq. 20 of 2401.10809
    says (`matched_sigma` gives the sigma that matches a `HessianTrace`). Hands on the mean over n draws of
    grad L(theta + e); the loss returned is the mean noisy one, and running statistics move in the first pass. Costs n
    gradients, or 2n with antithetic pairs.

    Args:
        sigma: standard deviation of the noise; 0 gives the plain gradient. Start at 0.01.
        num_samples: n, how many draws are averaged.
        scale: "isotropic": sigma for every weight; "filter": sigma ||w_f|| for the weights of filter f, a slice along
            the first dimension, or the whole of a vector (Bisla et al. 2022, arXiv 2201.08025); "multiplicative":
            sigma |w|.
        antithetic: follow each draw e by -e, so that what is odd in e cancels: the mean has no noise of first order.
        params, interval, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: sigma is negative or not finite, num_samples is no positive integer, or a choice is unknown.

    Example:
        >>> WeightNoise(sigma=0.01, num_samples=2)
        WeightNoise(sigma=0.01, num_samples=2, scale='isotropic', antithetic=False)
    """

    linear: ClassVar[bool] = True
    sigma: float
    num_samples: int = 1
    scale: Literal["isotropic", "filter", "multiplicative"] = "isotropic"
    antithetic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("sigma", self.sigma)
        check_count("num_samples", self.num_samples)
        check_choice("scale", self.scale, ("isotropic", "filter", "multiplicative"))
        if not isinstance(self.antithetic, bool):
            raise TwofoldError(f"antithetic must be True or False; {self.antithetic!r} came.")

    def direction(self, passes: Passes) -> Direction:
        """Return the mean gradient at the noisy weights."""
        if self.sigma == 0:
            return plain(passes)
        generator = passes.noise_generator()
        signs = (1, -1) if self.antithetic else (1,)
        losses: list[Tensor] = []
        sizes: list[Tensor] = []
        mean: Gradients = [None for _ in passes.parameters]
        share = 1 / (self.num_samples * len(signs))
        for _ in range(self.num_samples):
            noise = [self._draw(weight.detach(), generator) for weight in passes.chosen]
            sizes.append(norm(noise))
            for sign in signs:
                loss, gradients = passes.gradient(noise, sign)
                losses.append(loss)
                mean = [add_scaled(a, b, share) for a, b in zip(mean, gradients, strict=True)]
        return Direction(torch.stack(losses).mean(), mean, {"perturbation_norm": torch.stack(sizes).mean()})

    def _draw(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(weight.shape, generator=generator, device=generator.device, dtype=weight.dtype)
        noise = noise.to(weight.device).mul_(self.sigma)
        if self.scale == "isotropic":
            return noise
        if self.scale == "multiplicative":
            return noise * weight.abs()
        if weight.dim() < 2:
            return noise * torch.linalg.vector_norm(weight)
        return noise * torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)


def matched_sigma(strength: float) -> float:
    """Return the sigma whose isotropic weight noise has the second-order effect of strength tr H: sqrt(2 strength).

    Args:
        strength: factor of the trace, as in `HessianTrace` and `GaussNewtonTrace`.

    Raises:
        TwofoldError: strength is negative or not finite.

    Example:
        >>> matched_sigma(0.5)
        1.0
    """
    check_strength("strength", strength)
    return (2 * strength) ** 0.5
