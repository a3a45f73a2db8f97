"""Selection of parameters, and the way between vectors and named tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models import Tied, mlp
from twofold import TwofoldError
from twofold.parameters import ParameterLayout, dot, norm, select_parameters


def test_patterns_choose_in_the_models_order():
    model = mlp(2, 3, 4, 1)
    assert list(select_parameters(model, ["4.*", "0.weight"])) == ["0.weight", "4.weight", "4.bias"]
    assert list(select_parameters(model)) == [name for name, _ in model.named_parameters()]


def test_either_name_of_a_tied_parameter_chooses_it_once():
    assert list(select_parameters(Tied(), ["head.weight", "embed.weight"])) == ["embed.weight"]


@pytest.mark.parametrize(
    ("params", "text"), [("nothing", "0.weight"), ([], "empty"), (["0.weight", 3], "int"), (["0.*", "x.*"], "'x.*'")]
)
def test_a_pattern_that_matches_nothing_is_refused(params, text):
    with pytest.raises(TwofoldError, match=text.replace("*", r"\*")):
        select_parameters(mlp(2, 3, 1), params)


def test_models_without_anything_to_choose_are_refused():
    with pytest.raises(TwofoldError, match="no parameter that requires a gradient"):
        select_parameters(nn.ReLU())
    with pytest.raises(TwofoldError, match="not initialised"):
        select_parameters(nn.LazyLinear(3))
    with pytest.raises(TwofoldError, match="complex64"):
        select_parameters(nn.Linear(2, 2, dtype=torch.complex64))


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5), st.integers(1, 3))
def test_vectors_and_names_are_inverse_to_each_other(shapes, k):
    tensors = {f"p{i}": torch.randn(shape, dtype=torch.float64) for i, shape in enumerate(shapes)}
    layout = ParameterLayout(tensors)
    vector = layout.flatten(tensors.values())
    assert vector.shape == (layout.size,)
    assert all(torch.equal(a, b) for a, b in zip(layout.unflatten(vector), tensors.values(), strict=True))
    reordered = dict(reversed(layout.as_dict(vector).items()))
    assert torch.equal(layout.from_dict(reordered), vector)
    columns = torch.randn(layout.size, k, dtype=torch.float64)
    assert torch.equal(torch.cat([p.reshape(-1, k) for p in layout.as_dict(columns).values()]), columns)


def test_mixed_precision_parameters_make_a_vector_of_the_widest():
    layout = ParameterLayout({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(3)})
    assert layout.dtype == torch.float32
    assert [t.dtype for t in layout.unflatten(torch.ones(5))] == [torch.bfloat16, torch.float32]


def test_norms_and_products_are_global():
    tensors = [torch.randn(3, 2), torch.randn(4)]
    flat = torch.cat([t.reshape(-1) for t in tensors])
    torch.testing.assert_close(norm(tensors), flat.norm())
    torch.testing.assert_close(dot(tensors, tensors), flat @ flat)
    big = [torch.full((4,), 300.0, dtype=torch.float16)]
    assert norm(big).item() == pytest.approx(600)


@pytest.mark.parametrize("shape", [(1 << 16,), ((1 << 16) + 1,), (1_000_003,), (1000, 1024), (16, 64, 33, 33)], ids=str)
def test_norms_and_products_of_long_tensors_are_exact_to_their_dtype(shape):
    """Numbers of one sign, whose partial sums only grow: where a single accumulator loses the most."""
    a, b = 1 + torch.rand(shape), 1 + torch.rand(shape)
    small = torch.rand(7)
    exact = [torch.cat([x.double().flatten(), small.double()]) for x in (a, b)]
    forms = [(a, b), (a.transpose(0, -1), b.transpose(0, -1))]
    if len(shape) == 4:
        forms.append((a.to(memory_format=torch.channels_last), b.to(memory_format=torch.channels_last)))
    for x, y in forms:
        assert norm([x, small]).dtype == dot([x, small], [y, small]).dtype == torch.float32
        assert norm([x, small]).item() == pytest.approx(exact[0].norm().item(), rel=3e-7)
        assert dot([x, small], [y, small]).item() == pytest.approx((exact[0] @ exact[1]).item(), rel=3e-7)


def test_norms_and_products_of_long_tensors_can_be_differentiated():
    a, b = torch.rand(70_001, requires_grad=True), torch.rand(70_001)
    (of_norm,) = torch.autograd.grad(norm([a]), a)
    torch.testing.assert_close(of_norm, a.detach() / a.detach().double().norm().float())
    (of_dot,) = torch.autograd.grad(dot([a, a], [a, b]), a)
    torch.testing.assert_close(of_dot, 2 * a.detach() + b)
