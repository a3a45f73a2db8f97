import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from references import relative
from regularizers.rows import Problem, flat, unit
from twofold.regularizers import SAM, USAM, GaussNewtonTrace, GradientPenalty, HessianTrace, WeightNoise


def direction(problem, regularizer, **options):
    problem.model.zero_grad()
    regularizer.backward(problem.model, problem.loss_fn, problem.batch, **options)
    return flat(problem.model)


def test_sam_is_the_hessian_penalty_up_to_second_order():
    problem = Problem()
    g, H = problem.gradient(), problem.matrix("hessian")
    rest = [(direction(problem, SAM(rho=r)) - g - r * H @ unit(g)).norm() for r in (1e-2, 5e-3, 2.5e-3)]
    assert 3.8 < rest[0] / rest[1] < 4.2
    assert 3.8 < rest[1] / rest[2] < 4.2


class Quadratic(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.randn(size).double())

    def forward(self, x):
        return self.w


@pytest.fixture
def quadratic():
    """L = w'Aw / 2: H = GN = A, NME = 0."""
    root = torch.randn(4, 4).double()
    A = root @ root.T
    return Problem(Quadratic(4), lambda z, y: z @ A @ z / 2, (torch.zeros(1), torch.zeros(1))), A


def test_closed_forms_on_a_quadratic(quadratic):
    problem, A = quadratic
    w, rho = problem.theta, 0.1
    g = A @ w
    expected = {
        SAM(rho=rho): A @ (w + rho * unit(g)),
        USAM(rho=rho): (A + rho * A @ A) @ w,
        GradientPenalty(rho=rho): g + rho * A @ unit(g),
        GradientPenalty(rho=rho, curvature="gauss_newton"): g + rho * A @ unit(g),
        GradientPenalty(rho=rho, curvature="nme"): g,
        GradientPenalty(rho=rho, p=2): (A + 2 * rho * A @ A) @ w,
        GradientPenalty(rho=rho, p=2, method="finite_difference"): (A + 2 * rho * A @ A) @ w,
        HessianTrace(strength=rho): g,
        HessianTrace(strength=rho, method="difference"): g,
        GaussNewtonTrace(strength=rho, estimator="hutchinson"): g,
        GaussNewtonTrace(strength=rho, estimator="hutchinson", through="full"): g,
    }
    for regularizer, value in expected.items():
        assert relative(direction(problem, regularizer), value) < 1e-6, regularizer
    noise = WeightNoise(sigma=0.5, generator=torch.Generator().manual_seed(1))
    drawn = torch.Generator().manual_seed(1)
    drawn = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=drawn)))
    e = 0.5 * torch.randn(4, generator=drawn, dtype=torch.float64)
    assert relative(direction(problem, noise), A @ (w + e)) < 1e-12


def test_a_finite_difference_of_radius_rho_is_sam_bit_for_bit():
    problem = Problem()
    penalty = GradientPenalty(rho=0.07, radius=0.07, method="finite_difference")
    assert torch.equal(direction(problem, penalty), direction(problem, SAM(rho=0.07)))


def test_the_second_pass_under_autocast_sees_the_perturbed_weights():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x, y = torch.randn(32, 8), torch.randint(4, (32,))

    def loss_of(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x), y)

    loss = loss_of(model)
    loss.backward()
    size = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(moved.parameters(), model.parameters(), strict=True):
            p.add_(q.grad, alpha=(0.5 / (size + 1e-12)).item())
    moved_loss = loss_of(moved)
    moved_loss.backward = None
    model.zero_grad()
    regularizer = SAM(rho=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
        found = regularizer.backward(model, F.cross_entropy, (x, y))
        assert torch.equal(F.cross_entropy(model(x), y), found)
    assert torch.equal(found, loss)
    assert regularizer.diagnostics["loss_rise"] == pytest.approx((moved_loss - loss).item(), rel=1e-3)
    assert regularizer.diagnostics["perturbation_norm"] == pytest.approx(0.5, rel=1e-5)


def test_weights_come_back_bit_for_bit():
    model = nn.Linear(50, 50)
    before = copy.deepcopy(model.state_dict())
    SAM(rho=1e4).backward(model, F.cross_entropy, (torch.randn(4, 50), torch.randint(50, (4,))))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_masks_are_drawn_anew_when_not_shared():
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    batch = (torch.randn(8, 6), torch.randint(3, (8,)))
    shared, apart = SAM(rho=1e-7), SAM(rho=1e-7, share_masks=False)
    shared.backward(model, F.cross_entropy, batch)
    apart.backward(model, F.cross_entropy, batch)
    assert abs(shared.diagnostics["loss_rise"]) < 1e-5
    assert abs(apart.diagnostics["loss_rise"]) > 1e-3
