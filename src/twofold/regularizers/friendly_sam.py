"""FriendlySAM: SAM along the part of the gradient that is this batch's own."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.parameters import norm
from twofold.regularizers.base import Direction, check_strength
from twofold.regularizers.gradients import Gradients
from twofold.regularizers.passes import Passes
from twofold.regularizers.sam import SAM, Rho, Uphill


@dataclass(kw_only=True, eq=False)
class FriendlySAM(SAM):
    """SAM along the batch's noise: the gradient without its running average m, which stands for the full gradient.

    It hands on grad L(theta + rho d / (||d|| + 1e-12)) with d = g - s m, and after the step m <- lam m + (1 - lam) g,
    g being the mean gradient of the step. In the first step d = g, and m becomes g. Costs 2 gradients. Li et al. 2024,
    arXiv 2403.12350, algorithm 1.

    Args:
        rho: length of the step uphill; a number, by pattern or by step as in `SAM`. 0 gives the plain gradient.
        subtract: s, how much of the average is taken out; 0 is SAM.
        decay: lam, how long the average remembers, 0 <= lam < 1.
        params, interval, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: an argument is out of range.

    Example:
        >>> FriendlySAM()
        FriendlySAM(rho=0.1, subtract=1.0, decay=0.9)
    """

    rho: Rho = 0.1
    subtract: float = 1.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("subtract", self.subtract)
        check_strength("decay", self.decay)
        if self.decay >= 1:
            raise TwofoldError(f"decay must be less than 1; {self.decay!r} came.")

    def uphill(self, passes: Passes, gradient: list[Tensor], size: float, radii: list[float]) -> Uphill:
        """Return rho d / ||d||."""
        self.memory.fit(passes.chosen)
        if self.memory.kept is not None:
            gradient = list(torch._foreach_sub(gradient, self.memory.kept, alpha=self.subtract))
            size = float(norm(gradient))
        return super().uphill(passes, gradient, size, radii)

    def combine(self, passes: Passes, gradients: Gradients, found: Direction) -> Direction:
        """Let the average have the gradient at theta."""
        return replace(found, memory=passes.of_chosen(gradients))

    def after_step(self) -> None:
        """Move the average."""
        arrived = self.memory.take()
        if arrived is None or arrived[1] == 0:
            return
        mean = torch._foreach_div(arrived[0], arrived[1])
        kept = self.memory.kept
        self.memory.keep(mean if kept is None else torch._foreach_lerp(kept, mean, 1 - self.decay), self.steps)
