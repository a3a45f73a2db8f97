"""From the published examples to the tensors of one run: subset, split, label noise, pooling, scale."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.lab.seeding import derive_generator

if TYPE_CHECKING:
    from twofold.lab.config import DataConfig


class TensorPair(NamedTuple):
    """Examples: inputs [N, ...] in float32 and targets [N] in int64."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Source:
    """A data set as published, before any choice of ours.

    Attributes:
        train: the published training examples.
        test: the published test examples.
        num_classes: C.
        validation: examples of the same distribution kept for validation; None takes them from `train`.
        pixel_mean, pixel_std: where inputs are bytes (they stay so until a subset is cut), their statistics on [0, 1].
    """

    train: TensorPair
    test: TensorPair
    num_classes: int
    validation: TensorPair | None = None
    pixel_mean: float = 0.0
    pixel_std: float = 1.0


@dataclass(frozen=True)
class Dataset:
    """The data of one run, in memory. Shared between runs: read it, never write to it.

    Attributes:
        train: training examples, noisy labels included, in an order drawn from the seed.
        validation: clean examples that no training step sees.
        test: clean test examples.
        num_classes: C.
        input_shape: shape of one input.
    """

    train: TensorPair
    validation: TensorPair
    test: TensorPair
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.inputs.shape[1:])


def prepare(config: "DataConfig", source: Source) -> Dataset:
    """Cut `source` as `config` says.

    Raises:
        TwofoldError: more examples are asked for than there are, or the pooling does not fit.
    """
    train, validation = _split(config, source)
    test = _take(source.test, _num_test(config, source), derive_generator("test", config.seed))
    noisy = redraw_labels(train.targets, config.label_noise, source.num_classes, config.seed)
    train = TensorPair(train.inputs, noisy)
    pairs = [
        TensorPair(_pool(config, _scale(source, inputs)), targets) for inputs, targets in (train, validation, test)
    ]
    return Dataset(*pairs, num_classes=source.num_classes)


def redraw_labels(targets: Tensor, share: float, num_classes: int, seed: int) -> Tensor:
    """Labels [N] of which round(share N), chosen at random, are drawn anew uniformly over all classes.

    A redrawn label is the old one again with probability 1 / num_classes.
    """
    generator = derive_generator("label noise", seed)
    chosen = torch.randperm(len(targets), generator=generator)[: round(share * len(targets))]
    noisy = targets.clone()
    noisy[chosen] = torch.randint(num_classes, (len(chosen),), generator=generator)
    return noisy


def _split(config: "DataConfig", source: Source) -> tuple[TensorPair, TensorPair]:
    generator = derive_generator("train", config.seed)
    if source.validation is not None:
        _enough(config, "num_train", config.num_train, len(source.train.targets))
        _enough(config, "num_validation", config.num_validation, len(source.validation.targets))
        train = _take(source.train, config.num_train, generator)
        return train, _take(source.validation, config.num_validation, derive_generator("validation", config.seed))
    wanted = config.num_train + config.num_validation
    _enough(config, "num_train + num_validation", wanted, len(source.train.targets))
    both = _take(source.train, wanted, generator)
    train = TensorPair(*(tensor[: config.num_train] for tensor in both))
    return train, TensorPair(*(tensor[config.num_train :] for tensor in both))


def _num_test(config: "DataConfig", source: Source) -> int:
    available = len(source.test.targets)
    wanted = available if config.num_test is None else config.num_test
    _enough(config, "num_test", wanted, available)
    return wanted


def _enough(config: "DataConfig", name: str, wanted: int, available: int) -> None:
    if wanted > available:
        raise TwofoldError(f"DataConfig.{name} is {wanted}, but {config.name} has only {available} such examples.")


def _take(pair: TensorPair, count: int, generator: torch.Generator) -> TensorPair:
    rows = torch.randperm(len(pair.targets), generator=generator)[:count]
    return TensorPair(pair.inputs[rows], pair.targets[rows])


def _scale(source: Source, inputs: Tensor) -> Tensor:
    if inputs.dtype != torch.uint8:
        return inputs
    return (inputs.float() / 255 - source.pixel_mean) / source.pixel_std


def _pool(config: "DataConfig", inputs: Tensor) -> Tensor:
    if config.pool == 1:
        return inputs
    shape = tuple(inputs.shape[1:])
    if len(shape) != 3 or shape[1] % config.pool or shape[2] % config.pool:
        raise TwofoldError(
            f"DataConfig.pool is {config.pool}, which does not divide the inputs of {config.name}, of shape {shape}; "
            "pooling needs images [channels, height, width] with sides that it divides."
        )
    return F.avg_pool2d(inputs, config.pool)
