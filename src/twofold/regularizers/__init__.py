"""What training does with curvature: regularizers that stand in place of `loss.backward()`."""

from twofold.regularizers.base import Regularizer
from twofold.regularizers.gradient_penalty import GradientPenalty
from twofold.regularizers.optimizer import SharpnessAware
from twofold.regularizers.sam import SAM, USAM
from twofold.regularizers.trace_penalty import GaussNewtonTrace, HessianTrace
from twofold.regularizers.weight_noise import WeightNoise, matched_sigma

__all__ = [
    "SAM",
    "USAM",
    "GaussNewtonTrace",
    "GradientPenalty",
    "HessianTrace",
    "Regularizer",
    "SharpnessAware",
    "WeightNoise",
    "matched_sigma",
]
