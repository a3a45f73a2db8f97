"""twofold measures and regularises both halves of the Hessian, H = GN + NME, of any PyTorch model.

Example:
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    >>> loss_fn, batch = nn.CrossEntropyLoss(), (torch.randn(16, 4), torch.randint(3, (16,)))
    >>> c = twofold.Curvature(model, loss_fn, batch)
    >>> h, g, n = c.products(torch.randn(c.hessian.shape[0]))  # H v, GN v, NME v
    >>> loss = twofold.SAM(rho=0.05).backward(model, loss_fn, batch)  # in place of loss.backward()
    >>> with twofold.second_derivative(0, of="gelu"):  # the same model with another phi''
    ...     h, g, n = c.products(torch.randn(c.hessian.shape[0]))
"""

from twofold.activations import BetaGELU, beta_gelu, gaussian, second_derivative
from twofold.batches import causal_lm_forward
from twofold.curvature.anatomy import Anatomy, anatomy
from twofold.curvature.curvature import Curvature
from twofold.curvature.density import spectral_density
from twofold.curvature.diagonal import diagonal
from twofold.curvature.eigen import eigsh
from twofold.curvature.fidelity import Fidelity, fidelity
from twofold.curvature.fisher import Fisher
from twofold.curvature.jacobian import Jacobian
from twofold.curvature.liveness import live_fraction
from twofold.curvature.measure import measure
from twofold.curvature.norms import frobenius_norm
from twofold.curvature.operators import NME, ActivationNME, GaussNewton, Hessian
from twofold.curvature.report import CurvatureReport
from twofold.curvature.sharpness import Sharpness, sharpness
from twofold.curvature.trace import trace
from twofold.curvature.track import Tracker, track
from twofold.errors import NotFiniteError, TwofoldError, TwofoldWarning
from twofold.regularizers import (
    ASAM,
    GSAM,
    SAM,
    USAM,
    WSAM,
    EigenSAM,
    FriendlySAM,
    GaussNewtonTrace,
    GradientPenalty,
    HessianTrace,
    LookSAM,
    Regularizer,
    SharpnessAware,
    WeightNoise,
    matched_sigma,
)
from twofold.types import BlockNorms, DiagonalEstimate, Eigenpairs, Estimate, InnerProduct, SpectralDensity

__version__ = "0.1.0"

__all__ = [
    "ASAM",
    "GSAM",
    "NME",
    "SAM",
    "USAM",
    "WSAM",
    "ActivationNME",
    "Anatomy",
    "BetaGELU",
    "BlockNorms",
    "Curvature",
    "CurvatureReport",
    "DiagonalEstimate",
    "EigenSAM",
    "Eigenpairs",
    "Estimate",
    "Fidelity",
    "Fisher",
    "FriendlySAM",
    "GaussNewton",
    "GaussNewtonTrace",
    "GradientPenalty",
    "Hessian",
    "HessianTrace",
    "InnerProduct",
    "Jacobian",
    "LookSAM",
    "NotFiniteError",
    "Regularizer",
    "Sharpness",
    "SharpnessAware",
    "SpectralDensity",
    "Tracker",
    "TwofoldError",
    "TwofoldWarning",
    "WeightNoise",
    "anatomy",
    "beta_gelu",
    "causal_lm_forward",
    "diagonal",
    "eigsh",
    "fidelity",
    "frobenius_norm",
    "gaussian",
    "live_fraction",
    "matched_sigma",
    "measure",
    "second_derivative",
    "sharpness",
    "spectral_density",
    "trace",
    "track",
]
