"""Activations whose second derivative is under control."""

from twofold.activations.beta_gelu import BetaGELU, beta_gelu
from twofold.activations.gaussian import gaussian
from twofold.activations.second_derivative import second_derivative

__all__ = ["BetaGELU", "beta_gelu", "gaussian", "second_derivative"]
