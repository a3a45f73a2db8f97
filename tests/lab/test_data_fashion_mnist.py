import gzip
import struct
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch

from twofold.errors import TwofoldError
from twofold.lab.config import DataConfig
from twofold.lab.config import fashion_mnist as recipe
from twofold.lab.data import fashion_mnist, load

COUNTS = {"train": 60, "t10k": 20}
SMALL = DataConfig(name="fashion-mnist", num_train=40, num_validation=20)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def contents():
    """Four small files in the real format."""
    numbers = np.random.default_rng(0)
    files = {}
    for part, count in COUNTS.items():
        files[f"{part}-images-idx3-ubyte"] = idx(numbers.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(numbers.integers(0, 10, count, dtype=np.uint8))
    return files


@pytest.fixture
def directory(tmp_path, contents, monkeypatch):
    monkeypatch.delenv("TWOFOLD_DATA", raising=False)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nowhere")
    place = tmp_path / "files"
    place.mkdir()
    for name, content in contents.items():
        (place / f"{name}.gz").write_bytes(gzip.compress(content))
    return place


def test_reads_plain_and_gzipped_files_and_normalises(directory, contents):
    name = "train-images-idx3-ubyte"
    gzipped = load(SMALL, directory)
    (directory / f"{name}.gz").unlink()
    (directory / name).write_bytes(contents[name])
    plain = load(SMALL, directory)
    assert torch.equal(gzipped.train.inputs, plain.train.inputs)
    assert plain.train.inputs.dtype == torch.float32
    assert plain.train.targets.dtype == torch.int64
    pixels = np.frombuffer(contents[name][16:], np.uint8).reshape(60, 1, 28, 28) / 255
    both = torch.cat([plain.train.inputs, plain.validation.inputs])
    assert both.double().sum().item() == pytest.approx(((pixels - 0.2860) / 0.3530).sum(), rel=1e-5)
    assert len(plain.test.targets) == 20


def test_looks_in_the_environment_and_in_debians_package(directory, monkeypatch):
    monkeypatch.setenv("TWOFOLD_DATA", str(directory))
    assert len(load(SMALL).train.targets) == 40
    monkeypatch.delenv("TWOFOLD_DATA")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", directory)
    assert len(load(SMALL).train.targets) == 40


def test_missing_files_are_told_with_every_way_to_get_them(directory):
    with pytest.raises(TwofoldError) as error:
        load(SMALL, directory / "elsewhere")
    for text in (str(directory / "elsewhere"), "twofold data fetch fashion-mnist", "--data-dir", "TWOFOLD_DATA", "apt"):
        assert text in str(error.value)


def test_a_replaced_file_is_read_anew(directory, contents):
    first = load(SMALL, directory)
    name = "train-images-idx3-ubyte"
    (directory / f"{name}.gz").write_bytes(gzip.compress(contents[name][:16] + bytes(60 * 28 * 28)))
    assert not torch.equal(load(SMALL, directory).train.inputs, first.train.inputs)


def truncated(content):
    return gzip.compress(content[:-100]), f"{len(content) - 100} bytes", f"expected {len(content)}"


def too_long(content):
    return gzip.compress(content + b"\0"), f"{len(content) + 1} bytes", f"expected {len(content)}"


def truncated_gzip(content):
    damaged = gzip.compress(content)[:-100]
    return damaged, f"{len(damaged)} bytes", "damaged"


def flipped_gzip(content):
    damaged = bytearray(gzip.compress(content))
    damaged[len(damaged) // 2] ^= 0xFF
    return bytes(damaged), "damaged", "fetch it again"


def no_header(content):
    return content[:10], "10 bytes", "header of 16"


def other_format(content):
    return b"<html>", "3c 68 74 6d", "00 00 08"


def empty(content):
    return b"", "nothing", "00 00 08"


def other_shape(content):
    return idx(np.zeros((60, 32, 32), np.uint8)), "(60, 32, 32)", "[N, 28, 28]"


@pytest.mark.parametrize(
    "damage",
    [truncated, too_long, truncated_gzip, flipped_gzip, no_header, other_format, empty, other_shape],
    ids=lambda damage: damage.__name__,
)
def test_damaged_images_are_told_with_file_and_sizes(directory, contents, damage):
    name = "train-images-idx3-ubyte"
    damaged, *texts = damage(contents[name])
    (directory / f"{name}.gz").write_bytes(damaged)
    with pytest.raises(TwofoldError) as error:
        load(SMALL, directory)
    for text in (str(directory / name), *texts):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("labels", "told"), [(np.zeros(59, np.uint8), "60 labels"), (np.full(60, 10, np.uint8), "0 to 9")]
)
def test_labels_that_do_not_belong_to_the_images_are_told(directory, labels, told):
    (directory / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(TwofoldError, match=told):
        load(SMALL, directory)


def test_fetch_gets_checks_and_keeps(directory, contents, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "SHA256", {name: sha256(c).hexdigest() for name, c in contents.items()})
    target = tmp_path / "new" / "place"
    fashion_mnist.fetch(target, directory.as_uri())
    assert sorted(path.name for path in target.iterdir()) == sorted(f"{name}.gz" for name in contents)
    assert len(load(SMALL, target).train.targets) == 40
    times = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    kept, damaged = sorted(target.iterdir())[:2]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    fashion_mnist.fetch(target, directory.as_uri())
    assert kept.stat().st_mtime_ns == times[kept]
    assert len(load(SMALL, target).train.targets) == 40


def test_fetch_refuses_other_content_and_leaves_nothing(directory, tmp_path):
    target = tmp_path / "new"
    with pytest.raises(TwofoldError, match=r"SHA-256 .* expected c59f468a"):
        fashion_mnist.fetch(target, directory.as_uri())
    assert not list(target.iterdir())
    name = "train-images-idx3-ubyte.gz"
    (directory / name).write_bytes((directory / name).read_bytes()[:-50])
    with pytest.raises(TwofoldError, match=r"train-images.*does not decompress"):
        fashion_mnist.fetch(target, directory.as_uri())
    assert not list(target.iterdir())


def test_fetch_without_a_source_says_what_to_do(tmp_path):
    target = tmp_path / "new"
    for url in ((tmp_path / "absent").as_uri(), "http://127.0.0.1:9"):
        with pytest.raises(TwofoldError, match=r"could not be fetched(.|\n)*dataset-fashion-mnist"):
            fashion_mnist.fetch(target, url)
    assert not list(target.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(TwofoldError, match="cannot be written"):
        fashion_mnist.fetch(tmp_path / "file" / "below", "http://127.0.0.1:9")


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_published_files(monkeypatch, tmp_path):
    monkeypatch.delenv("TWOFOLD_DATA", raising=False)
    dataset = load(replace(recipe().data, label_noise=0))
    assert [len(p.targets) for p in (dataset.train, dataset.validation, dataset.test)] == [2000, 2000, 10000]
    assert dataset.input_shape == (1, 14, 14)
    assert torch.bincount(dataset.test.targets).tolist() == [1000] * 10
    full = load(DataConfig(name="fashion-mnist", num_train=59000, num_validation=1000))
    assert abs(full.train.inputs.mean()) < 0.01
    assert abs(full.train.inputs.std() - 1) < 0.01
    for name, digest in fashion_mnist.SHA256.items():
        content = gzip.decompress((fashion_mnist.DEBIAN / f"{name}.gz").read_bytes())
        assert sha256(content).hexdigest() == digest
