"""Activations that keep their derivatives are torch's, in values to the bit and in derivatives to rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

import twofold
from twofold.curvature.differentiable import Frugal

CALLS = {
    "celu": lambda x: F.celu(x, alpha=0.7),
    "elu": lambda x: F.elu(x, 1.3),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "selu": torch.selu,
    "silu": F.silu,
    "softplus": lambda x: F.softplus(x, beta=2.0),
    "softsign": F.softsign,
    "beta_gelu": lambda x: twofold.beta_gelu(x, 3.0),
}


def recorded(phi, x):
    with Frugal():
        return phi(x)


@pytest.mark.parametrize("name", CALLS)
def test_values_and_derivatives_are_torchs(name):
    phi, x = CALLS[name], torch.linspace(-3, 3, 24, dtype=torch.float64).view(2, 12)
    g, c = torch.randn(2, *x.shape, dtype=torch.float64)
    found = []
    for function in (phi, lambda x: recorded(phi, x)):
        at, of = x.clone().requires_grad_(), g.clone().requires_grad_()
        y = function(at)
        (s,) = torch.autograd.grad(y, at, of, create_graph=True)
        both = [torch.autograd.grad(s, [at, of], c, retain_graph=True) for _ in range(2)]
        apart = [torch.autograd.grad(s, wanted, c, retain_graph=True)[0] for wanted in (at, of)]
        assert type(y.grad_fn).__name__ == "_ActivationBackward" or function is phi
        found.append((y, s, torch.autograd.grad(y, at, c)[0], *both[0], *both[1], *apart))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


def test_the_input_is_let_go_once_the_derivatives_are_there():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    h = 2 * x
    memory = StorageWeakRef(h.untyped_storage())
    y = recorded(F.gelu, h)
    (s,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    del h, y
    assert not memory.expired()
    found = [torch.autograd.grad(s.sum(), x, retain_graph=True)[0] for _ in range(2)]
    assert memory.expired()
    assert torch.equal(*found)
    at = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(2 * at).sum(), at, create_graph=True)
    torch.testing.assert_close(found[0], torch.autograd.grad(expected.sum(), at)[0])


def test_an_input_that_is_overwritten_is_refused_as_by_torch():
    x = torch.randn(5, requires_grad=True)
    for phi in (F.gelu, lambda h: recorded(F.gelu, h)):
        h = 2 * x
        y = phi(h)
        h.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_third_derivative_is_refused():
    x = torch.randn(3, requires_grad=True)
    (s,) = torch.autograd.grad(recorded(F.gelu, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="third time"):
        torch.autograd.grad(s.sum(), x, create_graph=True)


def test_what_torch_may_overwrite_or_round_is_left_to_torch():
    x = torch.randn(3, requires_grad=True)
    for y in (
        recorded(lambda x: F.silu(x.clone(), inplace=True), x),
        recorded(torch.tanh, x),
        recorded(F.gelu, x.bfloat16()),
        recorded(F.gelu, x.detach()),
    ):
        assert type(y.grad_fn).__name__ != "_ActivationBackward"


def test_stand_ins_for_the_second_derivative_are_kept_alike():
    x = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
    with twofold.second_derivative(lambda x: x.cos()):
        y = recorded(F.gelu, x)
    (s,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(s.sum(), x)[0], x.detach().cos())
