import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

from activations.derivatives import NATIVE, STAND_INS, dense_hessian, evaluated, second, slope
from twofold.activations import gaussian, second_derivative
from twofold.activations.second_derivative import active_second_derivatives
from twofold.errors import TwofoldError, TwofoldWarning

pytestmark = pytest.mark.usefixtures("float64")


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(NATIVE)), st.sampled_from(sorted(STAND_INS)), *[st.floats(-2, 2)] * 3)
def test_scalar_chain(name, stand_in, a, w, x):
    """z = a phi(w x): f appears in the (w, w) entry and nowhere else."""
    phi, _ = NATIVE[name]
    f = STAND_INS[stand_in]
    a, w, x = (torch.tensor(v, dtype=torch.float64) for v in (a, w, x))
    a, w = a.requires_grad_(), w.requires_grad_()
    with second_derivative(f, of=name):
        z = a * phi(w * x)
    H = dense_hessian(z, [a, w])
    h = (w * x).detach()
    mixed = slope(phi, h) * x
    expected = torch.stack([torch.zeros(()), mixed, mixed, a.detach() * evaluated(f, h) * x * x]).view(2, 2)
    torch.testing.assert_close(H, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("stand_in", STAND_INS)
@pytest.mark.parametrize("name", NATIVE)
def test_hessian_of_a_network_against_the_formula(name, stand_in):
    """H with f = H - sum over units of (dL/da_u) (phi'' - f)(h_u) grad h_u grad h_u', for one hidden layer."""
    phi, phi2 = NATIVE[name]
    f = STAND_INS[stand_in]
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    W1, W2 = torch.randn(4, 3, requires_grad=True), torch.randn(2, 4, requires_grad=True)

    def loss():
        return (phi(x @ W1.T) @ W2.T - y).pow(2).sum()

    native = dense_hessian(loss(), [W1, W2])
    with second_derivative(f):
        swapped = dense_hessian(loss(), [W1, W2])
    h = x @ W1.detach().T
    a_bar = 2 * (phi(h) @ W2.detach().T - y) @ W2.detach()
    change = torch.zeros(12, 12)
    for n in range(6):
        for u in range(4):
            grad_h = torch.zeros(4, 3)
            grad_h[u] = x[n]
            weight = a_bar[n, u] * (evaluated(f, h[n, u]) - phi2(h[n, u]))
            change += weight * torch.outer(grad_h.flatten(), grad_h.flatten())
    torch.testing.assert_close(swapped[:12, :12], native[:12, :12] + change, rtol=1e-12, atol=1e-12)
    assert torch.equal(swapped[12:], native[12:])


def test_zero_in_a_deep_network_equals_a_frozen_slope():
    """With f = 0, H is that of phi replaced by a function of the same value and slope that is linear around each h."""

    class Frozen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, value, slope):
            ctx.save_for_backward(slope)
            return value.clone()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0], None, None

    def frozen(h):
        return Frozen.apply(h, F.gelu(h).detach(), slope(F.gelu, h))

    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    parameters = list(model.parameters())
    with second_derivative(0):
        ours = dense_hessian(F.cross_entropy(model(x), y), parameters)
    reference = x
    for layer in model:
        reference = frozen(reference) if isinstance(layer, nn.GELU) else layer(reference)
    theirs = dense_hessian(F.cross_entropy(reference, y), parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours, ours.T, rtol=1e-12, atol=1e-13)


def test_derivatives_beyond_the_second_are_those_of_f():
    x = torch.randn(7, requires_grad=True)
    with second_derivative(gaussian(2.0)):
        y = F.relu(x)
    derivatives = [y]
    for _ in range(4):
        derivatives.append(torch.autograd.grad(derivatives[-1].sum(), x, create_graph=True)[0])
    f = gaussian(2.0)(x)
    torch.testing.assert_close(derivatives[2], f)
    torch.testing.assert_close(derivatives[3], -4 * x * f)
    torch.testing.assert_close(derivatives[4], (16 * x * x - 4) * f)


