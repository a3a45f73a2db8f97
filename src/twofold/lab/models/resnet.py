"""ResNet-50, -101 and -152 (He et al. 2016, arXiv 1512.03385), with any activation and normalisation.

The stride of a block is in its 3x3 convolution, and each block starts as the identity, as in Goyal et al. 2017
(arXiv 1706.02677).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from twofold.lab.models.layers import activation, channels_of_images, norm

if TYPE_CHECKING:
    from twofold.lab.config import ModelConfig

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Depth -> blocks in each of the four groups."""

_EXPANSION = 4


def build(config: "ModelConfig", input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """A ResNet of bottleneck blocks, `width` channels (64 as published) in the first group's 3x3 convolutions.

    Raises:
        TwofoldError: the inputs are no images [channels, height, width].
    """
    return ResNet(config, channels_of_images(input_shape, "ResNet"), num_classes)


class ResNet(nn.Module):
    """A 7x7 convolution and a max-pooling of stride 2 each, four groups of blocks, mean over positions, linear."""

    def __init__(self, config: "ModelConfig", in_channels: int, num_classes: int) -> None:
        super().__init__()
        channels = config.width
        self.stem = _convolution(config, in_channels, channels, 7, stride=2)
        self.norm = norm(config, channels, dimensions=2)
        self.activation = activation(config)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        for group, count in enumerate(BLOCKS[config.depth]):
            width = config.width * 2**group
            for i in range(count):
                blocks.append(_Bottleneck(config, channels, width, stride=2 if group > 0 and i == 0 else 1))
                channels = _EXPANSION * width
        self.blocks = nn.Sequential(*blocks)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)
        self._initialise(config)

    def _initialise(self, config: "ModelConfig") -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        for module in self.modules():  # the last factor of each block's branch is 0, so that it starts as the identity
            if isinstance(module, _Bottleneck):
                last = module.conv3 if config.norm == "none" else module.norm3
                nn.init.zeros_(last.get_parameter("weight"))

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C_in, H, W] to outputs [N, C]."""
        hidden = self.pool(self.activation(self.norm(self.stem(images))))
        return self.head(self.mean(self.blocks(hidden)).flatten(1))


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with a norm, beside a shortcut; the activation follows the sum."""

    def __init__(self, config: "ModelConfig", in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = _EXPANSION * width
        self.conv1 = _convolution(config, in_channels, width, 1)
        self.norm1 = norm(config, width, dimensions=2)
        self.activation1 = activation(config)
        self.conv2 = _convolution(config, width, width, 3, stride)
        self.norm2 = norm(config, width, dimensions=2)
        self.activation2 = activation(config)
        self.conv3 = _convolution(config, width, channels, 1)
        self.norm3 = norm(config, channels, dimensions=2)
        same = in_channels == channels and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(
                _convolution(config, in_channels, channels, 1, stride), norm(config, channels, dimensions=2)
            )
        )
        self.activation3 = activation(config)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.activation1(self.norm1(self.conv1(inputs)))
        hidden = self.activation2(self.norm2(self.conv2(hidden)))
        return self.activation3(self.norm3(self.conv3(hidden)) + self.shortcut(inputs))


def _convolution(config: "ModelConfig", in_channels: int, channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    bias = config.norm == "none"
    return nn.Conv2d(in_channels, channels, size, stride=stride, padding=size // 2, bias=bias)
