"""Small files in the formats in which CIFAR-10, Fashion-MNIST and ImageNet are published."""

import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n02102040", "n03000684")


def images_and_labels(count: int, seed: int = 0, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [count, 3, 32, 32], and labels of which all classes occur."""
    rng = np.random.default_rng(seed)
    return rng.integers(256, size=(count, 3, 32, 32), dtype=np.uint8), (np.arange(count) % classes).astype(np.uint8)


def cifar_binary(folder: Path, per_file: int = 4) -> None:
    """cifar-10-batches-bin: records of a label and 3072 bytes, planes one after the other."""
    folder.mkdir(parents=True)
    for seed, name in enumerate((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")):
        images, labels = images_and_labels(per_file, seed)
        (folder / f"{name}.bin").write_bytes(
            np.concatenate([labels[:, None], images.reshape(per_file, -1)], 1).tobytes()
        )
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n")


def cifar_python(folder: Path, per_file: int = 4) -> None:
    """cifar-10-batches-py, pickled as Python 2 and its NumPy did."""
    folder.mkdir(parents=True)
    for seed, name in enumerate((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")):
        images, labels = images_and_labels(per_file, seed)
        (folder / name).write_bytes(python_2_pickle(images.reshape(per_file, -1), labels.tolist()))


def python_2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """{"batch_label": str, "labels": list, "data": array, "filenames": list} by protocol 2, text as 8-bit strings."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    rows, columns = (b"J" + struct.pack("<i", n) for n in data.shape)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01" + rows + columns + b"\x86"
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", data.size) + data.tobytes() + b"tb"
    )
    names = b"](" + b"".join(text(b"picture_%d.png" % i) for i in range(len(labels))) + b"e"
    items = (
        text(b"batch_label")
        + text(b"a batch")
        + text(b"labels")
        + b"]("
        + b"".join(b"K" + bytes([n]) for n in labels)
        + b"e"
        + text(b"data")
        + array
        + text(b"filenames")
        + names
    )
    return b"\x80\x02}(" + items + b"u."


def archive(folder: Path, target: Path) -> None:
    with tarfile.open(target, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)


def folders(
    root: Path,
    *,
    train: int = 4,
    test: int = 2,
    ending: str = "JPEG",
    size: tuple[int, int] = (48, 40),
    grey: bool = False,
) -> None:
    """root/train/<class>/*.JPEG and root/val/<class>/*.JPEG, smooth pictures that differ from class to class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for i, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                coarse = rng.integers(60, 200, (4, 4, 3)) + (np.arange(3) == i) * 50
                picture = Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
                picture.convert("L" if grey else "RGB").save(root / split / name / f"{name}_{k}.{ending}")
