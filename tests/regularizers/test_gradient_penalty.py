import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import CASES
from references import dense, relative
from regularizers.rows import Problem, flat, unit
from twofold.errors import TwofoldError, TwofoldWarning
from twofold.regularizers import SAM, GaussNewtonTrace, GradientPenalty, HessianTrace

pytestmark = pytest.mark.filterwarnings("ignore::twofold.errors.TwofoldWarning")


def direction(model, loss_fn, batch, regularizer, **options):
    model.zero_grad()
    regularizer.backward(model, loss_fn, batch, **options)
    return flat(model)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_dense_curvature_on_every_model(case):
    case = case()
    batch = case.batches[0]
    matrices = dense(case.model, case.loss_fn, [batch], forward=case.forward)
    g = direction(case.model, case.loss_fn, batch, SAM(rho=0.0), forward=case.forward)
    for name in ("hessian", "gauss_newton", "nme"):
        penalty = GradientPenalty(rho=0.1, curvature=name)
        found = direction(case.model, case.loss_fn, batch, penalty, forward=case.forward)
        expected = 0.1 * getattr(matrices, name) @ unit(g)
        assert relative(found, g + expected) < 1e-9
        assert penalty.diagnostics["gradient_norm"] == pytest.approx(g.norm().item())
        assert penalty.diagnostics["penalty"] == pytest.approx(0.1 * g.norm().item())


@pytest.mark.parametrize("p", [1, 2])
def test_is_the_gradient_of_the_penalised_loss(p):
    problem = Problem()
    model, parameters = problem.model, list(problem.model.parameters())
    loss = F.cross_entropy(model(problem.batch[0]), problem.batch[1])
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    size = torch.cat([s.reshape(-1) for s in slopes]).norm()
    expected = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss + 0.2 * size**p, parameters)])
    found = direction(model, F.cross_entropy, problem.batch, GradientPenalty(rho=0.2, p=p))
    assert relative(found, expected) < 1e-9


def one_hidden_layer(activation):
    """The model, and what a phi'' adds to its Hessian: sum over units u of dL/da_u phi''(h_u) grad h_u grad h_u'."""
    model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 3)).double()
    problem = Problem(model)
    x, y = problem.batch

    def added(second_derivative):
        h = model[0](x)
        a = model[1](h).detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model[2](a), y), a)
        units = torch.zeros(len(x), 4, len(problem.theta)).double()
        for u in range(4):
            units[:, u, u * 3 : u * 3 + 3], units[:, u, 12 + u] = x, 1.0
        return torch.einsum("nu,nup,nuq->pq", slope * second_derivative(h.detach()), units, units)

    return problem, added


def gelu_second(x):
    return torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5 * (2 - x * x)


def test_second_derivative_zero_takes_the_activations_part_out():
    problem, added = one_hidden_layer(nn.GELU())
    g = problem.gradient()
    with twofold.second_derivative(0, of="gelu"):
        found = direction(problem.model, F.cross_entropy, problem.batch, GradientPenalty(rho=0.1))
    assert relative(found - g, 0.1 * (problem.matrix("hessian") - added(gelu_second)) @ unit(g)) < 1e-9


def test_a_synthetic_second_derivative_comes_in():
    problem, added = one_hidden_layer(nn.ReLU())
    g, beta = problem.gradient(), 2.0

    def bump(x):
        return beta / (2 * torch.pi) ** 0.5 * torch.exp(-(beta**2) * x * x / 2)

    with twofold.second_derivative(twofold.gaussian(beta=beta), of="relu"):
        found = direction(problem.model, F.cross_entropy, problem.batch, GradientPenalty(rho=0.1))
    assert added(bump).norm() > 0
    assert relative(found - g, 0.1 * (problem.matrix("hessian") + added(bump)) @ unit(g)) < 1e-9


