"""EigenSAM: SAM bent towards the direction in which the loss is sharpest."""

import contextlib
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twofold.curvature.differentiable import full_precision
from twofold.curvature.eigen import eigsh
from twofold.errors import NotFiniteError, TwofoldWarning
from twofold.parameters import ParameterLayout, dot, norm
from twofold.regularizers.base import TINY, Direction, check_strength
from twofold.regularizers.gradients import Gradients
from twofold.regularizers.passes import Passes
from twofold.regularizers.sam import SAM, Rho, Uphill, scaled_by

_TOLERANCE = 1e-3
_MAX_MATVECS = 100


@dataclass(kw_only=True, eq=False)
class EigenSAM(SAM):
    """SAM whose step uphill is turned towards the top eigenvector of the Hessian.

    With g^ = g / (||g|| + 1e-12) and v the unit eigenvector of the largest positive eigenvalue of the batch's Hessian
    over the chosen parameters, it hands on

        grad L(theta + rho u),  u = g^ + alpha sign<g, v> (v - <g^, v> g^),

    and SAM's gradient where no eigenvalue is positive. Costs 2 gradients, and now and then the products of `eigsh` (to
    a residual of 1e-3 of the largest eigenvalue, at most 100, from the last v). The Hessian is taken in the weights'
    own precision, without autocast. Luo et al. 2025, arXiv 2501.12666.

    Args:
        rho: length of the step along the gradient; a number, by pattern or by step as in `SAM`. 0 gives the plain
            gradient.
        alpha: how far the step is turned; 0 is SAM.
        interval: find v anew every so many steps. Steps are those of the attached optimiser, see `attach`.
        params, microbatches, share_masks, generator, group, ascent: as in `Regularizer`; of several micro-batches the
            first gives v.

    Raises:
        TwofoldError: an argument is out of range, or the model has an operation without a second derivative.

    Example:
        >>> EigenSAM(interval=50)
        EigenSAM(interval=50, rho=0.05, alpha=0.2)
    """

    rho: Rho = 0.05
    alpha: float = 0.2
    interval: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("alpha", self.alpha)

    def direction(self, passes: Passes) -> Direction:
        """Return the gradient at the perturbed weights."""
        if self.alpha > 0:
            passes.need_outputs()
        return super().direction(passes)

    def between(self, passes: Passes) -> Direction:
        """Do the same with the eigenvector that is known."""
        return self.direction(passes)

    def uphill(self, passes: Passes, gradient: list[Tensor], size: float, radii: list[float]) -> Uphill:
        """Return rho u."""
        self.memory.fit(passes.chosen)
        found_at = self.memory.kept_at
        if self.alpha > 0 and (found_at is None or (self.steps % self.interval == 0 and found_at != self.steps)):
            # Where the Hessian is not finite the vector that is known stays; the step itself may well be finite.
            with contextlib.suppress(NotFiniteError):
                self.memory.keep(self._top_eigenvector(passes), self.steps)
        v = self.memory.kept
        if self.alpha == 0 or v is None:
            return super().uphill(passes, gradient, size, radii)
        unit = torch._foreach_div(gradient, size + TINY)
        along = float(dot(unit, v))
        turn = self.alpha * ((along > 0) - (along < 0))
        turned = list(torch._foreach_add(torch._foreach_mul(unit, 1 - turn * along), v, alpha=turn))
        return scaled_by(radii, turned)

    def combine(self, passes: Passes, gradients: Gradients, found: Direction) -> Direction:
        """Report how well the gradient is aligned with v."""
        if self.memory.kept is None:
            return found
        g = passes.of_chosen(gradients)
        alignment = dot(g, self.memory.kept) / (norm(g) + TINY)
        return replace(found, diagnostics={**found.diagnostics, "alignment": alignment})

    def _top_eigenvector(self, passes: Passes) -> list[Tensor] | None:
        """Return v in the chosen parameters' shapes; None where no eigenvalue is positive."""
        layout = ParameterLayout(dict(zip(passes.chosen_names, passes.chosen, strict=True)))
        last = None if self.memory.kept is None else layout.flatten(self.memory.kept).unsqueeze(1)
        with warnings.catch_warnings(), full_precision():
            # A vector that has not converged still turns the step towards sharp directions.
            warnings.simplefilter("ignore", TwofoldWarning)
            pair = eigsh(passes.hessian(), k=1, which="LA", tol=_TOLERANCE, max_matvecs=_MAX_MATVECS, v0=last)
        return [part.clone() for part in layout.unflatten(pair.vectors[:, 0])] if pair.values[0] > 0 else None
