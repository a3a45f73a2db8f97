"""GradientPenalty: descend L + rho ||grad L||^p, with any of the three curvature matrices in its direction."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.parameters import dot, norm
from twofold.regularizers.base import TINY, Direction, Regularizer, check_choice, check_strength, plain
from twofold.regularizers.passes import Passes
from twofold.regularizers.piecewise_linear import warn_if_piecewise_linear
from twofold.types import Matrix


@dataclass(kw_only=True, eq=False)
class GradientPenalty(Regularizer):
    """Penalise the norm of the gradient: L + rho ||grad L||^p, the paper's PSAM and PUSAM.

    With g = grad L and g^ = g / (||g|| + 1e-12) it hands on

        g + rho C g^       (p = 1, PSAM)
        g + 2 rho C g      (p = 2, PUSAM)

    where C = H gives the penalty's gradient, and C = GN or NME the paper's ablations. phi'' is what the
    `second_derivative` context makes of it. Costs 3 gradients. Dauphin et al. 2024, arXiv 2401.10809, eq. 9 and 11.

    method="finite_difference" takes H g^ from a second gradient, (1 - a) g + a grad L(theta + radius g^) with
    a = rho / radius, at the cost of 2 (Zhao et al. 2022, arXiv 2202.03599); a = 1 is SAM.

    Args:
        rho: strength of the penalty; 0 gives the plain gradient.
        p: power of the norm, 1 or 2.
        curvature: "hessian", "gauss_newton" or "nme".
        method: "exact" or "finite_difference".
        radius: length of the step of a finite difference, in the weights' own units.
        params: whose gradient is penalised: norm and C run over these; the others get their plain gradient.
        interval, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: an argument is out of range, or the model has an operation without a second derivative.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> regularizer = GradientPenalty(rho=0.1, curvature="gauss_newton")
        >>> loss = regularizer.backward(model, torch.nn.CrossEntropyLoss(), (x, y))
    """

    rho: float = 0.1
    p: Literal[1, 2] = 1
    curvature: Matrix = "hessian"
    method: Literal["exact", "finite_difference"] = "exact"
    radius: float = 0.05
    _looked: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("rho", self.rho)
        if self.p not in (1, 2):
            raise TwofoldError(f"p must be 1 or 2; {self.p!r} came.")
        check_choice("curvature", self.curvature, ("hessian", "gauss_newton", "nme"))
        check_choice("method", self.method, ("exact", "finite_difference"))
        check_strength("radius", self.radius)
        if self.radius == 0:
            raise TwofoldError(f"radius must be positive; {self.radius!r} came.")
        if self.method == "finite_difference" and self.curvature != "hessian":
            raise TwofoldError(
                f'method="finite_difference" sees the whole Hessian only; curvature={self.curvature!r} needs '
                'method="exact".'
            )

    @property
    def splits_hessian(self) -> bool:
        """Whether C is one of the halves."""
        return self.curvature != "hessian" and self.method == "exact"

    def direction(self, passes: Passes) -> Direction:
        """Return g plus the gradient of the penalty."""
        if self.rho == 0:
            return plain(passes)
        return self._exact(passes) if self.method == "exact" else self._finite_difference(passes)

    def _exact(self, passes: Passes) -> Direction:
        recorded = passes.recorded()
        if self.curvature != "gauss_newton" and not self._looked:
            self._looked = True
            penalty, remedy = f"GradientPenalty(curvature={self.curvature!r})", 'method="finite_difference"'
            warn_if_piecewise_linear(recorded.recording.outputs, penalty, remedy)
        chosen = passes.of_chosen(recorded.gradients)
        size = float(norm(chosen))
        found: dict[str, Tensor | float] = {"gradient_norm": size, "penalty": self.rho * size**self.p}
        if not 0 < size < math.inf:
            return Direction(recorded.loss, recorded.gradients, found)
        unit = torch._foreach_div(chosen, size + TINY)
        product = recorded.product(unit, self.curvature)
        found["curvature_along_gradient"] = dot(unit, product)
        corrected = torch._foreach_add(chosen, product, alpha=self._factor(size))
        return Direction(recorded.loss, passes.with_chosen(recorded.gradients, corrected), found)

    def _finite_difference(self, passes: Passes) -> Direction:
        loss, gradients = passes.gradient()
        chosen = passes.of_chosen(gradients)
        size = float(norm(chosen))
        found: dict[str, Tensor | float] = {"gradient_norm": size, "penalty": self.rho * size**self.p}
        if not 0 < size < math.inf:
            return Direction(loss, gradients, found)
        moved_loss, moved = passes.gradient(chosen, self.radius / (size + TINY))
        found |= {"perturbation_norm": self.radius, "loss_rise": moved_loss - loss}
        mixed = torch._foreach_lerp(chosen, passes.of_chosen(moved), self._factor(size) / self.radius)
        return Direction(loss, passes.with_chosen(gradients, mixed), found)

    def _factor(self, size: float) -> float:
        """What multiplies C g^."""
        return self.rho if self.p == 1 else 2 * self.rho * size