def test_the_trace_of_the_hessian_sees_the_other_second_derivative():
    problem, added = one_hidden_layer(nn.GELU())
    drawn = torch.Generator().manual_seed(3)
    v = problem.signs(drawn.manual_seed(int(torch.randint(2**62, (), generator=drawn))))
    penalty = HessianTrace(strength=0.1, generator=torch.Generator().manual_seed(3))
    with twofold.second_derivative(0, of="gelu"):
        direction(problem.model, F.cross_entropy, problem.batch, penalty)
    H = problem.matrix("hessian") - added(gelu_second)
    assert penalty.diagnostics["trace"] == pytest.approx((v @ H @ v).item(), rel=1e-9)


RELU = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
BATCH = (torch.randn(6, 3), torch.randint(3, (6,)))


@pytest.mark.parametrize("regularizer", [GradientPenalty(), GradientPenalty(curvature="nme"), HessianTrace(strength=1)])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.ReLU6(), nn.PReLU(), nn.Hardtanh()])
def test_warns_once_where_the_penalty_is_blind(regularizer, activation):
    regularizer = type(regularizer)(**{"strength": 1.0} if isinstance(regularizer, HessianTrace) else {})
    model = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 3))
    with pytest.warns(TwofoldWarning, match="phi'' is 0 almost everywhere"):
        regularizer.backward(model, F.cross_entropy, BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer.backward(model, F.cross_entropy, BATCH)


@pytest.mark.parametrize(
    "regularizer",
    [GradientPenalty(curvature="gauss_newton"), GradientPenalty(method="finite_difference"), SAM()],
)
def test_does_not_warn_where_it_sees(regularizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer.backward(RELU, F.cross_entropy, BATCH)
        with twofold.second_derivative(twofold.gaussian(beta=10), of="relu"):
            GradientPenalty().backward(RELU, F.cross_entropy, BATCH)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.used, self.idle = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return {"used": self.used(h), "idle": self.idle(h)}


@pytest.mark.parametrize(
    "regularizer",
    [
        SAM(),
        GradientPenalty(rho=0.0),
        GradientPenalty(),
        GradientPenalty(params="body*"),
        HessianTrace(strength=0.1),
        GaussNewtonTrace(strength=0.1, estimator="hutchinson"),
        GaussNewtonTrace(strength=0.1, estimator="hutchinson", through="full"),
    ],
)
def test_a_head_that_the_loss_does_not_read_gets_no_gradient(regularizer):
    model = TwoHeads()
    regularizer.backward(model, lambda z, y: F.cross_entropy(z["used"], y), BATCH)
    assert model.idle.weight.grad is None
    assert model.used.weight.grad is not None


def test_other_options_are_refused_with_what_came():
    for options in (
        {"p": 3},
        {"curvature": "fisher"},
        {"method": "fd"},
        {"radius": 0.0},
        {"radius": -1.0},
        {"method": "finite_difference", "curvature": "nme"},
    ):
        with pytest.raises(TwofoldError, match=str(list(options.values())[-1])):
            GradientPenalty(**options)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(5, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.table(x))


def test_what_has_no_second_derivative_is_refused_by_name():
    with pytest.raises(TwofoldError, match="EmbeddingBag"):
        GradientPenalty().backward(Bag(), F.cross_entropy, (torch.randint(5, (4, 2)), torch.randint(3, (4,))))

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, u):
            return u * 2

    class Custom(nn.Linear):
        def forward(self, x):
            return Once.apply(torch.tanh(super().forward(x)))

    with pytest.raises(TwofoldError, match="cannot be differentiated twice"):
        GradientPenalty().backward(Custom(3, 3), F.cross_entropy, BATCH)
    assert SAM().backward(Custom(3, 3), F.cross_entropy, BATCH) > 0


def test_a_loss_that_reads_the_weights_itself_is_refused_by_penalties_only():
    model = nn.Linear(3, 3)

    def decayed(z, y):
        return F.cross_entropy(z, y) + model.weight.square().sum()

    with pytest.raises(TwofoldError, match="weight decay"):
        GradientPenalty().backward(model, decayed, BATCH)
    assert SAM().backward(model, decayed, BATCH) > 0
