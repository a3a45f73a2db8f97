"""The published set-ups of 2401.10809, and every recipe by name.

The appendix names the nets, batch sizes and the recipes that they follow; learning rates decay by cosine. What it
leaves open is decided here: training examples are kept out for validation, the learning rate rises from 0, BatchNorm
sees each rank's part of a batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from twofold.lab.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    conv,
    fashion_mnist,
    mnist1d,
    transformer,
)


def cifar10() -> RunConfig:
    """CIFAR-10 on WideResNet-28-10 (Zagoruyko & Komodakis 2016, arXiv 1605.07146), 200 epochs."""
    return RunConfig(
        data=DataConfig(name="cifar10", num_train=45_000, num_validation=5_000, augmentation="flip_crop"),
        model=ModelConfig(name="wideresnet", depth=28, width=10, norm="batch"),
        optimizer=OptimizerConfig(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        epochs=200,
        batch_size=128,
        device="cuda",
        precision="bfloat16",
        channels_last=True,
        compile=True,
    )


def fashion_mnist_wideresnet() -> RunConfig:
    """Fashion-MNIST in full on the same net, by the same recipe."""
    data = DataConfig(name="fashion-mnist", num_train=55_000, num_validation=5_000, augmentation="flip_crop")
    return replace(cifar10(), data=data)


def imagenet() -> RunConfig:
    """ImageNet on ResNet-50 (Goyal et al. 2017, arXiv 1706.02677), 350 epochs of batches of 1024."""
    return RunConfig(
        data=DataConfig(
            name="imagenet", num_train=1_231_167, num_validation=50_000, augmentation="random_resized_crop"
        ),
        model=ModelConfig(name="resnet", depth=50, width=64, norm="batch"),
        optimizer=OptimizerConfig(lr=0.4, momentum=0.9, nesterov=True, weight_decay=1e-4, decay_norms=False),
        epochs=350,
        batch_size=1024,
        warmup_epochs=5,
        device="cuda",
        precision="bfloat16",
        channels_last=True,
        compile=True,
    )


RECIPES: Mapping[str, Callable[[], RunConfig]] = {
    "mnist1d": mnist1d,
    "fashion-mnist": fashion_mnist,
    "transformer": transformer,
    "conv": conv,
    "cifar10": cifar10,
    "fashion-mnist-wideresnet": fashion_mnist_wideresnet,
    "imagenet": imagenet,
}
"""Name on the command line -> recipe."""
