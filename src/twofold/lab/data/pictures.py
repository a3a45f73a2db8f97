"""Data sets of picture files: folders as torchvision's ImageFolder reads them, and copies of Hugging Face data sets.

NAME/train/<class>/*.png and NAME/val/<class>/*.png           any format that Pillow reads; also validation or test
NAME/dataset_dict.json                                        what `datasets.DatasetDict.save_to_disk` wrote
NAME/**/train-*.parquet and NAME/**/validation-*.parquet      a data set's repository on the Hugging Face Hub
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from twofold.errors import TwofoldError
from twofold.lab.data.files import places
from twofold.lab.data.stored import Pictures

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".jpeg", ".jpg", ".png", ".ppm", ".bmp", ".webp")
TEST_SPLITS = ("val", "validation", "test")
"""What the split that is tested on may be called; the first that is there is taken."""

_SAVED, _PARQUET = "dataset_dict.json", "**/*.parquet"


@dataclass(frozen=True)
class PictureSet:
    """A data set of picture files.

    Attributes:
        place: its directory.
        splits: "train" and "test" -> pictures and their labels [N].
        classes: their names.
    """

    place: Path
    splits: Mapping[str, tuple[Pictures, Tensor]]
    classes: tuple[str, ...]

    def in_memory(self, split: str, mode: str, side: int, num_classes: int) -> tuple[Tensor, Tensor]:
        """All pictures of a split as bytes [N, channels, side, side], and the labels.

        Args:
            split: "train" or "test".
            mode: of Pillow: "RGB", or "L" for grey.
            side: the size that every picture must have.
            num_classes: how many classes there may be.

        Raises:
            TwofoldError: there are more classes; a picture has another size or cannot be decoded.
        """
        if len(self.classes) > num_classes:
            raise TwofoldError(f"{self.place} has {len(self.classes)} classes; expected {num_classes}.")
        stored, targets = self.splits[split]
        images = torch.empty(len(targets), len(mode), side, side, dtype=torch.uint8)
        for i in range(len(targets)):
            picture = stored[i]
            if picture.size != (side, side):
                raise TwofoldError(
                    f"Picture {i} of {split} in {self.place} is {picture.size[0]}x{picture.size[1]}; "
                    f"expected {side}x{side}."
                )
            pixels = torch.from_numpy(np.array(picture.convert(mode)))
            images[i] = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return images, targets


def find(name: str, data_dir: Path | None) -> PictureSet | None:
    """The pictures in the folder NAME of `data_dir` or $TWOFOLD_DATA, or in one itself that is called so; else None.

    Raises:
        TwofoldError: a split is missing or empty, or a package is needed that is not installed.
    """
    for place in places(data_dir, name):
        if place.name != name:
            continue
        if (place / _SAVED).is_file():  # first, since what was saved has a folder "train" too
            return _from_hugging_face(place)
        if (place / "train").is_dir():
            return _from_folders(place)
        if next(place.glob(_PARQUET), None) is not None:
            return _from_hugging_face(place)
    return None


@dataclass(frozen=True)
class _Files:
    """Pictures in files of their own."""

    paths: tuple[str, ...]

    def __getitem__(self, i: int) -> "Image":
        import PIL.Image

        try:
            with PIL.Image.open(self.paths[i]) as picture:
                picture.load()
                return picture
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise TwofoldError(f"{self.paths[i]} cannot be decoded: {error}.") from error


@lru_cache(maxsize=1)
def _from_folders(place: Path) -> PictureSet:
    tested = next((name for name in TEST_SPLITS if (place / name).is_dir()), None)
    if tested is None:
        raise TwofoldError(f"{place} has a folder train, but none of {', '.join(TEST_SPLITS)} beside it.")
    found = {split: _folder(place / name) for split, name in (("train", "train"), ("test", tested))}
    classes = tuple(sorted(found["train"]))
    if extra := set(found["test"]) ^ set(classes):
        raise TwofoldError(
            f"The classes of {place / 'train'} and {tested} differ: only one has {', '.join(sorted(extra)[:6])}."
        )
    splits = {}
    for split, by_class in found.items():
        paths = tuple(path for name in classes for path in by_class[name])
        labels = torch.tensor([i for i, name in enumerate(classes) for _ in by_class[name]])
        splits[split] = (_Files(paths), labels)
    return PictureSet(place, splits, classes)


def _folder(split: Path) -> dict[str, list[str]]:
    """Class -> its files, sorted by name."""
    classes = sorted(path for path in split.iterdir() if path.is_dir())
    found = {
        path.name: sorted(str(file) for file in path.iterdir() if file.suffix.lower() in ENDINGS) for path in classes
    }
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        what = f"no picture of {', '.join(empty[:6])}" if empty else "no folder of a class"
        raise TwofoldError(f"{split} holds {what}; expected {split}/<class>/*{'|'.join(ENDINGS)}.")
    return found


@dataclass(frozen=True)
class _Column:
    """Pictures in a column of a Hugging Face data set."""

    rows: Any
    name: str
    place: Path

    def __getitem__(self, i: int) -> "Image":
        try:
            return self.rows[i][self.name]
        except (OSError, SyntaxError, ValueError) as error:
            raise TwofoldError(f"Row {i} in {self.place} cannot be decoded: {error}.") from error


@lru_cache(maxsize=1)
def _from_hugging_face(place: Path) -> PictureSet:
    try:
        import datasets
    except ImportError as error:
        raise TwofoldError(
            f"{place} is a Hugging Face data set: pip install 'twofold[datasets]' to read it."
        ) from error
    files = {split: sorted(map(str, place.glob(f"**/{split}-*.parquet"))) for split in ("train", *TEST_SPLITS)}
    files = {split: paths for split, paths in files.items() if paths}
    try:
        if (place / _SAVED).is_file():
            found = datasets.load_from_disk(str(place))
        else:
            found = datasets.load_dataset("parquet", data_files=files)
        tested = next(name for name in TEST_SPLITS if name in found)
        chosen = {"train": found["train"], "test": found[tested]}
    except (KeyError, StopIteration, OSError, ValueError) as error:
        raise TwofoldError(
            f"{place} does not hold the splits train and one of {', '.join(TEST_SPLITS)} as `datasets` reads them: "
            f"{error!r}."
        ) from error
    splits, classes = {}, {}
    for split, rows in chosen.items():
        image = next((n for n, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
        label = next((n for n, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
        if image is None or label is None:
            raise TwofoldError(f"{place} has columns {rows.features}; expected one of images and one of class labels.")
        splits[split] = (_Column(rows.select_columns([image]), image, place), torch.tensor(rows[label][:]))
        classes[split] = tuple(rows.features[label].names)
    if classes["train"] != classes["test"]:
        raise TwofoldError(f"The names of the classes of {place} are others, or in another order, in {tested}.")
    for split, (_, labels) in splits.items():
        if len(labels) and int(labels.min()) < 0:
            raise TwofoldError(f"{place} has no labels for some pictures of {split}; take a split that has them all.")
    return PictureSet(place, splits, classes["train"])
