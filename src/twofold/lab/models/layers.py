"""Activations and normalisations by name."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from twofold.activations import BetaGELU
from twofold.errors import TwofoldError

if TYPE_CHECKING:
    from twofold.lab.config import ModelConfig


_PLAIN: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}

ACTIVATIONS = (*_PLAIN, "beta_gelu")
"""Names that ModelConfig.activation may take; leaky_relu has slope 0.2, beta_gelu is x Phi(beta x)."""

NORMS = ("none", "batch", "layer")
"""Names that ModelConfig.norm may take; "layer" normalises over all of an example's channels and positions."""

_BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


def activation(config: "ModelConfig") -> nn.Module:
    """The activation that `config` names."""
    return BetaGELU(beta=config.beta) if config.activation == "beta_gelu" else _PLAIN[config.activation]()


def channels_of_images(input_shape: Sequence[int], net: str) -> int:
    """The channels of images [channels, height, width].

    Args:
        input_shape: of one input.
        net: what takes them, for the error.

    Raises:
        TwofoldError: the inputs are no images.
    """
    if len(input_shape) != 3:
        raise TwofoldError(f"A {net} takes images [channels, height, width], not inputs of {list(input_shape)}.")
    return input_shape[0]


def initialise(model: nn.Module) -> nn.Module:
    """Draw every weight from N(0, 2 / fan_in) and set biases to zero (He et al. 2015, arXiv 1502.01852), head included.

    torch's own default is smaller by a factor of sqrt(6), and nets of this size then hardly leave their start.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def norm(config: "ModelConfig", channels: int, dimensions: int) -> nn.Module:
    """The normalisation that `config` names, over [N, channels] and `dimensions` further axes."""
    if config.norm == "none":
        return nn.Identity()
    return _BATCH_NORMS[dimensions](channels) if config.norm == "batch" else nn.GroupNorm(1, channels)
