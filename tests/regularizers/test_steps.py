"""Which step it is: attached or not, with accumulation, intervals and schedules of rho."""

import copy
import pickle

import pytest
import torch
from torch import nn

from regularizers.rows import Problem, flat
from twofold.errors import TwofoldError
from twofold.regularizers import ASAM, SAM, USAM, GradientPenalty, SharpnessAware, WeightNoise


def gradient(problem, regularizer):
    problem.model.zero_grad()
    regularizer.backward(problem.model, problem.loss_fn, problem.batch)
    return flat(problem.model)


def test_alone_each_backward_counts_and_attached_each_step():
    problem = Problem()
    alone, attached = SAM(), SAM()
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.0)
    assert attached.attach(optimizer) is attached
    for _ in range(3):
        for _ in range(2):
            gradient(problem, alone)
            gradient(problem, attached)
        optimizer.step()
    assert alone.steps == 6
    assert attached.steps == 3


def test_a_step_that_a_scaler_skips_does_not_count():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    regularizer, scaler = SAM().attach(optimizer), torch.amp.GradScaler(device="cpu")
    clean = problem.batch
    for batch in (clean, (clean[0] * float("inf"), clean[1]), clean):
        optimizer.zero_grad()
        regularizer.backward(problem.model, problem.loss_fn, batch, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert regularizer.steps == 2


def test_an_optimiser_that_is_attached_later_takes_over():
    problem = Problem()
    first, second = (torch.optim.SGD(problem.model.parameters(), lr=0.0) for _ in range(2))
    regularizer = SAM().attach(first).attach(second)
    first.step()
    assert regularizer.steps == 0
    second.step()
    assert regularizer.steps == 1
    for other in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        second.step()
        assert other.steps == 1
        gradient(problem, other)
        assert other.steps == 2
        assert other.attach(first).steps == 2


def test_only_optimisers_are_attached():
    for bad in (None, nn.Linear(2, 2), 0.1):
        with pytest.raises(TwofoldError, match="attach takes"):
            SAM().attach(bad)


@pytest.mark.parametrize(
    "make", [SAM, ASAM, GradientPenalty, lambda **options: WeightNoise(sigma=0.1, **options)], ids=range(4)
)
def test_an_interval_hands_on_the_plain_gradient_between(make):
    problem = Problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0)
    regularizer, plain = make(interval=3).attach(optimizer), gradient(problem, SAM(rho=0.0))
    is_plain = []
    for _ in range(7):
        is_plain.append([torch.equal(gradient(problem, regularizer), plain) for _ in range(2)])
        optimizer.step()
    assert is_plain == [[step % 3 > 0] * 2 for step in range(7)]


def test_the_interval_goes_on_after_a_resume():
    problem = Problem()
    plain = gradient(problem, SAM(rho=0.0))
    regularizer, resumed = SAM(interval=3), SAM(interval=3)
    gradient(problem, regularizer)
    resumed.load_state_dict(pickle.loads(pickle.dumps(regularizer.state_dict())))
    assert [torch.equal(gradient(problem, resumed), plain) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None])
def test_an_interval_that_makes_no_sense_is_refused(bad):
    with pytest.raises(TwofoldError, match=f"interval.*{bad}"):
        SAM(interval=bad)


@pytest.mark.parametrize("make", [SAM, USAM, ASAM])
def test_rho_by_step(make):
    problem = Problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0)
    regularizer = make(rho=lambda step: 0.1 * step).attach(optimizer)
    for step in range(3):
        for _ in range(2):
            assert torch.equal(gradient(problem, regularizer), gradient(problem, make(rho=0.1 * step)))
        optimizer.step()
    with pytest.raises(TwofoldError, match=r"rho.*-1"):
        gradient(problem, make(rho=lambda step: -1))


@pytest.mark.parametrize("make", [SAM, USAM, ASAM])
def test_rho_by_pattern_is_that_of_the_first_match(make):
    problem = Problem()
    g = problem.gradient()
    T = problem.theta.abs() + 0.01
    T[problem.mask(["0.bias", "2.bias"]).bool()] = 1
    step = {SAM: g / g.norm(), USAM: g, ASAM: T * T * g / (T * g).norm()}[make]
    rho = 0.3 * problem.mask(["2.weight"]) + 0.1 * problem.mask(["0.weight"])
    patterns = {"*.bias": 0.0, "2.*": 0.3, "*": 0.1}
    expected = problem.gradient(problem.theta + rho * step)
    torch.testing.assert_close(gradient(problem, make(rho=patterns)), expected, rtol=1e-10, atol=1e-12)

    def step_of(named):
        model = copy.deepcopy(problem.model)
        parameters = model.named_parameters() if named else model.parameters()
        optimizer = SharpnessAware(torch.optim.SGD(parameters, lr=1.0), make(rho=patterns))

        def closure():
            optimizer.zero_grad()
            loss = problem.loss_fn(model(problem.batch[0]), problem.batch[1])
            loss.backward()
            return loss

        optimizer.step(closure)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    torch.testing.assert_close(step_of(named=True), problem.theta - expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(TwofoldError, match="named_parameters"):
        step_of(named=False)


def test_antithetic_is_a_flag():
    with pytest.raises(TwofoldError, match=r"antithetic.*2"):
        WeightNoise(sigma=0.1, antithetic=2)


def test_patterns_that_make_no_sense_are_refused():
    problem = Problem()
    with pytest.raises(TwofoldError, match=r"'\*\.bias'.*'0\.weight'"):
        gradient(problem, SAM(rho={"*.bias": 0.1}))
    with pytest.raises(TwofoldError, match=r"rho\['\*'\].*-0\.1"):
        SAM(rho={"*": -0.1})
