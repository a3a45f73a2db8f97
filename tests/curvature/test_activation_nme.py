"""The part of the NME that carries phi'', against what remains without phi'' and against closed forms."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import CASES, classification, mlp
from references import dense, relative
from twofold import TwofoldError, TwofoldWarning, second_derivative

pytestmark = pytest.mark.usefixtures("float64")

PARTS = ("hessian", "gauss_newton", "nme", "activation_nme", "rest")


def curvature(case):
    data = case.batches if len(case.batches) > 1 else case.batches[0]
    return twofold.Curvature(case.model, case.loss_fn, data, **({"forward": case.forward} if case.forward else {}))


def close(found, expected, scale):
    return (found - expected).norm() <= 1e-12 * scale


@pytest.mark.filterwarnings("ignore:.*(weight_norm|fused kernel|even kernel).*")
@pytest.mark.parametrize("name", CASES)
def test_rest_is_the_nme_without_phi2(name):
    case = CASES[name]()
    c = curvature(case)
    identity = torch.eye(c.layout.size)
    hessian, gauss_newton, nme, activation, rest = c.products(identity, parts=PARTS)
    scale = hessian.norm()
    plain = dict(zip(PARTS[:3], c.products(identity), strict=True))
    assert close(hessian, plain["hessian"], scale)
    assert close(gauss_newton, plain["gauss_newton"], scale)
    assert close(nme, plain["nme"], scale)
    with second_derivative(0):
        without = c.nme.to_dense()
    assert close(rest, without, scale)
    assert close(activation, plain["nme"] - without, scale)
    assert close(activation, activation.T, scale)


@pytest.mark.parametrize("name", ["mlp", "conv BatchNorm train", "aliased in-place", "checkpoint", "PReLU"])
def test_under_second_derivative_the_activation_nme_carries_f(name):
    case = CASES[name]()
    c = curvature(case)
    with second_derivative(0):
        without = c.nme.to_dense()
        assert not c.activation_nme.to_dense().any()
    for f in (torch.cos, twofold.gaussian(2.0), 1):
        with second_derivative(f):
            whole = c.nme.to_dense()
            assert close(c.activation_nme.to_dense(), whole - without, whole.norm())
            (rest,) = c.products(torch.eye(c.layout.size), parts=("rest",))
            assert close(rest, without, whole.norm())
            assert (whole - without).norm() > 1e-3 * whole.norm()


def test_a_model_may_enter_second_derivative_itself():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            with second_derivative(torch.cos, of="relu"):
                h = torch.relu(self.a(x))
            return self.c(torch.tanh(self.b(h)))

    case = classification(Inside())
    c = curvature(case)
    nme, activation = c.nme.to_dense(), c.activation_nme.to_dense()

    class Without(Inside):
        def forward(self, x):
            with second_derivative(0):
                h = torch.relu(self.a(x))
                return self.c(torch.tanh(self.b(h)))

    case.model.__class__ = Without
    rest = twofold.NME(case.model, case.loss_fn, case.batches[0]).to_dense()
    assert close(activation, nme - rest, nme.norm())


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


class Cosine(nn.Module):
    def forward(self, x):
        return x.cos()


CURVED = {
    "tanh": (nn.Tanh, lambda h: -2 * torch.tanh(h) * (1 - torch.tanh(h) ** 2)),
    "sin": (Sine, lambda h: -torch.sin(h)),
    "cos": (Cosine, lambda h: -torch.cos(h)),
}


@pytest.mark.parametrize("name", CURVED)
def test_one_hidden_layer_has_a_closed_form(name):
    """The sum over units u and examples of (dL/da_u) phi''(h_u) grad h_u grad h_u'."""
    W, b, a = torch.randn(5, 4), torch.randn(5), torch.randn(1, 5)
    x, y = torch.randn(7, 4), torch.randn(7, 1)
    phi, second_of = CURVED[name]
    model = nn.Sequential(nn.Linear(4, 5), phi(), nn.Linear(5, 1, bias=False))
    for parameter, value in zip(model.parameters(), (W, b, a), strict=True):
        parameter.data.copy_(value)
    h = x @ W.T + b
    residual = 2 * (phi()(h) @ a.T - y) / 7  # of the mean squared error
    second = second_of(h)
    expected = torch.zeros(30, 30)
    for n in range(7):
        for u in range(5):
            gradient = torch.zeros(30)
            gradient[4 * u : 4 * u + 4], gradient[20 + u] = x[n], 1
            expected += residual[n] * a[0, u] * second[n, u] * torch.outer(gradient, gradient)
    found = twofold.ActivationNME(model, nn.MSELoss(), (x, y)).to_dense()
    assert relative(found, expected) < 1e-12
    kinds = twofold.anatomy(model, nn.MSELoss(), (x, y), num_matvecs=2).kinds
    assert kinds["activation"].frobenius.value > 0
    assert kinds["other"].frobenius.value == 0


