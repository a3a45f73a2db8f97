import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from twofold.activations import BetaGELU, beta_gelu, gaussian
from twofold.errors import TwofoldError


def derivative(f, x, order):
    x = x.clone().requires_grad_()
    y = f(x)
    for _ in range(order):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y.detach()


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.05, 50.0))
def test_value_and_derivatives_are_those_of_the_formula(beta):
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    Phi = 0.5 * torch.erfc(-beta * x / math.sqrt(2))
    n = torch.exp(-0.5 * (beta * x) ** 2) / math.sqrt(2 * math.pi)
    f = lambda x: beta_gelu(x, beta)
    torch.testing.assert_close(f(x), x * Phi, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(derivative(f, x, 1), Phi + beta * x * n, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(derivative(f, x, 2), beta * n * (2 - (beta * x) ** 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_beta_one_is_gelu_bit_for_bit(dtype):
    x = torch.randn(257).mul(3).to(dtype)
    for order in range(3):
        assert torch.equal(derivative(beta_gelu, x, order), derivative(F.gelu, x, order))
    assert torch.equal(BetaGELU()(x), F.gelu(x))


def test_large_beta_is_relu_also_in_half_precision():
    x = torch.tensor([-300.0, -1.0, 0.0, 1.0, 300.0])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(beta_gelu(x.to(dtype), 1e6), x.to(dtype).relu())


def test_an_override_sees_one_operation():
    class Recorder(TorchFunctionMode):
        seen = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += ((func, args[1:], kwargs),)
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Recorder() as recorder:
        BetaGELU(4.0)(x)
    assert recorder.seen == ((beta_gelu, (), {"beta": 4.0}),)


@pytest.mark.parametrize("beta", [0, -1.0, math.nan, math.inf, "4", None, True])
def test_beta_that_is_no_positive_number_is_refused(beta):
    for make in (BetaGELU, gaussian, lambda b: beta_gelu(torch.ones(2), b)):
        with pytest.raises(TwofoldError, match="finite beta > 0"):
            make(beta)


def test_module_shows_and_keeps_its_beta():
    module = BetaGELU(beta=4)
    assert repr(module) == "BetaGELU(beta=4.0)"
    assert pickle.loads(pickle.dumps(module)).beta == copy.deepcopy(module).beta == 4.0
    assert not list(module.parameters())


def test_gaussian_is_the_normal_density_and_a_value():
    x = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    for beta in (8.0, 100.0):
        density = torch.exp(-((beta * x) ** 2) / 2) / math.sqrt(2 * math.pi / beta**2)
        torch.testing.assert_close(gaussian(beta)(x), density, rtol=1e-12, atol=1e-15)
        assert abs(torch.trapezoid(gaussian(beta)(x), x).item() - 1) < 1e-12
    assert repr(gaussian(100)) == "gaussian(beta=100.0)"
    assert gaussian(2) == gaussian(2.0) != gaussian(3)
    assert hash(gaussian(2)) == hash(gaussian(2.0))
    assert pickle.loads(pickle.dumps(gaussian(2))) == gaussian(2)
    with pytest.raises(AttributeError):
        gaussian(2).beta = 3
