import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from twofold.errors import TwofoldError
from twofold.lab import data
from twofold.lab.config import DataConfig, mnist1d
from twofold.lab.data import Source, TensorPair, augment
from twofold.lab.data.dataset import prepare, redraw_labels


def images(count: int, classes: int = 4) -> TensorPair:
    """Images whose first pixel names them."""
    inputs = torch.arange(count).float()[:, None, None, None].expand(count, 1, 4, 4).clone()
    return TensorPair(inputs, torch.arange(count) % classes)


SOURCE = Source(images(100), images(40), num_classes=4)
CONFIG = DataConfig(num_train=50, num_validation=30)


def names(pair: TensorPair) -> list[int]:
    return pair.inputs[:, 0, 0, 0].int().tolist()


def test_the_split_is_disjoint_and_comes_from_the_seed():
    first, again, other = (prepare(replace(CONFIG, seed=seed), SOURCE) for seed in (0, 0, 1))
    assert names(first.train) == names(again.train)
    assert names(first.train) != names(other.train)
    assert len(set(names(first.train)) | set(names(first.validation))) == 80
    assert sorted(names(first.test)) == list(range(40))
    assert (first.num_classes, first.input_shape) == (4, (1, 4, 4))
    for pair in (first.train, first.validation, first.test):
        assert pair.targets.tolist() == [name % 4 for name in names(pair)]


def test_a_source_with_its_own_validation_keeps_its_training_examples():
    source = replace(SOURCE, validation=TensorPair(images(20).inputs + 1000, images(20).targets))
    dataset = prepare(replace(CONFIG, num_train=100, num_validation=20), source)
    assert sorted(names(dataset.train)) == list(range(100))
    assert sorted(names(dataset.validation)) == list(range(1000, 1020))


def test_label_noise_touches_the_training_labels_alone():
    clean, noisy = prepare(CONFIG, SOURCE), prepare(replace(CONFIG, label_noise=0.6), SOURCE)
    assert torch.equal(clean.train.inputs, noisy.train.inputs)
    assert not torch.equal(clean.train.targets, noisy.train.targets)
    assert torch.equal(clean.validation.targets, noisy.validation.targets)
    assert torch.equal(clean.test.targets, noisy.test.targets)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_label_noise_redraws_its_share_uniformly(share):
    count, classes = 50_000, 10
    before = torch.arange(count) % classes
    after = redraw_labels(before, share, classes, seed=0)
    expected = share * (1 - 1 / classes)
    changed = (before != after).double().mean().item()
    assert abs(changed - expected) <= 5 * (0.25 / count) ** 0.5 * (share > 0)
    drawn = torch.bincount(after[before == 3], minlength=classes).double() / (count / classes)
    assert drawn[torch.arange(classes) != 3].sub(share / classes).abs().max() <= 5 * (0.25 / (count / classes)) ** 0.5


def test_more_examples_than_there_are_are_refused():
    for field, value in (("num_train", 71), ("num_validation", 51), ("num_test", 41)):
        with pytest.raises(TwofoldError, match=r"num_.*only"):
            prepare(replace(CONFIG, **{field: value}), SOURCE)


def test_pooling_averages_squares():
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4)
    source = Source(TensorPair(pixels.expand(2, 1, 4, 4), torch.zeros(2).long()), images(1), num_classes=4)
    dataset = prepare(DataConfig(num_train=1, num_validation=1, pool=2), source)
    assert dataset.train.inputs[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    with pytest.raises(TwofoldError, match="does not divide"):
        prepare(replace(CONFIG, pool=3), SOURCE)
    with pytest.raises(TwofoldError, match="needs images"):
        data.load(DataConfig(pool=2))


def test_nothing_depends_on_or_moves_the_global_random_states():
    data.mnist1d.load_source.cache_clear()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = data.load(mnist1d().data)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    data.mnist1d.load_source.cache_clear()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    second = data.load(mnist1d().data)
    for pair, same in zip((first.train, first.validation, first.test), (second.train, second.validation, second.test)):
        assert torch.equal(pair.inputs, same.inputs)
        assert torch.equal(pair.targets, same.targets)


def test_mnist1d_is_the_published_set(tmp_path, monkeypatch):
    from mnist1d.data import get_dataset_args, make_dataset

    monkeypatch.chdir(tmp_path)
    source = data.mnist1d.load_source()
    published = make_dataset(get_dataset_args())
    np.testing.assert_allclose(source.train.inputs.numpy(), published["x"], rtol=1e-6)
    assert source.test.targets.tolist() == published["y_test"].tolist()
    dataset = data.load(mnist1d().data)
    assert [len(pair.targets) for pair in (dataset.train, dataset.validation, dataset.test)] == [4000, 500, 1000]
    everything = torch.cat([source.train.inputs, source.test.inputs, source.validation.inputs])
    assert len(everything.unique(dim=0)) == len(everything)
    assert not list(tmp_path.iterdir())


def test_flip_and_crop_move_pixels_and_nothing_else():
    torch.manual_seed(0)
    pixels = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8).expand(500, 2, 8, 8)
    moved = augment("flip_crop", pixels)
    assert moved.shape == pixels.shape
    assert torch.equal(moved[:, 0], moved[:, 1])
    shifts = set()
    for image in moved[:, 0]:
        row, column = (int(axis[0]) for axis in torch.where(image > 0))
        value = int(image[row, column]) - 1
        step = 1 if image[row, column] < image[row, min(column + 1, 7)] else -1
        top, left = value // 8 - row, (value % 8 if step == 1 else 7 - value % 8) - column
        whole = pixels[0, 0] if step == 1 else pixels[0, 0].flip(-1)
        padded = torch.nn.functional.pad(whole, (4, 4, 4, 4))
        assert torch.equal(image, padded[top + 4 : top + 12, left + 4 : left + 12])
        shifts.add((top, left, step))
    assert {shift[0] for shift in shifts} == {shift[1] for shift in shifts} == set(range(-4, 5))
    assert {shift[2] for shift in shifts} == {-1, 1}
    with pytest.raises(TwofoldError, match="needs images"):
        augment("flip_crop", torch.zeros(3, 40))


def test_unknown_data_sets_cannot_be_fetched(tmp_path):
    with pytest.raises(TwofoldError, match="mnist1d, fashion-mnist"):
        data.fetch("cifar", tmp_path)
    data.fetch("mnist1d", tmp_path)
    assert not list(tmp_path.iterdir())
