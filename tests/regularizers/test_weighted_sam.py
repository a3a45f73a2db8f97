import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from references import relative
from regularizers.rows import Problem, flat, sam
from twofold.errors import TwofoldError
from twofold.regularizers import SAM, WSAM, SharpnessAware


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def gradient(problem, regularizer):
    problem.model.zero_grad()
    regularizer.backward(problem.model, problem.loss_fn, problem.batch)
    return flat(problem.model)


def stepped(problem, optimizer, regularizer, batch=None):
    optimizer.zero_grad()
    regularizer.backward(problem.model, problem.loss_fn, problem.batch if batch is None else batch)
    optimizer.step()


def test_half_is_sam_and_zero_is_the_base_bit_for_bit():
    problem = Problem()
    plain = gradient(problem, SAM(rho=0.0))
    assert torch.equal(gradient(problem, WSAM(rho=0.1, gamma=0.5, decoupled=False)), gradient(problem, SAM(rho=0.1)))
    assert torch.equal(gradient(problem, WSAM(rho=0.1, gamma=0.0, decoupled=False)), plain)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    regularizer = WSAM(rho=0.1, gamma=0.0).attach(optimizer)
    assert torch.equal(gradient(problem, regularizer), plain)
    optimizer.step()
    assert relative(weights(problem.model), problem.theta - 0.1 * plain) < 1e-14


def test_the_correction_follows_the_step_with_each_groups_rate():
    problem = Problem()
    groups = [
        {"params": problem.model[0].parameters(), "lr": 0.3},
        {"params": problem.model[2].parameters(), "lr": torch.tensor(0.05, dtype=torch.float64).double()},
    ]
    optimizer = torch.optim.Adam(groups)
    plain = copy.deepcopy(problem)
    base = torch.optim.Adam(
        [{"params": plain.model[0].parameters(), "lr": 0.3}, {"params": plain.model[2].parameters(), "lr": 0.05}]
    )
    regularizer = WSAM(rho=0.1, gamma=0.8).attach(optimizer)
    rates = 0.3 * problem.mask(["0.weight", "0.bias"]) + 0.05 * problem.mask(["2.weight", "2.bias"])
    for _ in range(3):
        problem.theta = weights(problem.model)
        correction = 4 * (sam(problem, 0.1, torch.ones_like(problem.theta)) - problem.gradient())
        with torch.no_grad():
            for p, q in zip(plain.model.parameters(), problem.model.parameters(), strict=True):
                p.copy_(q)
        stepped(plain, base, SAM(rho=0.0))
        stepped(problem, optimizer, regularizer)
        assert relative(weights(problem.model), weights(plain.model) - rates * correction) < 1e-12
        assert regularizer.memory.arrived is None


def test_corrections_of_one_step_add_up_and_resume_in_the_middle():
    problem = Problem()
    x, y = problem.batch
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]

    def half(model, regularizer, i):
        regularizer.backward(model, problem.loss_fn, halves[i], weight=0.5)

    model = copy.deepcopy(problem.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = WSAM(rho=0.1).attach(optimizer)
    half(model, regularizer, 0)
    saved = pickle.loads(pickle.dumps((model.state_dict(), regularizer.state_dict())))
    gradients = [p.grad.clone() for p in model.parameters()]
    half(model, regularizer, 1)
    optimizer.step()

    resumed = copy.deepcopy(problem.model)
    resumed.load_state_dict(saved[0])
    for p, g in zip(resumed.parameters(), gradients, strict=True):
        p.grad = g
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.1)
    regularizer = WSAM(rho=0.1).attach(optimizer)
    regularizer.load_state_dict(saved[1])
    half(resumed, regularizer, 1)
    optimizer.step()
    assert torch.equal(weights(resumed), weights(model))
    split = copy.deepcopy(problem.model)
    optimizer = torch.optim.SGD(split.parameters(), lr=0.1)
    WSAM(rho=0.1, microbatches=2).attach(optimizer).backward(split, problem.loss_fn, problem.batch)
    optimizer.step()
    assert relative(weights(split), weights(model)) < 1e-14


def test_a_correction_whose_step_was_not_made_is_dropped():
    problem, other = Problem(), Problem()
    other.model.load_state_dict(problem.model.state_dict())
    for one, tries in ((problem, 2), (other, 1)):
        one.batch = problem.batch
        optimizer = torch.optim.SGD(one.model.parameters(), lr=0.1)
        regularizer = WSAM(rho=0.1).attach(optimizer)
        for _ in range(tries):
            optimizer.zero_grad(set_to_none=False)
            regularizer.backward(one.model, one.loss_fn, one.batch)
        optimizer.step()
    assert torch.equal(weights(problem.model), weights(other.model))


class Blowing(nn.Linear):
    """Has no finite gradient once its weights have moved uphill."""

    def forward(self, x):
        z = super().forward(x)
        return z if torch.equal(self.weight, self.start) else z * float("inf")


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_uphill_that_is_not_finite_skips_the_whole_step(scaled):
    model = Blowing(3, 2)
    model.start = model.weight.detach().clone()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = WSAM(rho=0.1).attach(optimizer)
    scaler = torch.amp.GradScaler(device="cpu") if scaled else None
    batch = (torch.randn(4, 3), torch.randint(2, (4,)))
    if scaler is None:
        with pytest.warns(UserWarning, match="not finite"):
            regularizer.backward(model, F.cross_entropy, batch)
        optimizer.step()
    else:
        regularizer.backward(model, F.cross_entropy, batch, scaler=scaler)
        scaler.step(optimizer)
    assert torch.equal(weights(model), before)


def test_decoupled_refuses_without_an_optimiser_and_after_copies():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    attached = WSAM().attach(optimizer)
    for regularizer in (WSAM(), copy.deepcopy(attached), pickle.loads(pickle.dumps(attached))):
        with pytest.raises(TwofoldError, match="attach"):
            regularizer.backward(problem.model, problem.loss_fn, problem.batch)
    assert all(p.grad is None for p in problem.model.parameters())


def test_a_wrapped_decoupled_step_survives_copies():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 3).double(), torch.randint(3, (6,))
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), WSAM(rho=0.1))
    for model, optimizer in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        problem = Problem(model, batch=(x, y))
        uphill, g = sam(problem, 0.1, torch.ones_like(problem.theta)), problem.gradient()
        optimizer.step(closure)
        assert relative(weights(model), problem.theta - 0.1 * g - 0.9 * (uphill - g)) < 1e-12
        assert optimizer.reg.steps == 1


@pytest.mark.parametrize("bad", [1.0, -0.1, 2, float("nan"), "0.5", True])
def test_a_gamma_that_makes_no_sense_is_refused(bad):
    with pytest.raises(TwofoldError, match=str(bad)):
        WSAM(gamma=bad)