def test_slope_has_its_native_derivative_in_the_upstream_gradient():
    x = torch.randn(7, requires_grad=True)
    v = torch.randn(7, requires_grad=True)
    with second_derivative(torch.cos):
        y = torch.tanh(x)
    (g,) = torch.autograd.grad(y, x, v, create_graph=True)
    gx, gv = torch.autograd.grad(g.pow(2).sum(), (x, v), retain_graph=True)
    phi1 = slope(torch.tanh, x)
    torch.testing.assert_close(gv, 2 * v.detach() * phi1**2)
    torch.testing.assert_close(gx, (2 * g * v * torch.cos(x)).detach())
    for leaf, expected in ((x, gx), (v, gv)):  # each alone
        assert torch.equal(torch.autograd.grad(g.pow(2).sum(), leaf, retain_graph=True)[0], expected)
    y = torch.tanh(x)  # and where only the upstream gradient wants one
    with second_derivative(torch.cos):
        constant = torch.tanh(x.detach())
        assert not constant.requires_grad


def test_nesting_inner_wins_for_what_it_names():
    x = torch.tensor(0.3, requires_grad=True)
    with second_derivative(2):
        with second_derivative(3, of="tanh"):
            with second_derivative(4, of=["gelu", "silu"]):
                assert [second(phi(x), x).item() for phi in (torch.tanh, F.gelu, F.silu, torch.relu)] == [3, 4, 4, 2]
            assert [second(phi(x), x).item() for phi in (torch.tanh, F.gelu)] == [3, 2]
        assert [second(phi(x), x).item() for phi in (torch.tanh, F.gelu)] == [2, 2]
    native = second(F.tanhshrink(x), x)
    with second_derivative(2, of="tanh"), second_derivative(3, of="gelu"):
        assert torch.equal(second(F.tanhshrink(x), x), native)  # its inner tanh is not a tanh that was named
    weight = torch.tensor([0.1])
    x = x.detach().view(1).requires_grad_()
    with second_derivative(2), second_derivative(3):
        assert second(F.prelu(x, weight), x).item() == 3


def test_it_is_reusable_reentrant_and_a_decorator():
    x = torch.tensor(0.3, requires_grad=True)
    context = second_derivative(2)
    for _ in range(2):
        with context, context:
            assert second(F.gelu(x), x).item() == 2
    assert active_second_derivatives() == ()

    @second_derivative(5, of="gelu")
    def model(x):
        return F.gelu(x)

    assert second(model(x), x).item() == second(model(x), x).item() == 5


def test_an_exception_leaves_nothing_behind():
    x = torch.tensor(0.3, requires_grad=True)
    native = second(F.gelu(x), x)
    with pytest.raises(KeyError), second_derivative(1), second_derivative(0):
        raise KeyError
    assert active_second_derivatives() == ()
    assert torch.equal(second(F.gelu(x), x), native)


def test_the_swap_is_bound_in_the_forward_pass():
    x = torch.randn(4, requires_grad=True)
    native = second(F.gelu(x), x)
    with second_derivative(7):
        inside = F.gelu(x)
    outside = F.gelu(x)
    with second_derivative(9):  # a context around the backward pass changes nothing, also not the pieces of f
        assert torch.equal(second(outside, x), native)
        assert torch.equal(second(inside, x), torch.full((4,), 7.0))
        y = F.relu(x)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(g.sum(), x, retain_graph=True)[0], torch.full((4,), 9.0))
    with second_derivative(torch.tanh):
        y = F.relu(x)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        (fourth,) = torch.autograd.grad(third.sum(), x)
    torch.testing.assert_close(fourth, NATIVE["tanh"][1](x).detach())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("phi", [F.relu, F.mish])
def test_backward_within_the_context_does_not_swap_the_pieces_of_f(phi):
    x = torch.randn(4, requires_grad=True)
    with second_derivative(torch.tanh):
        y = phi(x)
        torch.autograd.backward(y.sum(), inputs=x, create_graph=True)
        for _ in range(3):
            derivative, x.grad = x.grad, None
            torch.autograd.backward(derivative.sum(), inputs=x, create_graph=True)
    torch.testing.assert_close(x.grad, NATIVE["tanh"][1](x))
    x.grad = None


