"""Every row of the table in every form of call: native values and first derivatives, then f in the place of phi''."""

import doctest
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from twofold.activations import BetaGELU, known, second_derivative
from twofold.activations.known import CALLABLES, SPELLINGS

SETTINGS = {"threshold": (0.1, -0.2), "leaky_relu": (0.3,), "beta_gelu": (4.0,), "rrelu": (0.1, 0.3, True)}


def f(x):
    return torch.sin(3 * x) + x


def call_label(func):
    return f"{getattr(func, '__module__', None) or type(func).__name__}.{func.__name__}"


FORMS = [
    pytest.param(name, func, id=label)
    for label, name, func in sorted(
        ((f"{name}-{call_label(func)}", name, func) for func, name in CALLABLES.items()), key=lambda form: form[0]
    )
]


def arguments(name, dtype):
    return (torch.tensor([0.3], dtype=dtype),) if name == "prelu" else SETTINGS.get(name, ())


def run(func, arguments, x0, upstream):
    """Apply func to a tensor; return output, the tensor then, gradient, gradient under create_graph; and the leaf."""
    torch.manual_seed(1)  # rrelu draws its slopes
    x = x0.clone().requires_grad_()
    h = x * 1
    y = func(h, *arguments)
    (plain,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
    (g,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    return y.detach(), h.detach(), plain, g, x


def assert_swapped(swapped, native, x0, upstream):
    *values, g, x = swapped
    for ours, theirs in zip(values[:2], native[:2], strict=True):
        assert same_bits(ours, theirs)
    for ours, theirs in zip((values[2], g), native[2:4], strict=True):  # a gradient of 0 has no sign of meaning
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    c = torch.linspace(-1, 2, x.numel()).to(x.dtype)
    (second,) = torch.autograd.grad(g, x, c)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 3e-2}[x.dtype]
    torch.testing.assert_close(second, upstream * c * f(x0), rtol=tolerance, atol=tolerance)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


def sample(dtype):
    special = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, 30.0, -30.0])
    return torch.cat([special, 2 * torch.randn(26)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "func"), FORMS)
def test_values_and_first_derivatives_are_native(name, func, dtype):
    x0, upstream = sample(dtype), torch.randn(37).to(dtype)
    settings = arguments(name, dtype)
    native = run(func, settings, x0, upstream)
    with second_derivative(f):
        swapped = run(func, settings, x0, upstream)
    assert_swapped(swapped, native, x0, upstream)


@pytest.mark.parametrize(("name", "func"), FORMS)
def test_others_are_left_alone(name, func):
    x0, upstream = sample(torch.float64), torch.randn(37, dtype=torch.float64)
    settings = arguments(name, torch.float64)
    native = run(func, settings, x0, upstream)
    with second_derivative(f, of=[other for other in SPELLINGS if other != name]):
        untouched = run(func, settings, x0, upstream)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(untouched[:4], native[:4], strict=True))
    assert type(untouched[3].grad_fn) is type(native[3].grad_fn)


MODULES = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True), nn.LeakyReLU(0.2),
    nn.LeakyReLU(0.2, inplace=True), nn.ELU(0.7), nn.ELU(0.7, inplace=True), nn.SELU(), nn.CELU(1.3), nn.GELU(),
    nn.GELU("tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Mish(), nn.Softplus(2.0, 5.0), nn.Sigmoid(), nn.LogSigmoid(),
    nn.Tanh(), nn.Tanhshrink(), nn.Softsign(), nn.Hardtanh(-2, 2), nn.Hardsigmoid(), nn.Hardswish(), nn.Softshrink(0.3),
    nn.Hardshrink(0.3), nn.Threshold(0.1, 0.2), nn.Threshold(0.1, 0.2, True), nn.PReLU(dtype=torch.float64),
    nn.RReLU(), nn.RReLU().eval(), nn.RReLU(inplace=True), BetaGELU(4.0),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_modules(module):
    x0, upstream = sample(torch.float64), torch.randn(37, dtype=torch.float64)
    native = run(module, (), x0, upstream)
    with second_derivative(f):
        swapped = run(module, (), x0, upstream)
    assert_swapped(swapped, native, x0, upstream)


@pytest.mark.parametrize("module", MODULES, ids=repr)
def test_modules_under_checkpoint(module):
    x0 = sample(torch.float64)

    def products(checkpointed, within):
        torch.manual_seed(1)
        x = x0.clone().requires_grad_()
        block = lambda x: module(module(x * 1.5).square()) * x
        context = second_derivative(f)
        with context:
            y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            if within:
                return backward(y, x)
        return backward(y, x)

    def backward(y, x):
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return [g.detach(), torch.autograd.grad(g.sin().sum(), x)[0]]

    for within in (False, True):
        for ours, plain in zip(products(True, within), products(False, within), strict=True):
            assert torch.equal(ours, plain)


def test_relu6_is_told_from_hardtanh():
    x = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    for name, seen, unseen in (("relu6", nn.ReLU6(), nn.Hardtanh()), ("hardtanh", nn.Hardtanh(0, 5), nn.ReLU6())):
        with second_derivative(5, of=name):
            for module, expected in ((seen, 5.0), (unseen, 0.0)):
                (g,) = torch.autograd.grad(module(x), x, create_graph=True)
                assert torch.autograd.grad(g, x)[0].item() == expected


def test_prelu_weight_keeps_its_derivatives():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    with second_derivative(f):
        y = F.prelu(x, w)
    gx, gw = torch.autograd.grad(y.sum(), (x, w), create_graph=True)
    assert torch.equal(gw, x.detach().clamp(max=0).sum().view(1))
    xx, xw = torch.autograd.grad(gx.sum(), (x, w), retain_graph=True)
    torch.testing.assert_close(xx, f(x.detach()))
    assert xw.item() == (x < 0).sum().item()
    assert torch.equal(torch.autograd.grad(gw.sum(), x)[0], (x < 0).double())


@pytest.mark.parametrize(
    "name", [name for name in SPELLINGS if hasattr(F, name) and name not in ("prelu", "threshold")]
)
def test_input_may_be_overwritten_where_torch_allows_it(name):
    def slope():
        x = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        h = x * 1
        y = getattr(F, name)(h)
        h.add_(1)
        return torch.autograd.grad(y.sum(), x)[0]

    try:
        native = slope()
    except RuntimeError:
        with second_derivative(0), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            slope()
    else:
        with second_derivative(0):
            assert torch.equal(slope(), native)


def test_every_row_names_calls():
    assert set(CALLABLES.values()) == set(SPELLINGS)
    assert known.FREE_SLOPE | known.OUTPUT_KEPT | set(known.BACKWARD) <= set(SPELLINGS)


@pytest.mark.parametrize("module", ["beta_gelu", "gaussian", "second_derivative"])
def test_docstrings_run(module):
    # `second_derivative` the class hides its module as an attribute of the package
    module = importlib.import_module(f"twofold.activations.{module}")
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed
