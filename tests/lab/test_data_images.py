import os
import pickle
import random
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lab.picture_files import CLASSES, archive, cifar_binary, cifar_python, folders, images_and_labels
from twofold.errors import TwofoldError
from twofold.lab.config import DataConfig
from twofold.lab.data import cifar10, first_batch, load, pictures, stored
from twofold.lab.data.dataset import TensorPair
from twofold.lab.data.stored import StoredImages, centre, random_crop

CIFAR = DataConfig("cifar10", num_train=15, num_validation=5)
IMAGENET = DataConfig("imagenet", num_train=9, num_validation=3, augmentation="random_resized_crop", image_size=16)


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch):
    monkeypatch.delenv("TWOFOLD_DATA", raising=False)


def sorted_rows(pair: TensorPair) -> list[list[float]]:
    return sorted(torch.cat([pair.targets[:, None], pair.inputs.flatten(1)], 1).tolist())


# CIFAR-10


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "archive"])
@pytest.mark.parametrize("inside", [".", "cifar10"])
@pytest.mark.parametrize("write", [cifar_binary, cifar_python], ids=["binary", "python"])
def test_cifar10_in_its_published_forms(tmp_path, write, inside, packed):
    name = {cifar_binary: "cifar-10-batches-bin", cifar_python: "cifar-10-batches-py"}[write]
    data_dir = tmp_path / "data"
    (data_dir / inside).mkdir(parents=True, exist_ok=True)
    if packed:
        write(tmp_path / name)
        ending = {cifar_binary: "binary", cifar_python: "python"}[write]
        archive(tmp_path / name, data_dir / inside / f"cifar-10-{ending}.tar.gz")
    else:
        write(data_dir / inside / name)
    source = cifar10.load_source(data_dir)
    images, labels = (
        np.concatenate(parts) for parts in zip(*(images_and_labels(4, seed) for seed in range(5)), strict=True)
    )
    assert np.array_equal(source.train.inputs.numpy(), images)
    assert np.array_equal(source.train.targets.numpy(), labels)
    assert np.array_equal(source.test.inputs.numpy(), images_and_labels(4, 5)[0])
    data = load(CIFAR, data_dir)
    assert data.input_shape == (3, 32, 32)
    assert len(data.train.targets) == 15
    expected = (
        torch.from_numpy(images_and_labels(4, 5)[0]) / 255 - torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    ) / (torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1))
    found = TensorPair(expected, torch.arange(4))
    torch.testing.assert_close(torch.tensor(sorted_rows(data.test)), torch.tensor(sorted_rows(found)))


def test_cifar10_as_pictures(tmp_path):
    images, labels = images_and_labels(6, classes=3)
    for split in ("train", "test"):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = tmp_path / "cifar10" / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i}.png")
    source = cifar10.load_source(tmp_path)
    assert source.train.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(source.train.inputs.numpy(), images[[0, 3, 1, 4, 2, 5]])


def test_more_classes_than_the_data_set_has_are_told(tmp_path):
    for split in ("train", "test"):
        for name in "abcdefghijkl":
            (tmp_path / "cifar10" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "cifar10" / split / name / "0.png")
    with pytest.raises(TwofoldError, match="cifar10 has 12 classes; expected 10"):
        cifar10.load_source(tmp_path)


def test_fashion_mnist_as_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("twofold.lab.data.fashion_mnist.DEBIAN", tmp_path / "none")
    folders(tmp_path / "fashion-mnist", ending="png", size=(28, 28), grey=True)
    data = load(DataConfig("fashion-mnist", num_train=9, num_validation=3), tmp_path)
    assert data.input_shape == (1, 28, 28)
    assert len(data.test.targets) == 6


def test_fashion_mnist_where_torchvision_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr("twofold.lab.data.fashion_mnist.DEBIAN", tmp_path / "none")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 4)):
        images, labels = images_and_labels(count)
        for name, array in (("images-idx3", images[:, 0, :28, :28]), ("labels-idx1", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    data = load(DataConfig("fashion-mnist", num_train=9, num_validation=3), tmp_path)
    assert (data.input_shape, len(data.test.targets)) == ((1, 28, 28), 4)


def test_cifar10_that_is_nowhere(tmp_path):
    with pytest.raises(TwofoldError, match=r"(?s)not found in .*twofold data fetch cifar10"):
        load(CIFAR, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "data_batch_3.bin").unlink(), "data_batch_3.bin"),
        (lambda folder: (folder / "test_batch.bin").write_bytes(b"\x00" * 3072), "test_batch.bin.*multiple of 3073"),
        (lambda folder: (folder / "test_batch.bin").write_bytes(b"\x0b" * 3073), "labels from 11 to 11"),
    ],
    ids=["missing", "short", "label"],
)
def test_damaged_binaries_are_told(tmp_path, spoil, told):
    folder = tmp_path / "cifar-10-batches-bin"
    cifar_binary(folder)
    spoil(folder)
    with pytest.raises(TwofoldError, match=told):
        load(CIFAR, tmp_path)