def test_threads():
    x = torch.tensor(0.3, requires_grad=True)
    found = {}

    def run(name, work):
        thread = threading.Thread(target=lambda: found.__setitem__(name, work()))
        thread.start()
        thread.join()

    native = second(F.gelu(x), x).item()
    context = second_derivative(3)
    with context:
        y = F.gelu(x)
        run("own", lambda: (active_second_derivatives(), second(F.gelu(x), x).item()))
        run("backward", lambda: second(y, x).item())

        def same_object():
            with context:
                return second(F.gelu(x), x).item()

        run("shared", same_object)
        mode = torch.overrides._get_current_function_mode()

        def carried_there():
            with mode:
                return second(F.gelu(x), x).item()

        run("carried", carried_there)
        assert second(F.gelu(x), x).item() == 3
    assert found == {"own": ((), native), "backward": 3.0, "shared": 3.0, "carried": 3.0}


def test_other_modes_around_and_within():
    class Counter(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += func is F.gelu
            return func(*args, **(kwargs or {}))

    x = torch.tensor(0.3, requires_grad=True)
    with Counter() as outer, second_derivative(3), torch.device("cpu"), Counter() as inner:
        y = F.gelu(x)
    assert second(y, x).item() == 3
    assert (outer.calls, inner.calls) == (1, 1)


def test_active_second_derivatives_identify_the_swaps():
    f = lambda x: x
    seen = []
    for value, of in (
        (0, None),
        (0.0, None),
        (0, "gelu"),
        (gaussian(2), None),
        (gaussian(2.0), None),
        (f, None),
        (f, None),
    ):
        with second_derivative(value, of=of):
            seen.append(active_second_derivatives())
    assert seen[0] == seen[1] != seen[2]
    assert seen[3] == seen[4]
    assert seen[5] == seen[6]
    assert len(set(seen)) == 4
    with second_derivative(lambda x: x):
        assert active_second_derivatives() != seen[5]
    with second_derivative(0, of="gelu"), second_derivative(0, of="gelu"):
        assert active_second_derivatives() == seen[2]
    assert active_second_derivatives() == ()

    class Unhashable:
        __hash__ = None

        def __call__(self, x):
            return x

    with second_derivative(Unhashable()):
        hash(active_second_derivatives())


@pytest.mark.parametrize("value", [None, "0", float("nan"), float("inf"), True, torch.zeros(()), [0], gaussian])
def test_bad_values_are_refused(value):
    with pytest.raises(TwofoldError, match=r"finite number, gaussian\(beta\) or an elementwise function.*gelu, "):
        second_derivative(value)


@pytest.mark.parametrize("of", ["rleu", ["gelu", "rleu"], [], 3, [F.gelu], nn.GELU])
def test_unknown_names_are_refused(of):
    with pytest.raises(TwofoldError, match=r"known activations are .*gelu, .*softplus, "):
        second_derivative(0, of=of)


@pytest.mark.parametrize("f", [lambda x: 0.5, lambda x: x.sum(), lambda x: x[:1], lambda x: None])
def test_functions_that_are_not_elementwise_are_refused(f):
    x = torch.randn(3, requires_grad=True)
    with second_derivative(f):
        y = F.gelu(x)
    with pytest.raises(TwofoldError, match="must be elementwise"):
        second(y, x)


FUSED = {
    "lstm": nn.LSTM(3, 2), "gru": nn.GRU(3, 2), "rnn_tanh": nn.RNN(3, 2), "rnn_relu": nn.RNN(3, 2, nonlinearity="relu"),
    "lstm_cell": nn.LSTMCell(3, 2), "gru_cell": nn.GRUCell(3, 2), "rnn_tanh_cell": nn.RNNCell(3, 2), "glu": nn.GLU(),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused_activations_are_named_once(name):
    x = torch.randn(2, 4 if name == "glu" else 3)
    model = FUSED[name].double()
    context = second_derivative(0)
    with pytest.warns(TwofoldWarning, match=rf"does not reach {name}\b"), context:
        model(x)
    with warnings.catch_warnings(), context:
        warnings.simplefilter("error")
        model(x)
    with warnings.catch_warnings(), second_derivative(0, of="gelu"):
        warnings.simplefilter("error")
        model(x)


def test_complex_inputs_are_named():
    with pytest.warns(TwofoldWarning, match="does not reach tanh: it came with a complex input"), second_derivative(0):
        torch.tanh(torch.ones(2, dtype=torch.complex128))
