"""WSAM: any weight between the loss and its sharpness."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.parameters import norm
from twofold.regularizers.base import Direction, plain
from twofold.regularizers.gradients import Gradients
from twofold.regularizers.passes import Passes
from twofold.regularizers.sam import SAM, Rho


@dataclass(kw_only=True, eq=False)
class WSAM(SAM):
    """Weighted SAM: descend L + a (L(theta + rho g^) - L), a = gamma / (1 - gamma).

    With g_p = grad L(theta + rho g^) it hands on (1 - a) g + a g_p. decoupled=True hands on g alone, so that momentum
    and adaptive scales see no sharpness, and moves the weights after the optimiser's step by -lr a (g_p - g), lr being
    that of the weights' parameter group. gamma = 0.5 is SAM, gamma = 0 the base optimiser. Costs 2 gradients. Yue et
    al. 2023, arXiv 2305.15817.

    Args:
        rho: length of the step uphill; a number, by pattern or by step as in `SAM`. 0 gives the plain gradient.
        gamma: weight of the sharpness, 0 <= gamma < 1.
        decoupled: move by the sharpness apart from the optimiser, as the paper does; it needs `attach(optimizer)`
            (`SharpnessAware` attaches by itself). Clipping of .grad does not reach that move.
        params, interval, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: an argument is out of range; from backward, where decoupled=True and nothing is attached.

    Example:
        >>> WSAM(gamma=0.8, decoupled=False)
        WSAM(rho=0.05, gamma=0.8, decoupled=False)
    """

    rho: Rho = 0.05
    gamma: float = 0.9
    decoupled: bool = True
    _parameters: Sequence[Tensor] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float) or not 0 <= self.gamma < 1:
            raise TwofoldError(f"gamma must be a number of at least 0 and less than 1; {self.gamma!r} came.")
        if not isinstance(self.decoupled, bool):
            raise TwofoldError(f"decoupled must be True or False; {self.decoupled!r} came.")

    def direction(self, passes: Passes) -> Direction:
        """Return the weighted gradient, or the plain one with the correction that follows the step."""
        if self.decoupled and self._optimizer is None:
            raise TwofoldError(
                "WSAM(decoupled=True) moves the weights after the optimiser's step, by its learning rate. Call "
                "reg.attach(optimizer) before, use SharpnessAware(optimizer, reg), or pass decoupled=False."
            )
        return plain(passes) if self.gamma == 0 else super().direction(passes)

    def combine(self, passes: Passes, gradients: Gradients, found: Direction) -> Direction:
        """Mix the gradients, or take their difference apart."""
        share = self.gamma / (1 - self.gamma)
        pairs = list(zip(passes.parameters, gradients, found.gradients, strict=True))
        if not self.decoupled:
            mixed = [None if g is None or p is None else torch.lerp(g, p, share) for _, g, p in pairs]
            return replace(found, gradients=mixed)
        self._parameters = passes.parameters
        self.memory.fit(passes.parameters)
        apart = [torch.zeros_like(w) if g is None or p is None else (p - g) * share for w, g, p in pairs]
        if not passes.everywhere(norm(apart).isfinite()):
            return found  # handed on as it is, so that the step is skipped
        return replace(found, gradients=gradients, memory=apart)

    def after_step(self) -> None:
        """Move by -lr a (g_p - g)."""
        arrived = self.memory.take()
        if arrived is None or self._optimizer is None:
            return
        if not self._parameters:
            raise TwofoldError(
                "WSAM(decoupled=True) was restored between a backward and its step and does not know which weights the "
                "correction belongs to. Run backward once more before the step."
            )
        rates = {id(p): float(group["lr"]) for group in self._optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for parameter, correction in zip(self._parameters, arrived[0], strict=True):
                if id(parameter) in rates:
                    parameter.sub_(correction, alpha=rates[id(parameter)])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_parameters": ()}
