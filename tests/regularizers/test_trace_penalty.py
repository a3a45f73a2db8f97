import copy
import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad
from torch.utils.checkpoint import checkpoint

from models import CASES
from references import dense, relative
from regularizers.rows import Problem, flat
from twofold.curvature.differentiable import buffers_replaced, module_state_kept
from twofold.curvature.jet_rules import NotCarriedError
from twofold.curvature.operators import Hessian
from twofold.curvature.probes import signs
from twofold.errors import TwofoldError
from twofold.regularizers import GaussNewtonTrace, HessianTrace, matched_sigma
from twofold.regularizers.passes import ModelPasses

pytestmark = pytest.mark.filterwarnings("ignore::twofold.errors.TwofoldWarning")


class Unknown(nn.Module):
    """torch.cumprod, which jets do not know, after batch norm."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).sigmoid().cumprod(1))


class CheckpointedActivation(Unknown):
    def forward(self, x):
        return self.b(checkpoint(torch.tanh, self.norm(self.a(x)), use_reentrant=False))


UNKNOWN_LOSSES = {"Huber", "custom loss"}


def run(case, regularizer):
    case.model.zero_grad()
    with module_state_kept(case.model):
        buffers_replaced(case.model)
        regularizer.backward(case.model, case.loss_fn, case.batches[0], forward=case.forward)
    return flat(case.model), regularizer.diagnostics.get("trace")


def move(model, vector, factor):
    parts = vector.split([p.numel() for p in model.parameters()])
    with torch.no_grad():
        for p, part in zip(model.parameters(), parts, strict=True):
            p.add_(part.view(p.shape), alpha=factor)


def slope_of_hessian_product(case, v):
    """grad(v'Hv) = d/de H(theta + e v) v, by differences of exact products, extrapolated."""
    state = copy.deepcopy(case.model.state_dict())

    def product(h):
        move(case.model, v, h)
        result = Hessian(case.model, case.loss_fn, case.batches[0], forward=case.forward) @ v
        case.model.load_state_dict(state)
        return result

    def slope(h):
        return (product(h) - product(-h)) / (2 * h)

    return (4 * slope(1e-4) - slope(2e-4)) / 3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CASES)
def test_the_hessian_trace_has_the_right_third_derivative_on_every_model(name):
    case = CASES[name]()
    generator = torch.Generator().manual_seed(3)
    drawn = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    v = torch.cat([signs(p.numel(), drawn).double() for p in case.model.parameters()])
    g, _ = run(case, HessianTrace(strength=0.0))
    found, trace = run(case, HessianTrace(strength=1.0, generator=generator.manual_seed(3)))
    assert relative(found - g, slope_of_hessian_product(case, v)) < 1e-9
    H = dense(case.model, case.loss_fn, case.batches[:1], forward=case.forward).hessian
    assert trace == pytest.approx((v @ H @ v).item(), rel=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CASES)
def test_jets_and_a_threefold_reverse_pass_agree(name):
    by_jets, by_reverse = (
        HessianTrace(strength=1.0, num_probes=2, generator=torch.Generator().manual_seed(2)) for _ in range(2)
    )
    case = CASES[name]()
    with mock.patch.object(ModelPasses, "_jets_pass", side_effect=NotCarriedError("everything")) as refused:
        expected, trace = run(case, by_reverse)
    found, value = run(case, by_jets)
    assert refused.call_count == 1
    assert relative(found, expected) < 1e-12
    assert value == pytest.approx(trace, rel=1e-9)


