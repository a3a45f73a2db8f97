import copy
import pickle

import pytest
import torch

from references import relative
from regularizers.rows import Problem, flat, unit
from twofold.errors import TwofoldError
from twofold.regularizers import SAM, FriendlySAM


def gradient(problem, regularizer):
    problem.model.zero_grad()
    regularizer.backward(problem.model, problem.loss_fn, problem.batch)
    return flat(problem.model)


def batches(problem, n):
    return [
        Problem(problem.model, problem.loss_fn, (torch.randn(6, 3).double(), torch.randint(3, (6,)))) for _ in range(n)
    ]


def test_every_step_follows_the_formula_with_its_average():
    first = Problem()
    regularizer = FriendlySAM(rho=0.2, subtract=0.7, decay=0.8)
    m = None
    for problem in [first, *batches(first, 4)]:
        g = problem.gradient()
        d = g if m is None else g - 0.7 * m
        expected = problem.gradient(problem.theta + 0.2 * unit(d))
        m = g if m is None else 0.8 * m + 0.2 * g
        assert relative(gradient(problem, regularizer), expected) < 1e-12
        assert relative(torch.cat([part.reshape(-1) for part in regularizer.memory.kept]), m) < 1e-14
        assert regularizer.diagnostics["perturbation_norm"] == pytest.approx(0.2)


def test_the_first_step_is_sam_and_so_is_every_step_that_subtracts_nothing():
    first = Problem()
    regularizer = FriendlySAM(rho=0.1, subtract=0.0)
    for problem in [first, *batches(first, 2)]:
        sam = gradient(problem, SAM(rho=0.1))
        assert torch.equal(gradient(problem, FriendlySAM(rho=0.1)), sam)
        assert torch.equal(gradient(problem, regularizer), sam)


def test_the_average_moves_once_a_step_by_the_mean_of_an_accumulation():
    first = Problem()
    optimizer = torch.optim.SGD(first.model.parameters(), lr=0.0)
    regularizer = FriendlySAM(rho=0.1).attach(optimizer)
    m = None
    for weight in (0.5, 0.5, 1.0):
        optimizer.zero_grad()
        pair = batches(first, 2)
        total = 0
        for problem in pair:
            g = problem.gradient()
            d = g if m is None else g - m
            total = total + weight * problem.gradient(problem.theta + 0.1 * unit(d))
            regularizer.backward(problem.model, problem.loss_fn, problem.batch, weight=weight)
        assert relative(flat(first.model), total) < 1e-12
        optimizer.step()
        mean = (pair[0].gradient() + pair[1].gradient()) / 2
        m = mean if m is None else 0.9 * m + 0.1 * mean
        assert relative(torch.cat([part.reshape(-1) for part in regularizer.memory.kept]), m) < 1e-13
    assert regularizer.steps == 3


def test_it_resumes_in_the_middle_of_an_accumulation():
    first = Problem()
    one, two, three = batches(first, 3)
    optimizer = torch.optim.SGD(first.model.parameters(), lr=0.0)
    regularizer = FriendlySAM(rho=0.1).attach(optimizer)
    gradient(one, regularizer)
    saved = pickle.loads(pickle.dumps(regularizer.state_dict()))
    found = []
    for state in (None, saved):
        if state is not None:
            regularizer = FriendlySAM(rho=0.1).attach(optimizer)
            gradient(one, SAM())  # something stands in .grad
            regularizer.load_state_dict(state)
        regularizer.backward(two.model, two.loss_fn, two.batch)
        optimizer.step()
        found.append(gradient(three, regularizer))
        copied = copy.deepcopy(regularizer)
        assert copied.steps == 1
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"subtract": -1}, {"subtract": float("nan")}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(TwofoldError, match=next(iter(options))):
        FriendlySAM(**options)
