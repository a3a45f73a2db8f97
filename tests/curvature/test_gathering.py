"""Gradients that are gathered are those that torch returns, and hold no memory beside the vector."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import CASES
from twofold.curvature.gathering import Gathering
from twofold.parameters import ParameterLayout


def leaves_of(shapes, dtypes):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape, dtype in zip(shapes, dtypes, strict=True)]


def layout_of(leaves):
    return ParameterLayout({str(at): leaf for at, leaf in enumerate(leaves)})


@pytest.mark.parametrize("widest", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", [[(3, 4), (5,), (2, 2)], [(1,), (40, 3), ()], [(2,), (2,), (2,)]], ids=str)
def test_the_vector_is_that_of_the_gradients(shapes, widest):
    """Two passes, of several leaves of which one is not reached and one twice."""
    leaves = leaves_of(shapes, [torch.float32, widest, torch.float32])
    layout = layout_of(leaves)
    with Gathering(leaves, layout) as gathering:
        for factor in (1.0, -2.0):
            y = factor * (leaves[0].sin().sum() + leaves[1].square().sum() * leaves[0].sum())
            expected = torch.autograd.grad(y, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            gathering.vector(expected)  # forgotten
            found = torch.autograd.grad(y, leaves, allow_unused=True, materialize_grads=True)
            vector = gathering.vector(found)
            assert vector.dtype == widest
            exact = [torch.cos(leaves[0]) + leaves[1].square().sum(), 2 * leaves[1] * leaves[0].sum()]
            exact = layout.flatten([factor * exact[0], factor * exact[1], torch.zeros_like(leaves[2])])
            torch.testing.assert_close(vector, exact)
            assert all(one.untyped_storage().nbytes() <= 8 for one in found[:2])
    assert not any(leaf._backward_hooks for leaf in leaves)


def test_a_pass_whose_graph_is_wanted_is_left_alone():
    leaves = leaves_of([(3,)], [torch.float64])
    with Gathering(leaves, layout_of(leaves)) as gathering:
        (slope,) = torch.autograd.grad(leaves[0].pow(3).sum(), leaves, create_graph=True)
        torch.testing.assert_close(slope, 3 * leaves[0] ** 2)
        bend = gathering.vector(torch.autograd.grad(slope.sum(), leaves))
    torch.testing.assert_close(bend, 6 * leaves[0].detach())


def test_hooks_go_when_a_pass_fails():
    leaves = leaves_of([(3,)], [torch.float32])
    with pytest.raises(RuntimeError), Gathering(leaves, layout_of(leaves)):
        torch.autograd.grad(torch.ones(()), leaves)
    assert not leaves[0]._backward_hooks


@pytest.mark.parametrize("name", ["mlp", "tied", "ragged", "checkpoint", "sum"])
def test_vectors_together_are_those_alone(name, float64):
    """One vector takes its memory as the result, several are copied into it."""
    case = CASES[name]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches if len(case.batches) > 1 else case.batches[0])
    vectors = torch.randn(c.layout.size, 3)
    together = c.products(vectors)
    for k in range(3):
        for alone, all_of_it in zip(c.products(vectors[:, k]), together, strict=True):
            torch.testing.assert_close(alone, all_of_it[:, k], rtol=1e-12, atol=1e-14)


def test_results_do_not_share_memory():
    model, batch = nn.Linear(4, 3), (torch.randn(5, 4), torch.randint(3, (5,)))
    c = twofold.Curvature(model, F.cross_entropy, batch)
    first, second = c.gauss_newton @ torch.ones(15), c.gauss_newton @ torch.ones(15)
    kept = first.clone()
    second.zero_()
    assert torch.equal(first, kept)
    assert first.untyped_storage().nbytes() == 15 * 4
