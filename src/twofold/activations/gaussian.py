"""The bell that stands in for the missing phi'' of ReLU."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from twofold.activations.beta_gelu import positive_beta


@dataclass(frozen=True)
class gaussian:  # noqa: N801 - reads as the function that it is, like functools.partial
    """The function x -> beta / sqrt(2 pi) exp(-beta^2 x^2 / 2), a bell of area 1 and width 1/beta.

    As phi'' it makes phi' rise from 0 to 1 around x = 0, as ReLU's does in a single point: the synthetic second
    derivative of ReLU. Two with the same beta are equal.

    Args:
        beta: inverse standard deviation, > 0, in units of 1 / pre-activation.

    Raises:
        TwofoldError: if beta is not a finite number above 0.

    Example:
        >>> gaussian(beta=100.0)
        gaussian(beta=100.0)

    Source: arXiv 2401.10809, equation 19.
    """

    beta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", positive_beta(self.beta, "gaussian"))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the density at each entry of x."""
        return torch.exp(-0.5 * (self.beta * x).square()) * (self.beta / math.sqrt(2 * math.pi))
