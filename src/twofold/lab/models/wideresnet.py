"""WideResNet-d-k (Zagoruyko & Komodakis 2016, arXiv 1605.07146), with any activation and normalisation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from twofold.lab.models.layers import activation, channels_of_images, norm

if TYPE_CHECKING:
    from twofold.lab.config import ModelConfig


def build(config: "ModelConfig", input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """A WideResNet of depth d = 6n + 4 and widening factor k = `width`, for images [channels, height, width].

    Raises:
        TwofoldError: the inputs are no images.
    """
    return WideResNet(config, channels_of_images(input_shape, "WideResNet"), num_classes)


class WideResNet(nn.Module):
    """A 3x3 convolution, three groups of n blocks with 16k, 32k and 64k channels, norm, activation, mean, linear."""

    def __init__(self, config: "ModelConfig", in_channels: int, num_classes: int) -> None:
        super().__init__()
        blocks_per_group = (config.depth - 4) // 6
        self.stem = _conv3x3(config, in_channels, 16)
        blocks: list[nn.Module] = []
        channels = 16
        for group in range(3):
            for i in range(blocks_per_group):
                width = 16 * config.width * 2**group
                blocks.append(_Block(config, channels, width, stride=2 if group > 0 and i == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm(config, channels, dimensions=2)
        self.activation = activation(config)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)
        self._initialise(config)

    def _initialise(self, config: "ModelConfig") -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.bias)
        if config.norm == "none":  # otherwise the variance doubles with every block: start each as the identity
            for module in self.modules():
                if isinstance(module, _Block):
                    nn.init.zeros_(module.conv2.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C_in, H, W] to outputs [N, C]."""
        hidden = self.blocks(self.stem(images))
        return self.head(self.mean(self.activation(self.norm(hidden))).flatten(1))


class _Block(nn.Module):
    """Twice norm, activation, 3x3 convolution, beside a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the first activation.
    """

    def __init__(self, config: "ModelConfig", in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = norm(config, in_channels, dimensions=2)
        self.activation1 = activation(config)
        self.conv1 = _conv3x3(config, in_channels, channels, stride)
        self.norm2 = norm(config, channels, dimensions=2)
        self.activation2 = activation(config)
        self.conv2 = _conv3x3(config, channels, channels)
        same = in_channels == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        active = self.activation1(self.norm1(inputs))
        residual = self.conv2(self.activation2(self.norm2(self.conv1(active))))
        return residual + (inputs if self.shortcut is None else self.shortcut(active))


def _conv3x3(config: "ModelConfig", in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=config.norm == "none")
