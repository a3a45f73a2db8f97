"""What training does with curvature: regularizers that stand in place of `loss.backward()`."""

from twofold.regularizers.base import Regularizer
from twofold.regularizers.eigen_sam import EigenSAM
from twofold.regularizers.friendly_sam import FriendlySAM
from twofold.regularizers.gradient_penalty import GradientPenalty
from twofold.regularizers.look_sam import LookSAM
from twofold.regularizers.optimizer import SharpnessAware
from twofold.regularizers.sam import ASAM, SAM, USAM
from twofold.regularizers.surrogate_gap import GSAM
from twofold.regularizers.trace_penalty import GaussNewtonTrace, HessianTrace
from twofold.regularizers.weight_noise import WeightNoise, matched_sigma
from twofold.regularizers.weighted_sam import WSAM

__all__ = [
    "ASAM",
    "GSAM",
    "SAM",
    "USAM",
    "WSAM",
    "EigenSAM",
    "FriendlySAM",
    "GaussNewtonTrace",
    "GradientPenalty",
    "HessianTrace",
    "LookSAM",
    "Regularizer",
    "SharpnessAware",
    "WeightNoise",
    "matched_sigma",
]
