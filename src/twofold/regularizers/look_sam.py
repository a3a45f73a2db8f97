"""LookSAM: SAM now and then, and its correction reused between."""

from dataclasses import dataclass, replace

import torch

from twofold.parameters import dot, norm
from twofold.regularizers.base import TINY, Direction, check_strength
from twofold.regularizers.gradients import Gradients
from twofold.regularizers.passes import Passes
from twofold.regularizers.sam import SAM, Rho


@dataclass(kw_only=True, eq=False)
class LookSAM(SAM):
    """SAM on every k-th step; the steps between reuse the part of its gradient that turns.

    On steps 0, k, 2k, ... it hands on g_p = grad L(theta + rho g^) and keeps g_v = g_p - <g_p, g^> g^. On the others
    it hands on g + alpha ||g|| / (||g_v|| + 1e-12) g_v, from one pass. Norms and products are over the chosen
    parameters. Costs 1 + 1/k gradients. Liu et al. 2022, arXiv 2203.02714, algorithm 1.

    Args:
        rho: length of the step uphill; a number, by pattern or by step as in `SAM`. 0 gives the plain gradient.
        alpha: length of the reused part, in units of ||g||; 0 hands on g between.
        interval: k. Steps are those of the attached optimiser, see `attach`.
        params, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: an argument is out of range.

    Example:
        >>> LookSAM(interval=10)
        LookSAM(interval=10, rho=0.1, alpha=0.7)
    """

    rho: Rho = 0.1
    alpha: float = 0.7
    interval: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("alpha", self.alpha)

    def combine(self, passes: Passes, gradients: Gradients, found: Direction) -> Direction:
        """Keep the part of g_p that is orthogonal to g."""
        self.memory.fit(passes.chosen)
        g, perturbed = passes.of_chosen(gradients), passes.of_chosen(found.gradients)
        along = float(dot(g, perturbed)) / (float(norm(g)) + TINY) ** 2
        turned = torch._foreach_sub(perturbed, g, alpha=along)
        if norm(turned) <= 10 * torch.finfo(turned[0].dtype).eps * norm(perturbed):
            # What is left of parallel vectors is rounding; scaled up to ||g|| it would be noise.
            turned = [torch.zeros_like(one) for one in turned]
        return replace(found, memory=turned)

    def between(self, passes: Passes) -> Direction:
        """Return g with the part of the last g_p that turns; SAM where there is none yet."""
        self.memory.fit(passes.chosen)
        kept = self.memory.kept
        if kept is None:
            return self.direction(passes)
        loss, gradients = passes.gradient()
        chosen = passes.of_chosen(gradients)
        size = norm(chosen)
        found: Direction = Direction(loss, gradients, {"gradient_norm": size})
        if not any(self.radii(passes)):
            return found
        changed = torch._foreach_add(chosen, kept, alpha=float(self.alpha * size / (norm(kept) + TINY)))
        return replace(found, gradients=passes.with_chosen(gradients, changed))

    def after_step(self) -> None:
        """Keep the mean of what the backward passes of a full step gave."""
        arrived = self.memory.take()
        if arrived is not None:
            self.memory.keep(arrived[0], self.steps)
