"""GSAM: SAM that also closes the gap between the loss uphill and the loss."""

from dataclasses import dataclass, replace

import torch

from twofold.parameters import dot, norm
from twofold.regularizers.base import TINY, Direction, check_strength
from twofold.regularizers.gradients import Gradients
from twofold.regularizers.passes import Passes
from twofold.regularizers.sam import SAM, Rho


@dataclass(kw_only=True, eq=False)
class GSAM(SAM):
    """Surrogate-gap SAM: descend the loss uphill, and ascend the loss where the first does not feel it.

    With g_p = grad L(theta + rho g^) and g_p^ = g_p / (||g_p|| + 1e-12) it hands on

        g_p - alpha (g - <g, g_p^> g_p^),

    inner products over the chosen parameters. Costs 2 gradients. Zhuang et al. 2022, arXiv 2203.08065, algorithm 1.

    Args:
        rho: length of the step uphill; a number, by pattern or by step as in `SAM` (the paper lets it fall with the
            learning rate). 0 gives the plain gradient.
        alpha: weight of the gap; 0 is SAM.
        params, interval, microbatches, share_masks, generator, group, ascent: as in `Regularizer`.

    Raises:
        TwofoldError: rho or alpha is negative or not finite.

    Example:
        >>> GSAM(rho=lambda step: 0.05 if step < 100 else 0.01).alpha
        0.4
    """

    rho: Rho = 0.05
    alpha: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("alpha", self.alpha)

    def combine(self, passes: Passes, gradients: Gradients, found: Direction) -> Direction:
        """Take the part of g that is orthogonal to g_p out."""
        g, perturbed = passes.of_chosen(gradients), passes.of_chosen(found.gradients)
        along = float(dot(g, perturbed)) / (float(norm(perturbed)) + TINY) ** 2
        orthogonal = torch._foreach_sub(g, perturbed, alpha=along)
        changed = torch._foreach_sub(perturbed, orthogonal, alpha=self.alpha)
        return replace(found, gradients=passes.with_chosen(found.gradients, changed))
