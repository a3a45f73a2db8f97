"""CIFAR-10 (Krizhevsky 2009): 50000 and 10000 colour images of 32x32, ten classes.

Read from its binary version or from its Python version, as archives or unpacked, or from pictures.
"""

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from twofold.errors import TwofoldError
from twofold.lab.data import pictures
from twofold.lab.data.dataset import Source, TensorPair
from twofold.lab.data.files import download, file_digest, places

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
"""Of the archive of the binary version."""

_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32  # a label and the red, green and blue planes
_NO_NETWORK = "Without a network, copy cifar-10-binary.tar.gz into {directory}."
_MISSING = """\
CIFAR-10 was not found in {places}: neither cifar-10-batches-bin, cifar-10-batches-py nor an archive of one.
Get it with `twofold data fetch cifar10`; or put one of these, or train/<class>/*.png and test/<class>/*.png, or a
Hugging Face copy of it, into a directory "cifar10" of the one that --data-dir or TWOFOLD_DATA names."""


def load_source(data_dir: Path | None = None) -> Source:
    """Read the first version that is found in `data_dir` or $TWOFOLD_DATA: binary, Python, pictures.

    Raises:
        TwofoldError: there is none, or a file is missing or damaged.
    """
    looked_in = places(data_dir, "cifar10")
    for version in _VERSIONS:
        for place in looked_in:
            for path in (place / version.folder, place / version.archive):
                if path.exists():
                    return _read(version, path, path.stat().st_mtime_ns)
    if (found := pictures.find("cifar10", data_dir)) is not None:
        return _source(*(TensorPair(*found.in_memory(split, "RGB", 32, num_classes=10)) for split in ("train", "test")))
    raise TwofoldError(_MISSING.format(places=", ".join(map(str, looked_in)) or "no directory: none was named"))


def fetch(directory: Path, url: str = URL) -> None:
    """Download the archive of the binary version; one that is there and right is kept.

    Raises:
        TwofoldError: the download or the disk failed, or the checksum is wrong. Then nothing half-written is left.
    """
    target = directory / _VERSIONS[0].archive
    if not target.exists() or file_digest(target) != SHA256:
        download(url, target, SHA256, data_set="CIFAR-10", otherwise=_NO_NETWORK.format(directory=directory))


class _Version(NamedTuple):
    """Files of a published form, and how one is read."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    parse: Callable[[bytes, str], TensorPair]


@lru_cache(maxsize=1)
def _read(version: _Version, path: Path, _changed: int) -> Source:
    """Read once a process; the time of change is part of the key."""
    names = (*version.train, version.test)
    *train, test = (version.parse(content, f"{path}: {name}") for name, content in _contents(version, path, names))
    return _source(TensorPair(torch.cat([p.inputs for p in train]), torch.cat([p.targets for p in train])), test)


def _source(train: TensorPair, test: TensorPair) -> Source:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return Source(train, test, num_classes=10, pixel_mean=mean, pixel_std=std)


def _contents(version: _Version, path: Path, names: Sequence[str]) -> list[tuple[str, bytes]]:
    """The named files of a folder or of an archive, which is not unpacked."""
    try:
        if path.is_dir():
            return [(name, (path / name).read_bytes()) for name in names]
        with gzip.open(path) as packed:
            content = packed.read()  # to its end, where its checksum is
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = [(name, archive.extractfile(f"{version.folder}/{name}")) for name in names]
            return [(name, b"" if member is None else member.read()) for name, member in members]
    except (OSError, EOFError, KeyError, zlib.error, tarfile.TarError) as error:
        raise TwofoldError(f"{path} is damaged or incomplete: {error}. Remove it and fetch it again.") from error


def _from_binary(content: bytes, name: str) -> TensorPair:
    if not content or len(content) % _RECORD:
        raise TwofoldError(f"{name} has {len(content)} bytes, expected a multiple of {_RECORD}. Fetch it again.")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return _pair(records[:, 1:], records[:, 0], name)


def _from_pickle(content: bytes, name: str) -> TensorPair:
    """Read a batch of the Python version: a pickled dict, of which nothing but arrays is built."""
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        data, labels = (batch[key] if key in batch else batch[key.decode()] for key in (b"data", b"labels"))
        images, targets = np.asarray(data, np.uint8), np.asarray(labels, np.int64)
    except Exception as error:  # a damaged pickle may raise anything
        raise TwofoldError(f"{name} is no batch of CIFAR-10: {type(error).__name__}: {error}") from error
    if images.ndim != 2 or images.shape != (len(targets), _RECORD - 1):
        raise TwofoldError(f"{name} holds images {images.shape} and {len(targets)} labels, expected [N, 3072] and N.")
    return _pair(images, targets, name)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers, numbers, text and arrays; whatever would call anything else is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # pyrefly: ignore
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not loaded")


def _pair(images: np.ndarray, labels: np.ndarray, name: str) -> TensorPair:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < 10:
        raise TwofoldError(f"{name} has labels from {labels.min()} to {labels.max()}, expected 0 to 9.")
    inputs = torch.from_numpy(images.copy()).view(-1, *_SHAPE)
    return TensorPair(inputs, torch.from_numpy(labels.astype(np.int64)))


_VERSIONS = (
    _Version(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        _from_binary,
    ),
    _Version(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        _from_pickle,
    ),
)
