import functools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from twofold.activations import BetaGELU, beta_gelu, gaussian, second_derivative
from twofold.activations.second_derivative import active_second_derivatives
from twofold.errors import TwofoldError, TwofoldWarning

pytestmark = pytest.mark.usefixtures("float64")

NATIVE = {
    "gelu": (F.gelu, lambda x: (2 - x * x) * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5),
    "tanh": (torch.tanh, lambda x: -2 * torch.tanh(x) * (1 - torch.tanh(x) ** 2)),
    "relu": (torch.relu, torch.zeros_like),
}
STAND_INS = {"zero": 0, "one": 1, "gaussian": gaussian(3.0), "function": torch.cos}


def evaluated(f, x):
    return f(x) if callable(f) else torch.full_like(x, f)


def slope(phi, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(phi(x).sum(), x)[0]


def second(y, x):
    """The second derivative of a sum of elementwise y in x."""
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return torch.autograd.grad(g.sum(), x)[0]


def flat_grad(y, parameters, **kwargs):
    return torch.cat([g.flatten() for g in torch.autograd.grad(y, parameters, **kwargs)])


def dense_hessian(loss, parameters):
    gradient = flat_grad(loss, parameters, create_graph=True)
    rows = [flat_grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in gradient]
    return torch.stack(rows)


# --- exact facts ---


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


# --- forms of models ---


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


# --- the context ---


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
        assert second(F.gelu(x), x).item() == 3
    assert found == {"own": ((), native), "backward": 3.0, "shared": 3.0}


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


# --- faults ---


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


# --- with the rest of torch ---


def test_function_transforms():
    A, x = torch.randn(4, 4), torch.randn(4)

    def model(x, f=torch.cos):
        with second_derivative(f):
            return (torch.tanh(A @ F.gelu(A @ x)) ** 2).sum()

    H = torch.autograd.functional.hessian(model, x)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            torch.testing.assert_close(outer(inner(model))(x), H, rtol=1e-12, atol=1e-12)
    v = torch.randn(4)
    native = lambda x: (torch.tanh(A @ F.gelu(A @ x)) ** 2).sum()
    for ours, theirs in zip(jvp(model, (x,), (v,)), jvp(native, (x,), (v,)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(vjp(grad(model), x)[1](v)[0], H @ v)
    batch = torch.randn(3, 4)
    torch.testing.assert_close(
        vmap(hessian(model))(batch), torch.stack([torch.autograd.functional.hessian(model, row) for row in batch])
    )
    torch.testing.assert_close(vmap(F.gelu, in_dims=1)(batch), F.gelu(batch.T))


def test_batched_vectors_and_functional_call():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1)), torch.randn(5, 3)
    parameters = dict(model.named_parameters())
    with second_derivative(0):
        gradient = flat_grad(model(x).pow(2).sum(), list(parameters.values()), create_graph=True)
        H = dense_hessian(model(x).pow(2).sum(), list(parameters.values()))
        functional = hessian(lambda p: functional_call(model, p, (x,)).pow(2).sum())(parameters)
    eye = torch.eye(len(gradient))
    blocks = torch.autograd.grad(
        gradient, list(parameters.values()), eye, is_grads_batched=True, materialize_grads=True
    )
    torch.testing.assert_close(torch.cat([b.flatten(1) for b in blocks], 1), H)
    block = functional["0.weight"]["0.weight"].reshape(12, 12)
    torch.testing.assert_close(block, H[:12, :12])


def test_vmap_over_in_place_forms():
    def model(x):
        with second_derivative(torch.cos):
            h = x * 1
            h.relu_()
            return h.sum()

    x = torch.randn(3, 4)
    torch.testing.assert_close(vmap(hessian(model))(x), torch.diag_embed(torch.cos(x)))


@pytest.mark.parametrize("within", [True, False])
def test_nested_checkpoints_in_nested_contexts(within):
    linear = nn.Linear(4, 4)
    parameters = list(linear.parameters())
    x = torch.randn(3, 4)

    def inner(h):
        return F.relu(linear(torch.tanh(linear(h))), inplace=True)

    def forward(checkpointed):
        run = functools.partial(checkpoint, use_reentrant=False) if checkpointed else lambda fn, h: fn(h)
        outer = lambda h: F.gelu(linear(run(inner, linear(h))))
        return run(outer, x).pow(2).sum()

    def products(loss):
        gradient = flat_grad(loss, parameters, create_graph=True)
        return gradient.detach(), flat_grad(gradient.sin().sum(), parameters)

    native = flat_grad(forward(False), parameters)
    results = []
    for checkpointed in (False, True):
        with second_derivative(torch.cos), second_derivative(gaussian(2.0), of="relu"):
            loss = forward(checkpointed)
            if within:
                results.append(products(loss))
        if not within:
            results.append(products(loss))
    assert torch.equal(results[0][0], native)
    for ours, plain in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, plain)


def test_offloaded_activations():
    x = torch.randn(4, requires_grad=True)
    with second_derivative(torch.cos), torch.autograd.graph.save_on_cpu():
        h = x * 1
        y = F.gelu(h)
        h.add_(1)
    assert torch.allclose(second(y, x), torch.cos(x))


@pytest.mark.parametrize("backward_within", [True, False])
def test_autocast(backward_within):
    model = nn.Sequential(
        nn.Linear(4, 5),
        nn.GELU(),
        nn.Linear(5, 5),
        nn.ReLU(),
        nn.Linear(5, 5),
        nn.Softplus(),
        nn.Mish(),
        nn.Linear(5, 2),
    ).float()
    parameters, x = list(model.parameters()), torch.randn(6, 4, dtype=torch.float32)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            loss = y.float().pow(2).sum()
            if backward_within:
                return y, torch.autograd.grad(loss, parameters, create_graph=True)
        return y, torch.autograd.grad(loss, parameters, create_graph=True)

    native, native_gradient = run()
    with second_derivative(gaussian(2.0)):
        ours, gradient = run()
    assert ours.dtype == native.dtype == torch.bfloat16
    assert torch.equal(ours, native)
    assert all(torch.equal(a, b) for a, b in zip(gradient, native_gradient, strict=True))
    products = torch.autograd.grad(sum(g.sum() for g in gradient), parameters)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in products)


def test_compiled_models_run_eagerly_within():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1))
    parameters, x = list(model.parameters()), torch.randn(5, 3)
    compiled = torch.compile(model, backend="eager")
    native = dense_hessian(model(x).pow(2).sum(), parameters)
    with second_derivative(0):
        expected = dense_hessian(model(x).pow(2).sum(), parameters)
    for _ in range(2):
        with second_derivative(0):
            assert torch.equal(dense_hessian(compiled(x).pow(2).sum(), parameters), expected)
        torch.testing.assert_close(dense_hessian(compiled(x).pow(2).sum(), parameters), native)

    @functools.partial(torch.compile, backend="eager")
    def enters(x):
        with second_derivative(0):
            return model(x)

    with pytest.raises(TwofoldError, match="inside a compiled function"):
        enters(x)
    assert active_second_derivatives() == ()
