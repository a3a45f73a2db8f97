"""From the published examples to the examples of one run: subset, split, label noise, pooling, scale."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.lab.data.stored import StoredImages
from twofold.lab.seeding import derive_generator

if TYPE_CHECKING:
    from twofold.lab.config import DataConfig


class TensorPair(NamedTuple):
    """Examples in memory: inputs [N, ...] in float32 and targets [N] in int64."""

    inputs: Tensor
    targets: Tensor

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.inputs.shape[1:])

    def take(self, rows: Tensor) -> Self:
        """These rows, in this order."""
        return type(self)(self.inputs[rows], self.targets[rows])

    def to(self, device: str) -> Self:
        """The same on another device."""
        return type(self)(self.inputs.to(device), self.targets.to(device))

    def batches(self, rows: Iterable[Tensor], *, crop_seed: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of each set of rows; in memory nothing is cropped, so that no seed is needed."""
        for chosen in rows:
            chosen = chosen.to(self.targets.device)  # noqa: PLW2901
            yield self.inputs[chosen], self.targets[chosen]


Examples = TensorPair | StoredImages
"""What a run trains or is evaluated on; both kinds have targets, input_shape, take, to and batches."""


@dataclass(frozen=True)
class Batches:
    """Batches of the first examples, read whenever they are gone through."""

    examples: Examples
    count: int
    batch_size: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.examples.batches(torch.arange(self.count).split(self.batch_size))

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)


def first_batch(examples: Examples, count: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the first `count` examples, or of all if there are fewer."""
    return next(iter(examples.batches([torch.arange(min(count, len(examples.targets)))])))


@dataclass(frozen=True)
class Source:
    """A data set as published, before any choice of ours.

    Attributes:
        train: the published training examples.
        test: the published test examples.
        num_classes: C.
        validation: examples of the same distribution kept for validation; None takes them from `train`.
        pixel_mean, pixel_std: where inputs are bytes (they stay so until a subset is cut), their statistics on [0, 1],
            for all channels or one by one.
    """

    train: Examples
    test: Examples
    num_classes: int
    validation: TensorPair | None = None
    pixel_mean: float | Sequence[float] = 0.0
    pixel_std: float | Sequence[float] = 1.0


@dataclass(frozen=True)
class Dataset:
    """The data of one run. Shared between runs: read it, never write to it.

    Attributes:
        train: training examples, noisy labels included, in an order drawn from the seed.
        validation: clean examples that no training step sees.
        test: clean test examples.
        num_classes: C.
        input_shape: shape of one input.
    """

    train: Examples
    validation: Examples
    test: Examples
    num_classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.train.input_shape

    def to(self, device: str) -> "Dataset":
        """The same with what is in memory on another device."""
        return Dataset(
            self.train.to(device), self.validation.to(device), self.test.to(device), num_classes=self.num_classes
        )


def prepare(config: "DataConfig", source: Source) -> Dataset:
    """Cut `source` as `config` says.

    Raises:
        TwofoldError: more examples are asked for than there are, or pooling, augmentation or size do not fit.
    """
    train, validation = _split(config, source)
    test = _take(source.test, _num_test(config, source), derive_generator("test", config.seed))
    noisy = redraw_labels(train.targets, config.label_noise, source.num_classes, config.seed)
    cut = (_relabelled(train, noisy), validation, test)
    return Dataset(*(_finished(config, source, examples) for examples in cut), num_classes=source.num_classes)


def redraw_labels(targets: Tensor, share: float, num_classes: int, seed: int) -> Tensor:
    """Labels [N] of which round(share N), chosen at random, are drawn anew uniformly over all classes.

    A redrawn label is the old one again with probability 1 / num_classes.
    """
    generator = derive_generator("label noise", seed)
    chosen = torch.randperm(len(targets), generator=generator)[: round(share * len(targets))]
    noisy = targets.clone()
    noisy[chosen] = torch.randint(num_classes, (len(chosen),), generator=generator)
    return noisy


def _split(config: "DataConfig", source: Source) -> tuple[Examples, Examples]:
    generator = derive_generator("train", config.seed)
    if source.validation is not None:
        _enough(config, "num_train", config.num_train, len(source.train.targets))
        _enough(config, "num_validation", config.num_validation, len(source.validation.targets))
        train = _take(source.train, config.num_train, generator)
        return train, _take(source.validation, config.num_validation, derive_generator("validation", config.seed))
    wanted = config.num_train + config.num_validation
    _enough(config, "num_train + num_validation", wanted, len(source.train.targets))
    rows = torch.randperm(len(source.train.targets), generator=generator)[:wanted]
    return source.train.take(rows[: config.num_train]), source.train.take(rows[config.num_train :])


def _num_test(config: "DataConfig", source: Source) -> int:
    available = len(source.test.targets)
    wanted = available if config.num_test is None else config.num_test
    _enough(config, "num_test", wanted, available)
    return wanted


def _enough(config: "DataConfig", name: str, wanted: int, available: int) -> None:
    if wanted > available:
        raise TwofoldError(f"DataConfig.{name} is {wanted}, but {config.name} has only {available} such examples.")


def _take(examples: Examples, count: int, generator: torch.Generator) -> Examples:
    return examples.take(torch.randperm(len(examples.targets), generator=generator)[:count])


def _relabelled(examples: Examples, targets: Tensor) -> Examples:
    if isinstance(examples, StoredImages):
        return examples.relabelled(targets)
    return TensorPair(examples.inputs, targets)


def _finished(config: "DataConfig", source: Source, examples: Examples) -> Examples:
    """Scale and pool what is in memory; say how large images will be that are read one by one."""
    if isinstance(examples, StoredImages):
        if config.pool != 1:
            raise TwofoldError(
                f"DataConfig.pool is {config.pool}, but the images of {config.name} are read one by one: "
                "leave it 1 and set image_size."
            )
        return examples.resized(config.image_size or examples.size)
    if config.augmentation == "random_resized_crop" or config.image_size is not None:
        raise TwofoldError(
            f"DataConfig.augmentation {config.augmentation!r} and image_size {config.image_size} do not fit: "
            f"the examples of {config.name} are in memory, all of one size; take augmentation none or flip_crop, and "
            "image_size None."
        )
    return TensorPair(_pool(config, _scale(source, examples.inputs)), examples.targets)


def _scale(source: Source, inputs: Tensor) -> Tensor:
    if inputs.dtype != torch.uint8:
        return inputs
    mean, std = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (source.pixel_mean, source.pixel_std))
    return (inputs.float() / 255 - mean) / std


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
