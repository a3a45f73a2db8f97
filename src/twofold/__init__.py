"""twofold measures and regularises both halves of the Hessian, H = GN + NME, of any PyTorch model.

    c = twofold.Curvature(model, loss_fn, data)
    h, g, n = c.products(v)                                          # H v, GN v, NME v
    loss = twofold.SAM(rho=0.05).backward(model, loss_fn, (x, y))    # in place of loss.backward()
    with twofold.second_derivative(0, of="gelu"): ...                # the same model with another phi''
"""

from twofold.activations import BetaGELU, beta_gelu, gaussian, second_derivative
from twofold.batches import causal_lm_forward
from twofold.curvature.curvature import Curvature
from twofold.curvature.norms import frobenius_norm
from twofold.curvature.operators import NME, GaussNewton, Hessian
from twofold.curvature.trace import trace
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.types import Estimate

__version__ = "0.1.0"

__all__ = [
    "NME",
    "BetaGELU",
    "Curvature",
    "Estimate",
    "GaussNewton",
    "Hessian",
    "TwofoldError",
    "TwofoldWarning",
    "beta_gelu",
    "causal_lm_forward",
    "frobenius_norm",
    "gaussian",
    "second_derivative",
    "trace",
]
