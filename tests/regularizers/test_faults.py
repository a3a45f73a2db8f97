"""Faults in the middle of a step: NaN in a later gradient, NaN in a second derivative, a kill between the passes."""

import multiprocessing
import os
import pickle
import signal
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from regularizers.rows import ROWS
from twofold.errors import TwofoldWarning
from twofold.regularizers import EigenSAM

every = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
several = pytest.mark.parametrize(
    ("row", "at"),
    [(row, at) for row in ROWS.values() for at in range(2, row.passes + 1)],
    ids=[f"{name} pass {at}" for name, row in ROWS.items() for at in range(2, row.passes + 1)],
)


class Passes:
    """Counts what no later pass puts back."""

    count = 0


class Net(nn.Module):
    """Calls `fault` in its n-th pass, with the pass's hidden tensor, and goes on with what it returns."""

    def __init__(self, at=0, fault=None):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.at, self.fault, self.passes = at, fault, Passes()

    def forward(self, x):
        self.passes.count += 1
        h = F.gelu(self.norm(self.inner(x)))
        if self.passes.count == self.at:
            h = self.fault(h)
        return self.outer(h)


def spoil(h):
    return h * float("nan")


def problem(at=0, fault=None):
    torch.manual_seed(0)
    return Net(at, fault).double(), (torch.randn(6, 3).double(), torch.randint(3, (6,)))


def snapshot(model):
    return [tensor.clone() for tensor in model.parameters()], [p.grad for p in model.parameters()]


def unharmed(model, before, grads):
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


def measures(row, at):
    """Whether this pass measures curvature: a vector that is not there changes a step, and does not spoil it."""
    return isinstance(row.make(0.05), EigenSAM) and at == 2


@several
def test_nan_in_a_later_gradient_is_not_handed_on(row, at):
    model, batch = problem(at, spoil)
    regularizer = row.make(0.05)
    model.inner.weight.grad = torch.ones(5, 3).double()
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as told:
        regularizer.backward(model, F.cross_entropy, batch)
    assert model.norm.num_batches_tracked == 1
    assert regularizer.skipped == (not measures(row, at))
    if regularizer.skipped:
        assert ["not finite" in str(one.message) for one in told] == [True]
        unharmed(model, *before)
        assert torch.equal(model.inner.weight.grad, torch.ones(5, 3).double())
    regularizer.backward(model, F.cross_entropy, batch)  # and it goes on
    assert all(p.grad.isfinite().all() for p in model.parameters())


@several
def test_nan_in_a_later_gradient_makes_a_scaler_skip(row, at):
    model, batch = problem(at, spoil)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    regularizer, (before, _) = row.make(0.05).attach(optimizer), snapshot(model)
    regularizer.backward(model, F.cross_entropy, batch, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    if measures(row, at):
        assert regularizer.steps == 1
        assert all(p.isfinite().all() for p in model.parameters())
    else:
        assert regularizer.steps == 0
        assert scaler.get_scale() == 4
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@every
def test_nan_in_a_second_derivative_is_not_handed_on(row):
    model, batch = problem()
    before = snapshot(model)
    regularizer = row.make(0.05)
    with warnings.catch_warnings(), twofold.second_derivative(lambda x: x * float("nan"), of="gelu"):
        warnings.simplefilter("ignore", TwofoldWarning)
        regularizer.backward(model, F.cross_entropy, batch)
    if regularizer.skipped:
        unharmed(model, *before)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert regularizer.skipped or all(p.grad is not None for p in model.parameters())


def train(row, path, steps, at=0):
    """Some steps from what `path` holds on; each is kept there. In pass `at`, counted over all, the process dies."""
    model, batch = problem(at, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    regularizer = row.make(0.05).attach(optimizer)
    torch.manual_seed(7)
    done = 0
    if path.exists():
        done, weights, base, own, random = pickle.loads(path.read_bytes())
        model.load_state_dict(weights)
        optimizer.load_state_dict(base)
        regularizer.load_state_dict(own)
        torch.set_rng_state(random)
    for step in range(done, steps):
        optimizer.zero_grad()
        regularizer.backward(model, F.cross_entropy, batch)
        optimizer.step()
        state = (step + 1, model.state_dict(), optimizer.state_dict(), regularizer.state_dict(), torch.get_rng_state())
        path.with_suffix(".new").write_bytes(pickle.dumps(state))
        path.with_suffix(".new").rename(path)
    return model


@every
def test_killed_between_the_passes_a_run_resumes_bit_for_bit(row, tmp_path):
    whole = train(row, tmp_path / "whole", 4)
    passes = whole.passes.count
    process = multiprocessing.get_context("fork").Process(target=train, args=(row, tmp_path / "killed", 4, passes - 1))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = train(row, tmp_path / "killed", 4)
    assert 0 < resumed.passes.count < passes
    assert all(
        torch.equal(a, b) for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    )
