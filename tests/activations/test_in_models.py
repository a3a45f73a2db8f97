"""Models as people write them: in-place and aliased forms, keywords, whole layers."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from activations.derivatives import dense_hessian, flat_grad, second
from twofold.activations import BetaGELU, beta_gelu, second_derivative

pytestmark = pytest.mark.usefixtures("float64")


class Aliased(nn.Module):
    """In-place activations whose input is used again: as a statement, and next to the result."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        h = self.linear(x)
        h.relu_()
        k = self.linear(h)
        y = torch.sigmoid_(k)
        z = self.linear(y + k)
        z[:, :2].tanh_()
        z = z * 1
        return F.elu(z, 0.5, inplace=True) + z


def out_of_place(x, linear):
    h = torch.relu(linear(x))
    y = torch.sigmoid(linear(h))
    z = linear(y + y)
    z = torch.cat([torch.tanh(z[:, :2]), z[:, 2:]], 1)
    z = F.elu(z, 0.5)
    return z + z


def test_aliased_in_place_forms():
    model, x = Aliased(), torch.randn(5, 4)
    parameters = list(model.parameters())
    native = model(x)
    with second_derivative(torch.cos):
        ours, plain = model(x), out_of_place(x, model.linear)
    assert torch.equal(ours, native)
    assert torch.equal(flat_grad(ours.sum(), parameters, retain_graph=True), flat_grad(native.sum(), parameters))
    H, reference = (dense_hessian(y.pow(2).sum(), parameters) for y in (ours, plain))
    torch.testing.assert_close(H, reference, rtol=1e-12, atol=1e-12)


def test_in_place_forms_return_their_input_and_keep_torchs_refusals():
    with second_derivative(0):
        h = torch.randn(3, requires_grad=True) * 1
        storage = h.data_ptr()
        assert h.relu_() is h
        assert F.elu(h, inplace=True) is h
        assert h.data_ptr() == storage
        with torch.no_grad():
            assert torch.equal(torch.ones(2).sigmoid_(), torch.sigmoid(torch.ones(2)))
        leaf = torch.randn(3, requires_grad=True)
        with pytest.raises(RuntimeError, match="leaf Variable"):
            leaf.relu_()


@pytest.mark.parametrize("call", [
    lambda x: torch.relu(input=x),
    lambda x: F.relu(input=x),
    lambda x: F.relu(input=x, inplace=True),
    lambda x: F.gelu(input=x),
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: F.softplus(x, 2.0, threshold=3.0),
    lambda x: F.leaky_relu(x, True),
    lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
    lambda x: F.hardtanh(x, min_val=-2.0, max_val=0.5),
    lambda x: torch.tanh(x, out=None),
    lambda x: beta_gelu(input=x, beta=3.0),
    torch.special.expit,
    functools.partial(F.celu, alpha=0.3),
])  # fmt: skip
def test_keyword_calls(call):
    x = torch.randn(20, requires_grad=True)
    native = call(x * 1)
    with second_derivative(torch.cos):
        ours = call(x * 1)
    assert torch.equal(ours, native)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (ours, native)))
    torch.testing.assert_close(second(ours, x), torch.cos(x).detach())


@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu, nn.Tanh(), BetaGELU(3.0)])
def test_transformer_layer(activation):
    """In its pre-activations h, H changes by diag(dL/da f(h)) from f = 0 to another f."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation=activation, batch_first=True)
    x, seen = torch.randn(2, 3, 8), {}
    layer.linear1.register_forward_hook(lambda _module, _inputs, output: seen.update(h=output))
    layer.linear2.register_forward_pre_hook(lambda _module, inputs: seen.update(a=inputs[0]))
    v, upstream = torch.randn(2, 3, 12), torch.randn(2, 3, 8)

    def run():
        y = layer(x)
        g, a_bar = torch.autograd.grad(y, (seen["h"], seen["a"]), upstream, create_graph=True)
        (Hv,) = torch.autograd.grad(g, seen["h"], v)
        return y.detach(), g.detach(), a_bar.detach(), seen["h"].detach(), Hv

    native = run()
    with second_derivative(0):
        zero = run()
    with second_derivative(torch.cos):
        ours = run()
    for a, b, c in zip(native[:4], zero[:4], ours[:4], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    *_, a_bar, h, Hv = ours
    torch.testing.assert_close(Hv - zero[-1], a_bar * torch.cos(h) * v, rtol=1e-12, atol=1e-13)


def test_other_inputs_pass_through():
    with second_derivative(0), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(torch.relu(torch.tensor([-1, 2])), torch.tensor([0, 2]))
        assert torch.sigmoid(torch.tensor([0])).item() == 0.5
        out = torch.empty(2)
        assert torch.tanh(torch.ones(2), out=out) is out
        assert torch.relu(torch.empty(3, device="meta")).shape == (3,)
        assert torch.relu(torch.empty(0)).shape == (0,)
        with torch.inference_mode():
            assert torch.equal(F.gelu(torch.ones(2)), F.gelu(torch.ones(2)))
