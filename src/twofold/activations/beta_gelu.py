"""beta-GELU, x Phi(beta x): GELU at beta = 1, ReLU in the limit of large beta."""

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from twofold.errors import TwofoldError


def positive_beta(beta: float, owner: str) -> float:
    """Return beta as a float.

    Raises:
        TwofoldError: if it is not a finite number above 0.
    """
    if isinstance(beta, bool) or not isinstance(beta, Real) or not math.isfinite(beta) or beta <= 0:
        raise TwofoldError(f"{owner} needs a finite beta > 0; {beta!r} came. beta = 1 is the common choice for GELU.")
    return float(beta)


def beta_gelu(input: Tensor, beta: float = 1.0) -> Tensor:
    """Apply beta-GELU to each entry.

    phi(x) = x Phi(beta x) = gelu(beta x) / beta with the standard normal distribution function Phi, and
    phi''(x) = beta n(beta x) (2 - beta^2 x^2) with its density n. beta = 1 is `torch.nn.functional.gelu`, bit for bit;
    beta -> infinity is ReLU.

    Args:
        input: any shape, a floating-point type.
        beta: sharpness of the bend at 0, > 0; phi'' lives within a few 1/beta of 0 and reaches 2 beta / sqrt(2 pi).

    Raises:
        TwofoldError: if beta is not a finite number above 0.

    Example:
        >>> beta_gelu(torch.tensor([-1.0, 0.0, 1.0]), beta=100.0)
        tensor([-0., 0., 1.])

    Source: arXiv 2401.10809, section 4.3 and figure 8.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(beta_gelu, (input,), input, beta=beta)
    beta = positive_beta(beta, "beta_gelu")
    if beta == 1.0:
        return F.gelu(input)
    if input.dtype == torch.float16:  # beta x leaves the range of float16 long before x Phi(beta x) does
        return (F.gelu(input.float() * beta) / beta).to(input.dtype)
    return F.gelu(input * beta) / beta


class BetaGELU(nn.Module):
    """Layer that applies beta-GELU, x Phi(beta x), to each entry.

    Args:
        beta: sharpness of the bend at 0, > 0. 1 is GELU; large values tend to ReLU.

    Raises:
        TwofoldError: if beta is not a finite number above 0.

    Example:
        >>> BetaGELU(beta=4.0)
        BetaGELU(beta=4.0)

    Source: arXiv 2401.10809, section 4.3 and figure 8.
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = positive_beta(beta, "BetaGELU")

    def forward(self, input: Tensor) -> Tensor:
        """Return x Phi(beta x), the shape of the input."""
        return beta_gelu(input, self.beta)

    def extra_repr(self) -> str:
        """Return what the repr shows between the brackets."""
        return f"beta={self.beta}"