@pytest.mark.parametrize(
    ("act", "second"),
    [
        (nn.Tanh, lambda h: -2 * torch.tanh(h) * (1 - torch.tanh(h) ** 2)),
        (nn.Softplus, lambda h: torch.sigmoid(h) * (1 - torch.sigmoid(h))),
        (nn.GELU, lambda h: (2 - h * h) * torch.exp(-h * h / 2) / (2 * torch.pi) ** 0.5),
    ],
)
def test_the_diagonal_of_the_hessian_beyond_gauss_newton(act, second):
    """In an MLP diag H - diag GN has phi'' alone; a layer's own part is sum_n (dl/dphi(h))_u phi''(h_u) x_i^2.

    Later layers add theirs, carried back layer by layer with the squared slopes of the last hidden layer's units.
    """
    case = classification(mlp(4, 6, 5, 3, act=act))
    (x, y), weights = case.batches[0], [layer.weight.detach() for layer in case.model[::2]]
    reference = dense(case.model, case.loss_fn, case.batches, case.counts)
    h1 = case.model[0](x)
    h2 = case.model[2](case.model[1](h1))
    loss = F.cross_entropy(case.model[4](case.model[3](h2)), y)
    g1, g2 = (g.detach() for g in torch.autograd.grad(loss, [h1, h2]))
    h1, h2 = h1.detach(), h2.detach()

    def slope(h):
        h = h.clone().requires_grad_()
        return torch.autograd.grad(case.model[1](h).sum(), h)[0]

    curved2 = g2 / slope(h2) * second(h2)
    # d2 / dh1_u^2 of the rest of the network, phi'' parts alone
    curved1 = g1 / slope(h1) * second(h1) + slope(h1) ** 2 * (curved2 @ weights[1] ** 2)
    expected = torch.cat(
        [
            (curved1.T @ x**2).flatten(),
            curved1.sum(0),
            (curved2.T @ case.model[1](h1) ** 2).flatten(),
            curved2.sum(0),
            torch.zeros(18),
        ]
    )
    diagonal = twofold.ActivationNME(case.model, case.loss_fn, (x, y)).to_dense().diagonal()
    assert relative(diagonal, expected) < 1e-12
    assert relative(reference.nme.diagonal(), expected) < 1e-9


def test_with_relu_there_is_none():
    case = classification(mlp(4, 5, 3, act=nn.ReLU))
    c = curvature(case)
    v = torch.randn(c.layout.size)
    activation, rest = c.products(v, parts=("activation_nme", "rest"))
    assert not activation.any()
    assert torch.equal(rest, c.nme @ v)


def test_plain_products_use_the_recording_without_the_switch():
    case = classification(mlp(4, 5, 3))
    c = curvature(case)
    v = torch.randn(c.layout.size)
    before = c.products(v)
    assert len(c._products.recordings.kept) == 1
    c.activation_nme @ v
    assert len(c._products.recordings.kept) == 2
    plain = [recording for recording in c._products.recordings.kept.values() if type(recording).__name__ == "Recording"]
    assert len(plain) == 1
    for a, b in zip(c.products(v), before, strict=True):
        assert torch.equal(a, b)


def test_it_sees_changed_parameters_and_leaves_no_trace():
    case = classification(mlp(4, 5, 3))
    c = curvature(case)
    v = torch.randn(c.layout.size)
    old = c.activation_nme @ v
    with torch.no_grad():
        case.model[0].weight.mul_(1.5)
    fresh = curvature(case).activation_nme @ v
    assert torch.equal(c.activation_nme @ v, fresh)
    assert not torch.equal(old, fresh)
    assert all(p.grad is None for p in case.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())


def test_several_batches_with_and_without_memory():
    case = classification(mlp(4, 5, 3), sizes=(7, 3))
    whole = (torch.cat([x for x, _ in case.batches]), torch.cat([y for _, y in case.batches]))
    expected = twofold.ActivationNME(case.model, case.loss_fn, whole).to_dense()
    for memory in (None, 0):
        found = twofold.ActivationNME(case.model, case.loss_fn, case.batches, memory=memory)
        for _ in range(2):
            assert relative(found.to_dense(), expected) < 1e-12


@pytest.mark.parametrize(
    ("name", "kind"), [("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn_tanh", nn.RNN), ("glu", lambda *_: nn.GLU())]
)
def test_fused_activations_are_named_once(name, kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.layer = nn.Linear(4, 4), kind(4, 3)

        def forward(self, x):
            y = self.layer(self.a(x))
            return y[0] if isinstance(y, tuple) else y

    x = torch.randn(3, 4)
    c = twofold.Curvature(Model(), nn.MSELoss(), (x, torch.randn(3, 2 if name == "glu" else 3)))
    v = torch.randn(c.layout.size)
    with pytest.warns(TwofoldWarning, match=f"does not contain {name}: it applies (sigmoid|tanh)"):
        activation, rest = c.products(v, parts=("activation_nme", "rest"))
    assert not activation.any()
    assert rest.any()
    with torch.no_grad():
        c._products.model.a.weight.mul_(1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c.activation_nme @ v


def test_any_choice_of_parts_is_the_same_as_all():
    c = curvature(CASES["mlp"]())
    identity = torch.eye(c.layout.size)
    every = dict(zip(PARTS, c.products(identity, parts=PARTS), strict=True))
    for n in (1, 2, 3):
        for chosen in itertools.permutations(PARTS, n):
            for part, found in zip(chosen, c.products(identity, parts=chosen), strict=True):
                assert close(found, every[part], every["hessian"].norm())


def test_parts_are_offered_wherever_matrices_are_named():
    case = classification(mlp(4, 5, 3))
    c = curvature(case)
    traces = c.traces(8, parts=("nme", "activation_nme", "rest"))
    assert traces["nme"].value == pytest.approx(traces["activation_nme"].value + traces["rest"].value)
    assert list(c.traces(2)) == ["hessian", "gauss_newton", "nme"]
    with pytest.raises(TwofoldError, match="activation_nme"):
        c.products(torch.ones(c.layout.size), parts=("activation",))


def test_float32_agrees_with_float64():
    case = CASES["mlp"]()
    x, y = case.batches[0]
    v = torch.randn(curvature(case).layout.size)
    exact = curvature(case).activation_nme @ v
    single = twofold.ActivationNME(case.model.float(), case.loss_fn, (x.float(), y)) @ v.float()
    assert relative(single.double(), exact) < 1e-4
