import copy

import pytest
import torch
from torch import nn

from twofold.curvature.primitives import check_differentiable_thrice, differentiable_thrice

NORMS = {
    "layer": (nn.LayerNorm((3, 4)), (5, 3, 4)),
    "layer without affine": (nn.LayerNorm(4, elementwise_affine=False), (5, 3, 4)),
    "batch 1d": (nn.BatchNorm1d(3), (5, 3)),
    "batch 2d, cumulative": (nn.BatchNorm2d(3, momentum=None), (5, 3, 2, 2)),
    "batch without statistics": (nn.BatchNorm1d(3, track_running_stats=False), (5, 3, 4)),
    "batch in eval mode": (nn.BatchNorm1d(3).eval(), (5, 3)),
    "instance": (nn.InstanceNorm1d(3, affine=True), (5, 3, 4)),
    "instance with statistics": (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (5, 3, 2, 2)),
    "instance in eval mode": (nn.InstanceNorm1d(3, track_running_stats=True).eval(), (5, 3, 4)),
}


@pytest.mark.parametrize(("norm", "shape"), NORMS.values(), ids=NORMS.keys())
def test_composed_norms_agree_with_the_native_ones(norm, shape):
    native = copy.deepcopy(norm).double()
    for p in native.parameters():
        nn.init.normal_(p)
    composed = copy.deepcopy(native)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    u = torch.randn(shape, dtype=torch.float64)
    expected = native(x)
    with differentiable_thrice(composed):
        found = composed(x)
    check_differentiable_thrice([found])
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(y, [x, *m.parameters()], u) for y, m in ((found, composed), (expected, native))]
    torch.testing.assert_close(*slopes)
    for one, other in zip(composed.buffers(), native.buffers(), strict=True):
        assert torch.equal(one, other)