@pytest.mark.parametrize("model", [Unknown, CheckpointedActivation], ids=["unknown", "checkpoint"])
def test_what_jets_do_not_know_is_differentiated_three_times_and_moves_statistics_once(model):
    """The pass that is given up leaves nothing: one step moves batch norm as plain training does."""
    torch.manual_seed(1)
    penalised, x, y = model(), torch.randn(6, 3), torch.randint(3, (6,))
    plain = copy.deepcopy(penalised)
    torch.manual_seed(2)
    F.cross_entropy(plain(x), y).backward()
    torch.manual_seed(2)
    HessianTrace(strength=0.0).backward(copy.deepcopy(penalised), F.cross_entropy, (x, y))
    torch.manual_seed(2)
    HessianTrace(strength=1e-30).backward(penalised, F.cross_entropy, (x, y))
    for one, other in zip(penalised.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(penalised.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", ["mlp", "conv BatchNorm train", "LayerNorm and attention", "MSE", "forward="])
def test_the_second_difference_is_near_the_exact_one(case):
    case = CASES[case]()
    g, _ = run(case, HessianTrace(strength=0.0))
    exact, near = (
        run(case, HessianTrace(strength=1.0, method=method, generator=torch.Generator().manual_seed(2)))
        for method in ("exact", "difference")
    )
    assert relative(near[0] - g, exact[0] - g) < 1e-4
    assert near[1] == pytest.approx(exact[1], rel=1e-4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "estimator"),
    [(name, "hutchinson") for name in CASES] + [(name, "labels") for name in CASES if name not in UNKNOWN_LOSSES],
)
def test_the_full_gauss_newton_trace_descends_its_own_value_on_every_model(name, estimator):
    case = CASES[name]()
    state = copy.deepcopy(case.model.state_dict())

    def at(h):
        case.model.load_state_dict(state)
        move(case.model, u, h)
        regularizer = GaussNewtonTrace(
            strength=1.0, through="full", estimator=estimator, generator=torch.Generator().manual_seed(3)
        )
        return run(case, regularizer)

    u = torch.randn(sum(p.numel() for p in case.model.parameters()))
    g, _ = run(case, GaussNewtonTrace(strength=0.0))
    found, _ = at(0.0)

    def slope(h):
        return (at(h)[1] - at(-h)[1]) / (2 * h)

    assert (found - g) @ u == pytest.approx((4 * slope(1e-4) - slope(2e-4)) / 3, rel=1e-6, abs=1e-8)
    if estimator == "hutchinson":
        drawn = torch.Generator().manual_seed(3)
        drawn.manual_seed(int(torch.randint(2**62, (), generator=drawn)))
        v = torch.cat([signs(p.numel(), drawn).double() for p in case.model.parameters()])
        case.model.load_state_dict(state)
        GN = dense(case.model, case.loss_fn, case.batches[:1], forward=case.forward).gauss_newton
        assert at(0.0)[1] == pytest.approx((v @ GN @ v).item(), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_over_all_labels_is_the_trace_and_its_gradient(weighted):
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double() if weighted else None)
    problem = Problem(loss_fn=loss_fn)
    x = torch.randn(3, 3).double()
    problem.batch = (x, torch.tensor([0, -100, 1]) if weighted else torch.tensor([0, 2, 1]))
    p = problem.outputs(problem.theta).softmax(1)
    mean_trace, mean_change, g = 0.0, 0.0, problem.gradient()
    for labels in itertools.product(range(3), repeat=3):
        chance = torch.stack([row[label] for row, label in zip(p, labels, strict=True)]).prod()
        regularizer = GaussNewtonTrace(strength=1.0)
        problem.model.zero_grad()
        with mock.patch("torch.multinomial", lambda *_, labels=labels, **__: torch.tensor(labels).view(-1, 1)):
            regularizer.backward(problem.model, loss_fn, problem.batch)
        mean_trace += chance * regularizer.diagnostics["trace"]
        mean_change = mean_change + chance * (flat(problem.model) - g)
    assert mean_trace == pytest.approx(problem.gauss_newton(problem.theta).trace().item(), rel=1e-9)
    z = problem.outputs(problem.theta)
    assert relative(mean_change, grad(lambda t: problem.gauss_newton(t, z).trace())(problem.theta)) < 1e-9


def test_the_mean_over_gaussian_draws_is_the_trace_and_its_full_gradient():
    """The estimate is a quadratic form in the draws xi, so its mean is the sum over unit vectors in their place."""
    problem = Problem()
    trace, change, g = 0.0, 0.0, problem.gradient()
    for unit in torch.eye(18).double():
        regularizer = GaussNewtonTrace(strength=1.0, through="full")
        problem.model.zero_grad()
        with mock.patch("torch.randn", lambda shape, unit=unit, **_: unit.view(shape)):
            regularizer.backward(problem.model, F.cross_entropy, problem.batch)
        trace += regularizer.diagnostics["trace"]
        change = change + flat(problem.model) - g
    assert trace == pytest.approx(problem.gauss_newton(problem.theta).trace().item(), rel=1e-9)
    assert relative(change, grad(lambda t: problem.gauss_newton(t).trace())(problem.theta)) < 1e-9


def test_unknown_losses_are_pointed_to_hutchinson():
    problem = Problem(loss_fn=lambda z, y: z.square().mean())
    with pytest.raises(TwofoldError, match="hutchinson"):
        GaussNewtonTrace(strength=1.0).backward(problem.model, problem.loss_fn, problem.batch)
    GaussNewtonTrace(strength=1.0, estimator="hutchinson").backward(problem.model, problem.loss_fn, problem.batch)


class CheckpointedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(checkpoint(self.norm, self.a(x), use_reentrant=False)))


class RawNorm(nn.Linear):
    def forward(self, x):
        return torch.native_layer_norm(super().forward(x), (3,), None, None, 1e-5)[0]


@pytest.mark.parametrize("model", [CheckpointedNorm(), RawNorm(3, 3)])
def test_a_norm_whose_third_derivative_would_be_wrong_is_refused(model):
    batch = (torch.randn(6, 3), torch.randint(3, (6,)))
    with pytest.raises(TwofoldError, match=r"checkpoint|LayerNorm"):
        HessianTrace(strength=1.0).backward(model, F.cross_entropy, batch)
    HessianTrace(strength=1.0, method="difference").backward(model, F.cross_entropy, batch)


def test_matched_noise_has_half_its_square_as_strength():
    assert matched_sigma(0.02) == pytest.approx(0.2)
    with pytest.raises(TwofoldError, match=r"-1\.0"):
        matched_sigma(-1.0)