def test_a_damaged_archive_is_told(tmp_path):
    cifar_binary(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "data").mkdir()
    target = tmp_path / "data" / "cifar-10-binary.tar.gz"
    archive(tmp_path / "cifar-10-batches-bin", target)
    target.write_bytes(target.read_bytes()[:500])
    with pytest.raises(TwofoldError, match=r"cifar-10-binary\.tar\.gz is damaged"):
        load(CIFAR, tmp_path / "data")


def test_a_bit_that_flipped_in_an_archive_is_told(tmp_path):
    cifar_binary(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "data").mkdir()
    target = tmp_path / "data" / "cifar-10-binary.tar.gz"
    archive(tmp_path / "cifar-10-batches-bin", target)
    whole = target.read_bytes()
    for place in range(60, len(whole), len(whole) // 40):  # behind the name, which has no checksum
        target.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(TwofoldError, match=r"cifar-10-binary\.tar\.gz is damaged"):
            load(CIFAR, tmp_path / "data")


class _Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "content",
    [
        lambda mark: pickle.dumps({"data": _Hostile(mark), "labels": []}, protocol=2),
        lambda mark: pickle.dumps(_Hostile(mark)),
        lambda mark: pickle.dumps({b"data": np.array([_Hostile(mark)], dtype=object), b"labels": [1]}, protocol=2),
        lambda mark: b"not a pickle",
        lambda mark: b"",
        lambda mark: pickle.dumps([1, 2]),
        lambda mark: pickle.dumps({"data": [[1, 2]], "labels": [1]}),
    ],
    ids=["call", "bare call", "object array", "text", "empty", "list", "shape"],
)
def test_a_pickle_runs_no_code(tmp_path, content):
    folder = tmp_path / "cifar-10-batches-py"
    cifar_python(folder)
    (folder / "data_batch_2").write_bytes(content(tmp_path / "was here"))
    with pytest.raises(TwofoldError, match="data_batch_2"):
        load(CIFAR, tmp_path)
    assert not (tmp_path / "was here").exists()


def test_fetching_cifar10_checks_what_came(tmp_path, monkeypatch):
    cifar_binary(tmp_path / "cifar-10-batches-bin")
    served = tmp_path / "served.tar.gz"
    archive(tmp_path / "cifar-10-batches-bin", served)
    data_dir = tmp_path / "data"
    with pytest.raises(TwofoldError, match="SHA-256"):
        cifar10.fetch(data_dir, served.as_uri())
    assert not list(data_dir.iterdir())
    monkeypatch.setattr(cifar10, "SHA256", cifar10.file_digest(served))
    cifar10.fetch(data_dir, served.as_uri())
    assert len(load(CIFAR, data_dir).train.targets) == 15
    served.unlink()
    cifar10.fetch(data_dir, served.as_uri())  # what is there is kept
    with pytest.raises(TwofoldError, match="Without a network"):
        cifar10.fetch(tmp_path / "other", served.as_uri())


# pictures


def test_imagenet_from_folders(tmp_path):
    folders(tmp_path / "imagenet")
    data = load(IMAGENET, tmp_path)
    assert (data.num_classes, data.input_shape) == (3, (3, 16, 16))
    assert isinstance(data.train, StoredImages)
    assert [len(e.targets) for e in (data.train, data.validation, data.test)] == [9, 3, 6]
    used = [data.train.pictures.paths[i] for e in (data.train, data.validation) for i in e.rows.tolist()]
    assert len(set(used)) == 12
    inputs, targets = first_batch(data.test, 100)
    assert inputs.dtype == torch.float32
    for x, y, row in zip(inputs, targets.tolist(), data.test.rows.tolist(), strict=True):
        path = data.test.pictures.paths[row]
        assert CLASSES[y] in path
        pixels = np.asarray(centre(Image.open(path), 16), dtype=np.float32) / 255
        expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_the_same_crops_whoever_decodes(tmp_path, monkeypatch):
    folders(tmp_path / "imagenet")
    train = load(IMAGENET, tmp_path).train
    rows = [torch.tensor([3, 1, 4]), torch.tensor([5]), torch.tensor([8, 0])]
    state = torch.get_rng_state()
    alone = list(train.batches(rows, crop_seed=7))
    monkeypatch.setattr(stored, "FEW", 0)
    helped = list(train.batches(rows, crop_seed=7))
    assert torch.equal(state, torch.get_rng_state())
    for (x, y), (helped_x, helped_y), chosen in zip(alone, helped, rows, strict=True):
        assert torch.equal(x, helped_x)
        assert torch.equal(y, helped_y)
        assert torch.equal(y, train.targets[chosen])
    again = dict(zip([3, 1, 4], alone[0][0], strict=True))
    one = next(iter(train.batches([torch.tensor([4])], crop_seed=7)))[0][0]
    assert torch.equal(one, again[4])  # an image's crop does not depend on its batch
    assert not torch.equal(one, next(iter(train.batches([torch.tensor([4])], crop_seed=8)))[0][0])
    assert not torch.equal(one, first_batch(train, 5)[0][4])


