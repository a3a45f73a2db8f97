"""Models by name, built from a ModelConfig.

Adding one: a file with its `build(config, input_shape, num_classes)`, and a row in MODELS.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from twofold.lab.models import conv, mlp, resnet, transformer, wideresnet
from twofold.lab.models.layers import ACTIVATIONS, NORMS

if TYPE_CHECKING:
    from twofold.lab.config import ModelConfig

__all__ = ["ACTIVATIONS", "MODELS", "NORMS", "RESNET_DEPTHS", "build"]

RESNET_DEPTHS = tuple(resnet.BLOCKS)
"""Depths that a ResNet may have."""

MODELS: Mapping[str, Callable[["ModelConfig", Sequence[int], int], nn.Module]] = {
    "mlp": mlp.build,
    "conv": conv.build,
    "wideresnet": wideresnet.build,
    "resnet": resnet.build,
    "transformer": transformer.build,
}
"""Every model: its name and what builds it from (config, input_shape, num_classes)."""


def build(config: "ModelConfig", input_shape: Sequence[int], num_classes: int, seed: int) -> nn.Module:
    """The model of a run in float32, its parameters drawn from `seed`; torch's global RNG stays as it was.

    Args:
        config: which model, how large, with which activation and normalisation.
        input_shape: shape of one input, without the batch.
        num_classes: C, the number of outputs.
        seed: seed of the initialisation.

    Raises:
        TwofoldError: the model does not take inputs of this shape.

    Example:
        >>> from twofold.lab.config import ModelConfig
        >>> model = build(ModelConfig(name="mlp", width=8, depth=1), (40,), 10, seed=0)
        >>> sum(p.numel() for p in model.parameters())
        418
    """
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        try:
            torch.default_generator.manual_seed(seed)
            return MODELS[config.name](config, input_shape, num_classes)
        finally:
            torch.set_default_dtype(dtype)
