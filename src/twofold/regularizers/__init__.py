"""What training does with curvature: regularizers that stand in place of `loss.backward()`."""

from twofold.regularizers.base import Regularizer
from twofold.regularizers.gradient_penalty import GradientPenalty
from twofold.regularizers.sam import SAM, USAM

__all__ = ["SAM", "USAM", "GradientPenalty", "Regularizer"]
