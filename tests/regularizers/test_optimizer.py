import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regularizers.rows import Problem, flat
from twofold.errors import TwofoldError
from twofold.regularizers import SAM, GradientPenalty, SharpnessAware, WeightNoise


@pytest.fixture
def training():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    x, y = torch.randn(6, 3), torch.randint(3, (6,))

    def make(reg, named=False, base=torch.optim.AdamW, model=model, **options):
        parameters = model.named_parameters() if named else model.parameters()
        optimizer = SharpnessAware(base(parameters, lr=0.01, **options), reg)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return optimizer, closure

    return model, make


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def noisy(seed=0):
    return WeightNoise(sigma=0.1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "reg",
    [SAM(rho=0), WeightNoise(sigma=0), GradientPenalty(rho=0), GradientPenalty(rho=0, method="finite_difference")],
)
def test_strength_zero_is_the_base_step_bit_for_bit(training, reg):
    model, make = training
    before = copy.deepcopy(model.state_dict())
    optimizer, closure = make(reg)
    losses = [optimizer.step(closure) for _ in range(3)]
    found = weights(model)
    model.load_state_dict(before)
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    assert [plain.step(closure).detach() for _ in range(3)] == losses
    assert torch.equal(weights(model), found)


def test_a_saved_state_goes_on_bit_for_bit(training):
    model, make = training
    optimizer, closure = make(noisy())
    optimizer.step(closure)
    state, before = pickle.loads(pickle.dumps(optimizer.state_dict())), copy.deepcopy(model.state_dict())
    assert state["twofold"]["skipped"] == 0
    optimizer.step(closure)
    expected = weights(model)
    model.load_state_dict(before)
    resumed, closure = make(noisy(seed=9))
    resumed.load_state_dict(state)
    resumed.step(closure)
    assert torch.equal(weights(model), expected)


def test_a_plain_optimisers_state_loads(training):
    model, make = training
    plain = torch.optim.AdamW(model.parameters(), lr=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    plain.step()
    optimizer, closure = make(SAM())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert len(optimizer.state) == 4
    optimizer.step(closure)


def test_copies_and_pickles(training):
    _, make = training
    optimizer, closure = make(SAM(rho=0.2))
    optimizer.step(closure)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.reg.rho == 0.2
        assert other.param_groups is other.base.param_groups
        assert len(other.state) == 4
        other.zero_grad()
        with pytest.raises(TwofoldError, match="closure"):
            other.step()


def test_what_a_training_loop_asks_of_an_optimiser(training):
    model, make = training
    optimizer, closure = make(SAM(), base=torch.optim.SGD, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    optimizer.step(closure)
    schedule.step()
    extra = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.3})
    assert len(optimizer.base.param_groups) == 2
    optimizer.step(closure)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "SAM(rho=0.05)" in repr(optimizer)


def test_names_choose_what_is_perturbed(training):
    _, make = training
    optimizer, closure = make(SAM(rho=0.1, params="*.weight"), named=True)
    optimizer.step(closure)
    for reg, named, text in (
        (SAM(params="*.weight"), False, "named_parameters"),
        (SAM(params="nothing"), True, "nothing"),
    ):
        optimizer, closure = make(reg, named=named)
        with pytest.raises(TwofoldError, match=text):
            optimizer.step(closure)


def test_a_gradient_that_is_not_finite_skips_the_step(training):
    model, make = training
    optimizer, _ = make(SAM())
    before = weights(model)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.full((2, 3), float("inf"))), torch.zeros(2).long())
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step(closure)
    assert torch.equal(weights(model), before)
    assert optimizer.reg.skipped == 1
    assert len(optimizer.state) == 0


def test_a_closure_under_a_scaler_is_refused(training):
    _, make = training
    optimizer, closure = make(SAM())
    scaler = torch.amp.GradScaler(device="cpu")
    scaler.scale(closure())
    with pytest.raises(TwofoldError, match="GradScaler"):
        scaler.step(optimizer, closure)
    optimizer.step(closure)


def test_closures_that_do_not_do_their_part_are_told(training):
    model, make = training
    optimizer, closure = make(SAM())
    for bad, text in (
        (None, "needs a closure"),
        (lambda: (closure(), None)[1], "returned None"),
        (lambda: torch.zeros(()), "left no gradient"),
    ):
        before = weights(model)
        with pytest.raises(TwofoldError, match=text):
            optimizer.step(bad)
        assert torch.equal(weights(model), before)
    assert optimizer.step(lambda: closure().item()) > 0


def test_what_cannot_be_wrapped_is_refused(training):
    model, _ = training
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, text in (((model, SAM()), "Optimizer"), ((base, 0.05), "regularizer"), ((base, SAM), "regularizer")):
        with pytest.raises(TwofoldError, match=text):
            SharpnessAware(*arguments)
    with pytest.raises(TwofoldError, match="microbatches"):
        SharpnessAware(base, SAM(microbatches=2))
    SharpnessAware(base, GradientPenalty(method="finite_difference"))


ZEROED = {
    "optimizer.zero_grad": lambda optimizer, model: optimizer.zero_grad(),
    "optimizer.zero_grad in place": lambda optimizer, model: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad": lambda optimizer, model: model.zero_grad(),
}


@pytest.mark.parametrize("zero", ZEROED.values(), ids=ZEROED.keys())
def test_a_closure_may_zero_gradients_in_any_way_or_find_none(zero):
    problem = Problem()
    optimizer = SharpnessAware(torch.optim.SGD(problem.model.parameters(), lr=0.1), SAM(rho=0.05))

    def closure(zeroing=True):
        if zeroing:
            zero(optimizer, problem.model)
        loss = problem.loss_fn(problem.model(problem.batch[0]), problem.batch[1])
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    optimizer.zero_grad()
    optimizer.step(lambda: closure(zeroing=False))


def test_a_closure_that_accumulates_is_refused_and_nothing_is_lost():
    problem = Problem()
    optimizer = SharpnessAware(torch.optim.SGD(problem.model.parameters(), lr=0.1), SAM(rho=0.05))

    def closure():
        loss = problem.loss_fn(problem.model(problem.batch[0]), problem.batch[1]) / 2
        loss.backward()
        return loss

    closure()
    found, weights = flat(problem.model), [p.clone() for p in problem.model.parameters()]
    with pytest.raises(TwofoldError, match=r"weight=1/k"):
        optimizer.step(closure)
    assert torch.equal(flat(problem.model), found)
    assert all(torch.equal(a, b) for a, b in zip(problem.model.parameters(), weights, strict=True))
