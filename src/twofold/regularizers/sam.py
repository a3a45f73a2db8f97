"""SAM, USAM and ASAM: the gradient at weights that were moved uphill."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.parameters import matching, norm
from twofold.regularizers.base import TINY, Direction, Regularizer, check_strength
from twofold.regularizers.gradients import Gradients
from twofold.regularizers.passes import Passes

Rho: TypeAlias = float | Mapping[str, float] | Callable[[int], float]
"""A number; numbers by glob pattern of parameter names, of which the first that matches holds; or a schedule."""

Uphill: TypeAlias = tuple[list[Tensor], float]
"""A step over the chosen parameters: a direction, and the factor that it is taken with."""


def scaled_by(factors: Sequence[float], direction: list[Tensor]) -> Uphill:
    """Scale each part of a direction; a factor that all share costs no copy."""
    if len(set(factors)) == 1:
        return direction, factors[0]
    return list(torch._foreach_mul(direction, list(factors))), 1.0


@dataclass(kw_only=True, eq=False)
class SAM(Regularizer):
    """Sharpness-aware minimisation: hand on grad L(theta + rho g^), g^ = g / (||g|| + 1e-12).

    One global 2-norm over the chosen parameters. Costs 2 gradients. Foret et al. 2021, arXiv 2010.01412, eq. 2;
    2401.10809, eq. 8.

    Args:
        rho: length of the step uphill, in the weights' own units; 0 gives the plain gradient. A mapping such as
            {"*.bias": 0.0, "*": 0.05} gives each parameter the rho of the first pattern that matches its name, the
            norm being over all chosen parameters still; a function gives rho for step 0, 1, ... (see `attach`).
        params, interval, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: rho is negative or not finite, or no pattern matches a parameter.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> loss = SAM(rho=0.05).backward(model, torch.nn.functional.cross_entropy, (x, y))
        >>> optimizer.step()
    """

    rho: Rho = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rho, Mapping):
            for pattern, rho in self.rho.items():
                check_strength(f"rho[{pattern!r}]", rho)
        elif not callable(self.rho):
            check_strength("rho", self.rho)

    def direction(self, passes: Passes) -> Direction:
        """Return the gradient at the perturbed weights, or what `combine` makes of it."""
        loss, gradients = passes.gradient()
        chosen = passes.of_chosen(gradients)
        size = float(norm(chosen))
        radii = self.radii(passes)
        if not any(radii) or not passes.everywhere(0 < size < math.inf):
            return Direction(loss, gradients, {"gradient_norm": size, "perturbation_norm": 0.0, "loss_rise": 0.0})
        uphill, factor = self.uphill(passes, chosen, size, radii)
        perturbed_loss, perturbed = passes.gradient(uphill, factor)
        diagnostics: dict[str, Tensor | float] = {
            "gradient_norm": size,
            "perturbation_norm": factor * (size if uphill is chosen else norm(uphill)),
            "loss_rise": perturbed_loss - loss,
        }
        return self.combine(passes, gradients, Direction(loss, perturbed, diagnostics))

    def radii(self, passes: Passes) -> list[float]:
        """Return rho of each chosen parameter in this step."""
        if not isinstance(self.rho, Mapping):
            rho = self.rho(self.steps) if callable(self.rho) else self.rho
            check_strength("rho", rho)
            return [rho for _ in passes.chosen]
        return [self._by_name(self.rho, name) for name in passes.chosen_names]

    @staticmethod
    def _by_name(rho: Mapping[str, float], name: str) -> float:
        for pattern, value in rho.items():
            if matching([name], pattern):
                return value
        raise TwofoldError(
            f"rho: none of the patterns {', '.join(map(repr, rho))} matches {name!r}; add '*' as the last."
        )

    def uphill(self, passes: Passes, gradient: list[Tensor], size: float, radii: list[float]) -> Uphill:
        """Return the step uphill, a direction and its factor.

        Args:
            passes: the batch, for the chosen parameters and their names.
            gradient: the gradient over the chosen parameters.
            size: its norm.
            radii: rho of each chosen parameter.
        """
        return scaled_by([rho / (size + TINY) for rho in radii], gradient)

    def combine(self, passes: Passes, gradients: Gradients, found: Direction) -> Direction:
        """Return what is handed on, given the gradients at theta and what was found uphill."""
        return found


@dataclass(kw_only=True, eq=False)
class USAM(SAM):
    """SAM without normalisation: hand on grad L(theta + rho g).

    On a quadratic loss this is descent on the Hessian H + rho H^2. Costs 2 gradients. Andriushchenko & Flammarion 2022,
    arXiv 2206.06232.

    Args:
        rho: factor of the gradient, in units of a learning rate; 0 gives the plain gradient. Start at 0.05.
            By pattern or by step as in `SAM`.
        params, interval, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: rho is negative or not finite.

    Example:
        >>> USAM(rho=0.01)
        USAM(rho=0.01)
    """

    rho: Rho

    def uphill(self, passes: Passes, gradient: list[Tensor], size: float, radii: list[float]) -> Uphill:
        """Return rho g."""
        return scaled_by(radii, gradient)


@dataclass(kw_only=True, eq=False)
class ASAM(SAM):
    """Adaptive SAM: a step uphill that does not depend on how the weights of a layer are scaled.

    With T = diag(|theta| + eta), and 1 for parameters whose name ends in "bias", it hands on

        grad L(theta + rho T^2 g / (||T g|| + 1e-12)).

    Costs 2 gradients. Kwon et al. 2021, arXiv 2102.11600, algorithm 1.

    Args:
        rho: length of the step in units of the weights, ||T^-1 e|| = rho; about ten times that of SAM. 0 gives the
            plain gradient. By pattern or by step as in `SAM`.
        eta: keeps weights of zero movable.
        params, interval, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: rho or eta is negative or not finite.

    Example:
        >>> ASAM(rho=0.5)
        ASAM(rho=0.5, eta=0.01)
    """

    rho: Rho = 0.5
    eta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("eta", self.eta)

    def uphill(self, passes: Passes, gradient: list[Tensor], size: float, radii: list[float]) -> Uphill:
        """Return rho T^2 g / ||T g||."""
        scales = [
            torch.ones_like(weight) if name.endswith("bias") else weight.detach().abs() + self.eta
            for name, weight in zip(passes.chosen_names, passes.chosen, strict=True)
        ]
        scaled = torch._foreach_mul(gradient, scales)
        return super().uphill(passes, list(torch._foreach_mul(scaled, scales)), float(norm(scaled)), radii)
