"""Facts that hold exactly, on models of any size."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import mlp
from references import relative

pytestmark = pytest.mark.usefixtures("float64")


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def test_a_linear_model_has_no_nme():
    c = twofold.Curvature(nn.Linear(4, 3), F.cross_entropy, (torch.randn(8, 4), torch.randint(3, (8,))))
    assert not c.nme.to_dense().any()
    torch.testing.assert_close(c.hessian.to_dense(), c.gauss_newton.to_dense())


def test_targets_equal_to_the_models_own_probabilities_leave_no_nme():
    model, x = mlp(4, 6, 3), torch.randn(8, 4)
    c = twofold.Curvature(model, F.cross_entropy, (x, model(x).detach().softmax(1)))
    assert c.nme.to_dense().norm() < 1e-14 * c.gauss_newton.to_dense().norm()


def test_mse_scales_the_nme_with_the_residual_and_leaves_gn():
    model, x, y = mlp(4, 6, 3), torch.randn(8, 4), torch.randn(8, 3)
    z = model(x).detach()
    near = twofold.Curvature(model, F.mse_loss, (x, z + (y - z)))
    far = twofold.Curvature(model, F.mse_loss, (x, z + 3 * (y - z)))
    torch.testing.assert_close(far.nme.to_dense(), 3 * near.nme.to_dense())
    torch.testing.assert_close(far.gauss_newton.to_dense(), near.gauss_newton.to_dense())


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_a_bias_free_relu_net_knows_nme_theta(layers):
    widths = [4, *[6] * (layers - 1), 3]
    model = nn.Sequential()
    for i, o in itertools.pairwise(widths):
        model.extend([nn.Linear(i, o, bias=False), nn.ReLU()])
    model.pop(-1)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    c = twofold.Curvature(model, F.cross_entropy, (x, y))
    theta = flat(model.parameters())
    assert relative(c.nme @ theta, (layers - 1) * c.gradient()) < 1e-12
    z = model(x).detach()
    p = z.softmax(1)
    quadratic = ((p * z * z).sum(1) - (p * z).sum(1) ** 2).mean()
    torch.testing.assert_close(theta @ (c.gauss_newton @ theta), layers**2 * quadratic)


def test_the_scalar_chain_by_hand():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-1.3))

        def forward(self, x):
            return self.a * F.gelu(self.w * x)

    model, x, y = Chain(), torch.tensor(0.9), torch.tensor(0.4)
    a, h = model.a.item(), torch.tensor(model.w.item() * 0.9)
    density = torch.exp(-h * h / 2) / (2 * torch.pi) ** 0.5
    phi, d1, d2 = F.gelu(h), 0.5 * (1 + torch.erf(h / 2**0.5)) + h * density, (2 - h * h) * density
    r, J = 2 * (a * phi - y), torch.stack([phi, a * d1 * x])
    c = twofold.Curvature(model, nn.MSELoss(), (x, y))
    torch.testing.assert_close(c.gauss_newton.to_dense(), 2 * torch.outer(J, J))
    expected = r * torch.stack([torch.stack([torch.zeros(()), d1 * x]), torch.stack([d1 * x, a * d2 * x * x])])
    torch.testing.assert_close(c.nme.to_dense(), expected)
    with twofold.second_derivative(0, of="gelu"):
        expected[1, 1] = 0
        torch.testing.assert_close(c.nme.to_dense(), expected)


def test_one_hidden_layer_has_its_activation_nme_in_closed_form():
    model, x, y = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), torch.randn(8, 4), torch.randint(3, (8,))
    c = twofold.Curvature(model, F.cross_entropy, (x, y))
    full = c.nme.to_dense()
    with twofold.second_derivative(0):
        without = c.nme.to_dense()
    h = model[0](x).detach()
    u = (model(x).softmax(1) - F.one_hot(y, 3)).detach() / 8
    density = torch.exp(-h * h / 2) / (2 * torch.pi) ** 0.5
    weight = (u @ model[2].weight.detach()) * (2 - h * h) * density
    expected = torch.zeros_like(full)
    for n in range(8):
        for unit in range(6):
            gradient = torch.zeros(full.shape[0])
            gradient[4 * unit : 4 * unit + 4] = x[n]
            gradient[24 + unit] = 1
            expected += weight[n, unit] * torch.outer(gradient, gradient)
    assert relative(full - without, expected) < 1e-12


def test_diagonal_blocks_of_a_relu_nets_nme_are_zero():
    model = mlp(4, 6, 5, 3, act=nn.ReLU)
    c = twofold.Curvature(model, F.cross_entropy, (torch.randn(8, 4), torch.randint(3, (8,))))
    N = c.nme.to_dense()
    sizes = [w.numel() + b.numel() for w, b in zip(*[iter(model.parameters())] * 2, strict=True)]
    start = 0
    for size in sizes:
        assert not N[start : start + size, start : start + size].any()
        start += size
    assert N.norm() > 0
    torch.testing.assert_close(c.hessian.to_dense().trace(), c.gauss_newton.to_dense().trace())
