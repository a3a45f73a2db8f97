"""A small transformer encoder over patches of signals and images (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twofold.errors import TwofoldError
from twofold.lab.models.layers import activation

if TYPE_CHECKING:
    from twofold.lab.config import ModelConfig

_HEAD_WIDTH = 16
_PATCH = {1: 4, 2: 2}
"""Entries of a patch along each axis of a signal and of an image."""


def build(config: "ModelConfig", input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """`depth` pre-norm blocks of `width` channels, heads of 16 channels, feed-forward layers four times as wide.

    Tokens are patches: 4 samples of a signal, 2x2 pixels of an image. Positions are learned, the classes are read from
    the mean over tokens, and `norm` is "layer" (over channels, as transformers have it) or "none".

    Raises:
        TwofoldError: the inputs do not divide into patches, the width into heads, or the norm is "batch".
    """
    if config.norm == "batch":
        raise TwofoldError('The transformer takes norm "layer" or "none", not "batch".')
    if config.width % _HEAD_WIDTH:
        raise TwofoldError(f"The transformer's width is {config.width}; expected a multiple of {_HEAD_WIDTH}.")
    patches = _Patches(input_shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict(patches=patches)
    layers["embed"] = _Embed(patches.size, patches.count, config.width)
    for i in range(config.depth):
        layers[f"attention{i}"] = _Residual(config, _Attention(config.width))
        hidden = nn.Linear(config.width, 4 * config.width)
        out = nn.Linear(4 * config.width, config.width)
        layers[f"feedforward{i}"] = _Residual(
            config, nn.Sequential(OrderedDict(hidden=hidden, activation=activation(config), out=out))
        )
    layers["norm"] = _norm(config)
    layers["mean"] = _Mean()
    layers["head"] = nn.Linear(config.width, num_classes)
    return _initialise(nn.Sequential(layers))


def _norm(config: "ModelConfig") -> nn.Module:
    return nn.Identity() if config.norm == "none" else nn.LayerNorm(config.width)


def _initialise(model: nn.Module) -> nn.Module:
    """Draw weights from N(0, 1 / fan_in), those that end a branch over the root of the branches; biases are zero."""
    branches = sum(isinstance(module, _Residual) for module in model.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            scale = branches**-0.5 if name.endswith("out") else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    return model


class _Patches(nn.Module):
    """[N, ...] -> [N, patches, entries of a patch]."""

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__()
        shape = (1, *input_shape) if len(input_shape) == 1 else tuple(input_shape)
        self.channels, self.extents = shape[0], shape[1:]
        patch = _PATCH.get(len(self.extents))
        if patch is None or any(extent % patch for extent in self.extents):
            raise TwofoldError(
                "The transformer takes signals whose length is a multiple of 4, or images [channels, height, width] of "
                f"even height and width; inputs of shape {list(input_shape)} came."
            )
        self.patch = patch
        self.size = self.channels * patch ** len(self.extents)
        self.count = 1
        for extent in self.extents:
            self.count *= extent // patch

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), self.channels, *self.extents)
        for axis in range(2, x.dim()):
            x = x.unfold(axis, self.patch, self.patch)
        # [N, channels, cells..., patch...] -> [N, cells..., channels, patch...]
        return x.movedim(1, 1 + len(self.extents)).reshape(len(x), self.count, self.size)


class _Embed(nn.Module):
    def __init__(self, size: int, count: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(count, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.positions


class _Residual(nn.Module):
    def __init__(self, config: "ModelConfig", branch: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch = _norm(config), branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(self.norm(x))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.queries_keys_values(x).unflatten(-1, (3, -1, _HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads.unbind(0))
        return self.out(y.transpose(1, 2).flatten(2))


class _Mean(nn.Module):
    """[N, tokens, width] -> [N, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)
