"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 60000 and 10000 grey images of 28x28, ten classes."""

from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from twofold.errors import TwofoldError
from twofold.lab.data import pictures
from twofold.lab.data.dataset import Source, TensorPair
from twofold.lab.data.files import download, places
from twofold.lab.data.idx import read_idx, read_maybe_gzipped

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""The four files and the SHA-256 of what is in them, decompressed: mirrors compress them differently."""

_MISSING = """\
Fashion-MNIST was not found: {name} (plain or .gz) is in none of {places}.
Get it with `twofold data fetch fashion-mnist`, or `apt-get install dataset-fashion-mnist`, or put its four IDX files,
or train/<class>/*.png and test/<class>/*.png, or a Hugging Face copy of it, into a directory "fashion-mnist" of the one
that --data-dir or TWOFOLD_DATA names."""
_NO_NETWORK = """\
Without a network, copy its four IDX files into {directory}, or install Debian's package dataset-fashion-mnist."""


def load_source(data_dir: Path | None = None) -> Source:
    """Read the four IDX files from `data_dir`, $TWOFOLD_DATA or Debian's package: the first that has one.

    Where none has, pictures are read from the folder "fashion-mnist" there, as `pictures.find` does.

    Raises:
        TwofoldError: a file is found nowhere, or is damaged, or images and labels do not belong together.
    """
    try:
        paths = [_find(name, data_dir) for name in SHA256]
    except TwofoldError:
        if (found := pictures.find("fashion-mnist", data_dir)) is None:
            raise
        return _source(*(TensorPair(*found.in_memory(split, "L", 28, num_classes=10)) for split in ("train", "test")))
    return _read(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


def fetch(directory: Path, url: str = URL) -> None:
    """Download the four files into `directory`; those that are there and right are kept.

    Raises:
        TwofoldError: the download or the disk failed, or a checksum is wrong. Then nothing half-written is left.
    """
    for name, digest in SHA256.items():
        target = directory / f"{name}.gz"
        if not target.exists() or _content_digest(target) != digest:
            otherwise = _NO_NETWORK.format(directory=directory)
            download(
                f"{url}/{name}.gz",
                target,
                digest,
                data_set="Fashion-MNIST",
                otherwise=otherwise,
                digest=_content_digest,
            )


def _content_digest(path: Path) -> str:
    try:
        return sha256(read_maybe_gzipped(path)).hexdigest()
    except TwofoldError:
        return "none, for it does not decompress"


def _find(name: str, data_dir: Path | None) -> Path:
    looked_in = [*places(data_dir, "fashion-mnist", "FashionMNIST/raw"), DEBIAN]
    for place in looked_in:
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    raise TwofoldError(_MISSING.format(name=name, places=", ".join(map(str, looked_in))))


@lru_cache(maxsize=1)
def _read(files: tuple[tuple[Path, int, int], ...]) -> Source:
    """Read once a process; size and time of change are part of the key, so that a replaced file is read anew."""
    images, labels, test_images, test_labels = (path for path, _, _ in files)
    return _source(_pair(images, labels), _pair(test_images, test_labels))


def _source(train: TensorPair, test: TensorPair) -> Source:
    return Source(train, test, num_classes=10, pixel_mean=0.2860, pixel_std=0.3530)


def _pair(image_path: Path, label_path: Path) -> TensorPair:
    images, labels = read_idx(image_path), read_idx(label_path)
    _expect(image_path, images, images.ndim == 3 and images.shape[1:] == (28, 28), "images of shape [N, 28, 28]")
    _expect(label_path, labels, labels.shape == images.shape[:1], f"{len(images)} labels, one for each image")
    _expect(label_path, labels, not labels.numel() or int(labels.max()) < 10, "labels from 0 to 9")
    return TensorPair(images[:, None], labels.long())


def _expect(path: Path, came: Tensor, fine: bool, expected: str) -> None:
    if not fine:
        raise TwofoldError(f"{path} holds an array of shape {tuple(came.shape)}, expected {expected}.")
