"""SAM and USAM: the gradient at weights moved uphill."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twofold.parameters import norm
from twofold.regularizers.base import TINY, Direction, Regularizer, check_strength
from twofold.regularizers.passes import Passes


@dataclass(kw_only=True, eq=False)
class SAM(Regularizer):
    """Sharpness-aware minimisation: hand on grad L(theta + rho g^), g^ = g / (||g|| + 1e-12).

    One global 2-norm over the chosen parameters. Costs 2 gradients. Foret et al. 2021, arXiv 2010.01412, eq. 2;
    2401.10809, eq. 8.

    Args:
        rho: length of the step uphill, in the weights' own units; 0 gives the plain gradient.
        params, microbatches, share_masks, generator: as in `Regularizer`.

    Raises:
        TwofoldError: rho is negative or not finite.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> loss = SAM(rho=0.05).backward(model, torch.nn.functional.cross_entropy, (x, y))
        >>> optimizer.step()
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("rho", self.rho)

    def direction(self, passes: Passes) -> Direction:
        """Return the gradient at the perturbed weights."""
        loss, gradients = passes.gradient()
        chosen = passes.of_chosen(gradients)
        size = float(norm(chosen))
        if self.rho == 0 or not 0 < size < math.inf:
            return Direction(loss, gradients, {"gradient_norm": size, "perturbation_norm": 0.0, "loss_rise": 0.0})
        perturbation = self.perturbation(chosen, size)
        perturbed_loss, perturbed = passes.gradient(perturbation)
        return Direction(
            loss,
            perturbed,
            {
                "gradient_norm": size,
                "perturbation_norm": norm(perturbation),
                "loss_rise": perturbed_loss - loss,
            },
        )

    def perturbation(self, gradient: list[Tensor], size: float) -> Sequence[Tensor]:
        """Return the step uphill, given the gradient over the chosen parameters and its norm."""
        return torch._foreach_mul(gradient, self.rho / (size + TINY))


@dataclass(kw_only=True, eq=False)
class USAM(SAM):
    """SAM without normalisation: hand on grad L(theta + rho g).

    On a quadratic loss this is descent on the Hessian H + rho H^2. Costs 2 gradients. Andriushchenko & Flammarion 2022,
    arXiv 2206.06232.

    Args:
        rho: factor of the gradient, in units of a learning rate; 0 gives the plain gradient.
        params, microbatches, share_masks, generator: as in `Regularizer`.

    Raises:
        TwofoldError: rho is negative or not finite.

    Example:
        >>> USAM(rho=0.01)
        USAM(rho=0.01)
    """

    rho: float

    def perturbation(self, gradient: list[Tensor], size: float) -> Sequence[Tensor]:
        """Return rho g."""
        return torch._foreach_mul(gradient, self.rho)
