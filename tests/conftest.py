"""One torch thread for each worker: results do not depend on how many cores a machine has."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def float64():
    """Run a test in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def seeded():
    """Start each test from the same random state."""
    torch.manual_seed(0)
