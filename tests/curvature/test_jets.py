"""Jets against autograd: every operation that they know, in a forward pass and differentiated in reverse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from curvature.operations import ACTIVATIONS, OPERATIONS
from twofold.curvature.jet_rules import NotCarriedError
from twofold.curvature.jets import Jets, carried

pytestmark = pytest.mark.usefixtures("float64")

FUNCTIONS = {
    **OPERATIONS,
    **{name: lambda a, b, phi=phi: phi(a * b) * a for name, phi in ACTIVATIONS.items()},
}


def jet_of(function, point, direction, *, graph=False, **options):
    """z0, z1 and z2 of function(point + e direction), zeros where they are constants."""
    leaves = {str(i): part.detach().clone().requires_grad_() for i, part in enumerate(point)}
    jets = Jets(graph=graph, **options)
    with carried(leaves, direction, jets):
        result = function(*leaves.values())
        jet = jets.of(result)
    if jet is None:
        jet = (result, None, None)
    return [torch.zeros_like(jet[0]) if part is None else part for part in jet], list(leaves.values())


def derivatives(function, point, direction, u):
    """<u, z1> and <u, z2>, by double backward in e alone."""
    e = torch.zeros((), requires_grad=True)
    s = (u * function(*(p.detach() + e * v for p, v in zip(point, direction, strict=True)))).sum()
    (first,) = torch.autograd.grad(s, e, create_graph=True)
    second = torch.autograd.grad(first, e)[0] if first.requires_grad else torch.zeros(())
    return first.detach(), second


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_every_operation_carries_first_and_second_derivatives(function):
    point, direction = drawn(0), drawn(1)
    (z0, z1, z2), _ = jet_of(function, point, direction)
    torch.testing.assert_close(z0.detach(), function(*point))
    u = torch.randn(z0.shape, generator=torch.Generator().manual_seed(2), dtype=z0.dtype)
    first, second = derivatives(function, point, direction, u)
    torch.testing.assert_close((u * z1).sum(), first, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((u * z2).sum(), second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_jets_on_a_graph_have_right_gradients(function):
    point, direction, way = drawn(0), drawn(1), drawn(3)
    (_, _, z2), leaves = jet_of(function, point, direction, graph=True)
    u = torch.randn(z2.shape, generator=torch.Generator().manual_seed(2), dtype=z2.dtype)
    found = torch.zeros(())
    if z2.requires_grad:
        gradients = torch.autograd.grad((u * z2).sum(), leaves, materialize_grads=True)
        found = sum((g * w).sum() for g, w in zip(gradients, way, strict=True))

    def slope(h):
        at = [[p + sign * h * w for p, w in zip(point, way, strict=True)] for sign in (1, -1)]
        up, down = (derivatives(function, p, direction, u)[1] for p in at)
        return (up - down) / (2 * h)

    torch.testing.assert_close(found, (4 * slope(1e-4) - slope(2e-4)) / 3, rtol=1e-7, atol=1e-7)


def test_hardsigmoid_has_a_jet_though_torch_has_no_double_backward():
    point, direction = drawn(0), drawn(1)
    found, _ = jet_of(lambda a, b: F.hardsigmoid(a * b * 3), point, direction)
    expected, _ = jet_of(lambda a, b: F.relu6(a * b * 3 + 3) / 6, point, direction)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_sources_of_activations_and_of_all_others_add_up(function):
    point, direction = drawn(0), drawn(1)
    (_, z1, z2), _ = jet_of(function, point, direction)
    (_, first, activation), _ = jet_of(function, point, direction, sources="activation")
    (_, _, rest), _ = jet_of(function, point, direction, sources="rest")
    torch.testing.assert_close(first, z1)
    torch.testing.assert_close(activation + rest, z2)


class Straight(torch.autograd.Function):
    """A custom function, which no override of torch sees."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def hooked(a, b):
    y = a * b
    y.register_hook(lambda g: 2 * g)
    return y


def through_a_view(a, b):
    h = a * b
    h[0].mul_(2)
    return h


def through_an_old_view(a, b):
    h = torch.zeros(3, 4)
    row = h[0]
    h.copy_(a * b)
    return row * 2


REFUSED = {
    "unknown": lambda a, b: torch.cdist(a * b, b),
    "custom function": lambda a, b: Straight.apply(a * b),
    "custom function inside": lambda a, b: Straight.apply(a * b).exp(),
    "hook": hooked,
    "view": through_a_view,
    "old view": through_an_old_view,
    "gradient": lambda a, b: torch.autograd.grad((a * b).sum(), b, create_graph=True)[0],
    "transform": lambda a, b: torch.func.vmap(lambda x: x * x)(a * b) * 1,
    "out": lambda a, b: torch.mul(a, b, out=torch.zeros(3, 4)),
}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_known_is_never_passed_over(function, graph):
    with pytest.raises(NotCarriedError):
        jet_of(function, drawn(0), drawn(1), graph=graph)


def test_the_same_dropout_mask_is_drawn_as_by_torch():
    point, direction = drawn(0), drawn(1)
    for dropout in (nn.Dropout(0.5), nn.Dropout1d(0.5), nn.Dropout(0.5, inplace=True)):
        torch.manual_seed(3)
        expected = dropout(point[0] * point[1])
        after = torch.get_rng_state()
        torch.manual_seed(3)
        (z0, z1, _), _ = jet_of(lambda a, b, dropout=dropout: dropout(a * b), point, direction)
        assert torch.equal(z0, expected)
        assert torch.equal(z1 == 0, expected == 0)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("of", ["gelu", "relu", "prelu"])
def test_a_stand_in_for_the_second_derivative_is_carried(of):
    point, direction, u = drawn(0), drawn(1), torch.ones(3, 4)
    function = {"gelu": F.gelu, "relu": nn.ReLU(inplace=True), "prelu": nn.PReLU()}[of]
    with twofold.second_derivative(twofold.gaussian(beta=2.0), of=of):
        (_, _, z2), _ = jet_of(lambda a, b: function(a * b), point, direction)
        _, second = derivatives(lambda a, b: function(a * b), point, direction, u)
    torch.testing.assert_close(z2.sum(), second)
