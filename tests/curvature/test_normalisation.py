"""Norms in closed form are torch's in value, and the written-out formula's in all derivatives."""

import pytest
import torch
import torch.nn.functional as F

from twofold.curvature.differentiable import Frugal


def written_out(x, w, b, dims, statistics=None, eps=1e-2):
    of_group = [1 if axis in dims else size for axis, size in enumerate(x.shape)]
    m, v = (x.mean(dims), x.var(dims, unbiased=False)) if statistics is None else statistics
    y = (x - m.view(of_group)) / (v.view(of_group) + eps).sqrt()
    y = y if w is None else y * w.view(of_group)
    return y if b is None else y + b.view(of_group)


def derivatives(norm, x, w, b):
    """The value, the adjoint along g, and the derivatives of each part of the adjoint, alone and together."""
    inputs = [None if t is None else t.clone().requires_grad_() for t in (x, w, b)]
    known = [t for t in inputs if t is not None]
    y = norm(*inputs)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(y.shape, dtype=y.dtype, generator=generator).requires_grad_()
    first = torch.autograd.grad(y, known, g, create_graph=True)
    found = [y, *first, *torch.autograd.grad(y, known, g, retain_graph=True)]
    along = [torch.randn(t.shape, dtype=y.dtype, generator=generator) for t in first]
    choices = [(first, along), *[((t,), (c,)) for t, c in zip(first, along, strict=True)]]
    for of in ([*known, g], [known[0]], [g]):
        for curved, c in choices:
            found += torch.autograd.grad(curved, of, c, retain_graph=True, allow_unused=True, materialize_grads=True)
    return found


def recorded(function):
    def norm(*inputs):
        with Frugal():
            y = function(*inputs)
        assert type(y.grad_fn).__name__ == "_NormaliseBackward"
        return y

    return norm


def affine(size, weight, bias):
    w = torch.randn(size, dtype=torch.float64) if weight else None
    if w is not None:
        w.view(-1)[1] = 0.0  # as residual networks begin
    return w, torch.randn(size, dtype=torch.float64) if bias else None


PARAMETERS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 2, 2)])
def test_batch_norm(shape, parameters, training):
    x, (w, b) = torch.randn(shape, dtype=torch.float64), affine(3, *parameters)
    running = torch.randn(3).double(), torch.rand(3).double() + 0.1
    dims = [axis for axis in range(x.dim()) if axis != 1]
    moved = [t.clone() for t in running]
    ours = derivatives(recorded(lambda x, w, b: F.batch_norm(x, *moved, w, b, training, 0.1, 1e-2)), x, w, b)
    statistics = None if training else running
    expected = derivatives(lambda x, w, b: written_out(x, w, b, dims, statistics), x, w, b)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(ours[0], F.batch_norm(x, *running, w, b, training, 0.1, 1e-2))
    assert all(map(torch.equal, moved, running))


def test_batches_that_lie_channels_last():
    x, (w, b) = torch.randn(4, 3, 5, 2, dtype=torch.float64), affine(3, True, True)
    ours = derivatives(
        recorded(lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 1e-2)),
        x.contiguous(memory_format=torch.channels_last),
        w,
        b,
    )
    torch.testing.assert_close(ours, derivatives(lambda x, w, b: written_out(x, w, b, [0, 2, 3]), x, w, b))


def test_inputs_that_need_no_gradient():
    x, (w, b) = torch.randn(6, 3, dtype=torch.float64), affine(3, True, True)
    ours = derivatives(recorded(lambda w, b, _: F.batch_norm(x, None, None, w, b, True, 0.1, 1e-2)), w, b, None)
    torch.testing.assert_close(ours, derivatives(lambda w, b, _: written_out(x, w, b, [0]), w, b, None))


def test_a_third_derivative_is_refused():
    x = torch.randn(5, 3, requires_grad=True)
    y = recorded(lambda x: F.batch_norm(x, None, None, training=True))(x)
    (s,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="third time"):
        torch.autograd.grad(s.sum(), x, create_graph=True)


def test_half_precision_and_what_torch_refuses_are_left_to_torch():
    with Frugal():
        y = F.batch_norm(torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True), None, None, training=True)
        assert type(y.grad_fn).__name__ != "_NormaliseBackward"
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            F.batch_norm(torch.randn(1, 3, requires_grad=True), None, None, training=True)
