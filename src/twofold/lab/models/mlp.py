"""A multilayer perceptron on flattened inputs."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from twofold.lab.models.layers import activation, initialise, norm

if TYPE_CHECKING:
    from twofold.lab.config import ModelConfig


def build(config: "ModelConfig", input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """`depth` hidden layers of `width` units, each linear, norm, activation; then a linear layer to the classes."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    size = math.prod(input_shape)
    for i in range(config.depth):
        layers[f"linear{i}"] = nn.Linear(size, config.width)
        if config.norm != "none":
            layers[f"norm{i}"] = norm(config, config.width, dimensions=0)
        layers[f"activation{i}"] = activation(config)
        size = config.width
    layers["head"] = nn.Linear(size, num_classes)
    return initialise(nn.Sequential(layers))
