"""A small convolutional net, for images and for signals."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from twofold.errors import TwofoldError
from twofold.lab.models.layers import activation, initialise, norm

if TYPE_CHECKING:
    from twofold.lab.config import ModelConfig


def build(config: "ModelConfig", input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """`depth` convolutions 3 wide with `width` channels, all but the first of stride 2; mean over positions; linear.

    Raises:
        TwofoldError: inputs are neither signals [length] or [channels, length] nor images [channels, height, width].
    """
    if len(input_shape) not in (1, 2, 3):
        raise TwofoldError(
            f"The conv net takes inputs of shape [length], [channels, length] or [channels, height, width], "
            f"not {list(input_shape)}."
        )
    image = len(input_shape) == 3
    convolution = nn.Conv2d if image else nn.Conv1d
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(input_shape) == 1:
        layers["channel"] = nn.Unflatten(1, (1, -1))
    channels = 1 if len(input_shape) == 1 else input_shape[0]
    for i in range(config.depth):
        bias = config.norm == "none"
        layers[f"conv{i}"] = convolution(channels, config.width, 3, stride=1 if i == 0 else 2, padding=1, bias=bias)
        if not bias:
            layers[f"norm{i}"] = norm(config, config.width, dimensions=2 if image else 1)
        layers[f"activation{i}"] = activation(config)
        channels = config.width
    layers["mean"] = nn.AdaptiveAvgPool2d(1) if image else nn.AdaptiveAvgPool1d(1)
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels, num_classes)
    return initialise(nn.Sequential(layers))
