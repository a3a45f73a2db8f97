"""The context together with the rest of torch: transforms, checkpoints, autocast, compiled models."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from activations.derivatives import dense_hessian, flat_grad, second
from twofold.activations import gaussian, second_derivative
from twofold.activations.functions import Call, activation, autocast_of
from twofold.activations.second_derivative import active_second_derivatives
from twofold.errors import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")


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


def test_slope_is_cast_as_the_value_was():
    def phi(x):  # elementwise by an operation that autocast casts
        return torch.tanh(x.unsqueeze(-1) @ torch.full((1, 1), 1.3, dtype=x.dtype)).squeeze(-1)

    x = torch.randn(5, dtype=torch.float32, requires_grad=True)
    call = lambda: Call(phi, (), {}, False, torch.cos, None, autocast_of(x))
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_native = activation(x, call()), phi(x)
    plain, plain_native = activation(x, call()), phi(x)
    for ours, native in ((cast, cast_native), (plain, plain_native)):
        assert torch.equal(ours, native)
        (theirs,) = torch.autograd.grad(native.sum(), x, retain_graph=True)
        assert torch.equal(torch.autograd.grad(ours.sum(), x, retain_graph=True)[0], theirs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(torch.autograd.grad(ours.sum(), x)[0], theirs)
    assert cast.dtype == torch.bfloat16


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
