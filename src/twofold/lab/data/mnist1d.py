"""MNIST-1D (Greydanus & Kobak 2024, arXiv 2011.14439): ten classes of signals of 40 points, generated here.

Training and test are the published 4000 and 1000 examples (its generator, seed 42). All 4000 may be trained on, so
validation comes from a second draw of the same generator with another seed.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twofold.errors import TwofoldError
from twofold.lab.data.dataset import Source, TensorPair

_PUBLISHED_SEED = 42
_VALIDATION_SEED = 43
_NUM_VALIDATION = 1000


@lru_cache(maxsize=1)
def load_source(data_dir: Path | None = None) -> Source:
    """Generate MNIST-1D; needs no files and no network, and leaves every random state as it was."""
    published = _generate(5000, _PUBLISHED_SEED)
    train = _pair(published["x"], published["y"])
    test = _pair(published["x_test"], published["y_test"])
    extra = _generate(_NUM_VALIDATION, _VALIDATION_SEED)
    validation = _pair(np.concatenate([extra["x"], extra["x_test"]]), np.concatenate([extra["y"], extra["y_test"]]))
    return Source(train, test, num_classes=10, validation=validation)


def _generate(num_samples: int, seed: int) -> dict[str, Any]:
    try:
        from mnist1d.data import ObjectView, get_dataset_args, make_dataset
    except ImportError as error:
        raise TwofoldError(f"MNIST-1D needs the lab extra ({error}): pip install 'twofold[lab]'.") from error
    arguments = ObjectView({**vars(get_dataset_args()), "num_samples": num_samples, "seed": seed})
    with _global_random_states_restored():  # the package seeds and draws from the global ones
        return make_dataset(arguments)


@contextmanager
def _global_random_states_restored() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _pair(inputs: np.ndarray, targets: np.ndarray) -> TensorPair:
    return TensorPair(torch.from_numpy(inputs).float(), torch.from_numpy(targets).long())