def test_random_crops_stay_inside_and_cover_the_picture():
    ramp = np.stack(np.broadcast_arrays(np.arange(60)[None, :] * 4, np.arange(40)[:, None] * 6, 0), -1).astype(np.uint8)
    picture, draw = Image.fromarray(ramp), random.Random(0)
    corners, mirrored = [], 0
    for _ in range(400):
        part = np.asarray(random_crop(picture, 8, draw), dtype=float)
        assert part.shape == (8, 8, 3)
        across, down = part[4, :, 0] / 4, part[:, 4, 1] / 6
        mirrored += across[0] > across[-1]
        width, height = (abs(side[-1] - side[0]) * 8 / 7 for side in (across, down))
        assert 0.05 < width * height / 2400 < 1.1
        assert 0.65 < width / height < 1.5
        corners.append((min(across), min(down), max(across), max(down)))
    assert 160 < mirrored < 240
    low, high = np.min(corners, 0), np.max(corners, 0)
    assert (low[:2] < 3).all()
    assert high[2] > 56
    assert high[3] > 37


def test_a_long_picture_falls_back_on_its_centre():
    picture = Image.fromarray(np.zeros((2, 90, 3), np.uint8))
    assert random_crop(picture, 4, random.Random(0)).size == (4, 4)
    assert centre(picture, 4).size == (4, 4)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda root: [p.unlink() for p in (root / "train" / CLASSES[1]).iterdir()], f"no picture of {CLASSES[1]}"),
        (lambda root: (root / "val").rename(root / "other"), "none of val, validation, test"),
        (lambda root: (root / "val" / CLASSES[0]).rename(root / "val" / "n9"), "differ.*n9"),
        (lambda root: [p.write_bytes(p.read_bytes()[:200]) for p in root.glob("train/*/*")], "cannot be decoded"),
    ],
    ids=["empty class", "no test", "classes", "truncated"],
)
def test_damaged_folders_are_told(tmp_path, spoil, told):
    folders(tmp_path / "imagenet")
    spoil(tmp_path / "imagenet")
    with pytest.raises(TwofoldError, match=told):
        first_batch(load(IMAGENET, tmp_path).train, 9)


def test_a_picture_that_another_process_cannot_decode_is_named_in_a_line(tmp_path, monkeypatch):
    folders(tmp_path / "imagenet")
    for path in tmp_path.glob("imagenet/train/*/*"):
        path.write_bytes(path.read_bytes()[:200])
    monkeypatch.setattr(stored, "FEW", 0)
    with pytest.raises(TwofoldError, match=r"^\S+ cannot be decoded: [^\n]*$"):
        first_batch(load(IMAGENET, tmp_path).train, 9)


def test_a_picture_that_is_far_too_large_is_named(tmp_path, monkeypatch):
    folders(tmp_path / "imagenet")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(TwofoldError, match=r"^\S+ cannot be decoded: Image size"):
        first_batch(load(IMAGENET, tmp_path).train, 9)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pool": 2}, "pool"),
        ({"name": "mnist1d"}, "in memory"),
        ({"name": "mnist1d", "augmentation": "none"}, "image_size"),
    ],
    ids=str,
)
def test_choices_that_do_not_fit_are_told(tmp_path, change, told):
    folders(tmp_path / "imagenet")
    with pytest.raises(TwofoldError, match=told):
        load(DataConfig(**{**IMAGENET.to_dict(), **change}), tmp_path)


def test_imagenet_that_is_nowhere(tmp_path):
    with pytest.raises(TwofoldError, match=r"ImageNet was not found.*imagenet"):
        load(IMAGENET, tmp_path)


@pytest.mark.parametrize("mark", ["dataset_dict.json", "data/train-00000-of-00001.parquet"])
def test_a_hugging_face_copy_names_its_extra(tmp_path, monkeypatch, mark):
    path = tmp_path / "imagenet" / mark
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TwofoldError, match=r"twofold\[datasets\]"):
        pictures.find("imagenet", tmp_path)
