"""Data sets by name, cut, split and noised as a DataConfig says.

Adding one: a file with `load_source(data_dir) -> Source`, and a row in DATA_SETS and in PUBLISHED; where it can be
downloaded also `fetch(directory)`, and a row in _FETCH.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from twofold.errors import TwofoldError
from twofold.lab.data import cifar10, fashion_mnist, imagenet, mnist1d
from twofold.lab.data.augmentation import AUGMENTATIONS, augment
from twofold.lab.data.dataset import Batches, Dataset, Examples, Source, TensorPair, first_batch, prepare

if TYPE_CHECKING:
    from twofold.lab.config import DataConfig

__all__ = [
    "AUGMENTATIONS",
    "DATA_SETS",
    "PUBLISHED",
    "Batches",
    "Dataset",
    "Examples",
    "Source",
    "TensorPair",
    "augment",
    "fetch",
    "first_batch",
    "load",
]


class Published(NamedTuple):
    """The size of a published data set."""

    input_shape: tuple[int, ...]
    num_classes: int
    num_test: int


DATA_SETS: Mapping[str, Callable[[Path | None], Source]] = {
    "mnist1d": mnist1d.load_source,
    "fashion-mnist": fashion_mnist.load_source,
    "cifar10": cifar10.load_source,
    "imagenet": imagenet.load_source,
}
"""Every data set: its name and what reads or makes it."""

PUBLISHED: Mapping[str, Published] = {
    "mnist1d": Published((40,), 10, 1_000),
    "fashion-mnist": Published((1, 28, 28), 10, 10_000),
    "cifar10": Published((3, 32, 32), 10, 10_000),
    "imagenet": Published((3, 224, 224), 1000, 50_000),
}
"""What is known of each without its files."""

_FETCH: Mapping[str, Callable[[Path], None]] = {"fashion-mnist": fashion_mnist.fetch, "cifar10": cifar10.fetch}


def load(config: "DataConfig", data_dir: Path | None = None) -> Dataset:
    """The data of a run; the same tensors whenever and wherever it is called with the same configuration.

    Args:
        config: which data, how much, and how noisy.
        data_dir: where downloaded files lie; None looks in $TWOFOLD_DATA and the usual places.

    Raises:
        TwofoldError: files are missing or damaged, or more examples are asked for than there are.

    Example:
        >>> from twofold.lab.config import DataConfig
        >>> load(DataConfig(name="mnist1d")).train.inputs.shape
        torch.Size([4000, 40])
    """
    return prepare(config, DATA_SETS[config.name](data_dir))


def fetch(name: str, data_dir: Path) -> None:
    """Download a data set into `data_dir` and check it; files that are there and right are kept.

    Raises:
        TwofoldError: the name is unknown, the network or the disk refuses, or what came is not the data.
    """
    if name not in DATA_SETS:
        raise TwofoldError(f"There is no data set {name!r}; known: {', '.join(DATA_SETS)}.")
    if name in _FETCH:
        _FETCH[name](Path(data_dir))
