"""Copies of Hugging Face data sets in the place of published files."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lab.picture_files import images_and_labels
from twofold.errors import TwofoldError
from twofold.lab import recipes
from twofold.lab.config import DataConfig
from twofold.lab.data import first_batch, load
from twofold.lab.data.stored import StoredImages
from twofold.lab.training import train


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.delenv("TWOFOLD_DATA", raising=False)
    datasets.disable_progress_bars()


def copy_of(columns: tuple[str, str], counts: dict[str, int], classes: int = 3) -> datasets.DatasetDict:
    """Random pictures of 32x32, with the columns that a data set on the Hub has."""
    image, label = columns
    features = datasets.Features(
        {image: datasets.Image(), label: datasets.ClassLabel(names=[f"class {i}" for i in range(classes)])}
    )
    splits = {}
    for seed, (split, count) in enumerate(counts.items()):
        pixels, labels = images_and_labels(count, seed, classes)
        pictures = [Image.fromarray(picture.transpose(1, 2, 0)) for picture in pixels]
        splits[split] = datasets.Dataset.from_dict({image: pictures, label: labels.tolist()}, features=features)
    return datasets.DatasetDict(splits)


def save(copy: datasets.DatasetDict, place, form: str) -> None:
    if form == "save_to_disk":
        copy.save_to_disk(str(place))
        return
    (place / "data").mkdir(parents=True)
    for split, rows in copy.items():
        rows.to_parquet(place / "data" / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("form", ["save_to_disk", "parquet"])
def test_cifar10(tmp_path, form):
    save(copy_of(("img", "label"), {"train": 12, "test": 6}, classes=10), tmp_path / "cifar10", form)
    data = load(DataConfig("cifar10", num_train=9, num_validation=3), tmp_path)
    assert (data.input_shape, data.num_classes, len(data.test.targets)) == ((3, 32, 32), 10, 6)
    pixels, _ = images_and_labels(6, 1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    found = (data.test.inputs * std + mean).mul(255).round().to(torch.uint8).numpy()
    assert sorted(picture.tobytes() for picture in found) == sorted(picture.tobytes() for picture in pixels)


@pytest.mark.parametrize("form", ["save_to_disk", "parquet"])
def test_imagenet_is_tested_on_its_validation_set_and_trains(tmp_path, form):
    counts = {"train": 12, "validation": 6, "test": 4}
    save(copy_of(("image", "label"), counts), tmp_path / "imagenet", form)
    recipe = recipes.imagenet()
    config = replace(
        recipe,
        data=replace(recipe.data, num_train=8, num_validation=2, image_size=32),
        model=replace(recipe.model, width=2),
        epochs=1,
        warmup_epochs=0,
        batch_size=4,
        device="cpu",
        compile=False,
    )
    data = load(config.data, tmp_path)
    assert isinstance(data.train, StoredImages)
    assert (data.num_classes, len(data.test.targets)) == (3, 6)
    _, labels = images_and_labels(6, 1, 3)
    assert sorted(data.test.targets.tolist()) == sorted(labels.tolist())
    assert first_batch(data.test, 6)[0].shape == (6, 3, 32, 32)
    assert np.isfinite(train(config, data_dir=tmp_path)["train/loss"]).all()


def test_a_copy_that_lacks_a_split_or_a_column_is_told(tmp_path):
    save(copy_of(("image", "label"), {"train": 4}), tmp_path / "one" / "imagenet", "parquet")
    with pytest.raises(TwofoldError, match="train and one of val, validation, test"):
        load(recipes.imagenet().data, tmp_path / "one")
    copy = copy_of(("image", "label"), {"train": 4, "test": 4}).remove_columns("label")
    save(copy, tmp_path / "two" / "imagenet", "save_to_disk")
    with pytest.raises(TwofoldError, match="class labels"):
        load(recipes.imagenet().data, tmp_path / "two")


def test_a_test_split_with_other_classes_or_without_labels_is_told(tmp_path):
    copy = copy_of(("image", "label"), {"train": 4, "test": 4})
    turned = copy["test"].features.copy()
    turned["label"] = datasets.ClassLabel(names=["class 2", "class 1", "class 0"])
    rows = copy["test"].to_dict()
    for name, test, said in (
        ("turned", datasets.Dataset.from_dict(rows, features=turned), "another order, in test"),
        (
            "hidden",
            datasets.Dataset.from_dict({**rows, "label": [-1] * 4}, features=copy["test"].features),
            "no labels",
        ),
    ):
        save(datasets.DatasetDict(train=copy["train"], test=test), tmp_path / name / "imagenet", "save_to_disk")
        with pytest.raises(TwofoldError, match=said):
            load(recipes.imagenet().data, tmp_path / name)
