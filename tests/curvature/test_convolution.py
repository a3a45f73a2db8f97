"""The convolution with a frugal double backward is torch's, in values and gradients of input and weight to the bit."""

import pytest
import torch
import torch.nn.functional as F

import twofold
from twofold.curvature.convolution import CONVOLUTIONS

CALLS = [
    (F.conv1d, (2, 4, 7), (6, 2, 3), {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}),
    (F.conv2d, (2, 4, 6, 5), (6, 4, 3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    (F.conv2d, (2, 4, 6, 5), (6, 4, 3, 2), {"padding": "same"}),
    (F.conv2d, (4, 6, 5), (6, 4, 3, 2), {}),
    (F.conv3d, (2, 1, 4, 4, 4), (2, 1, 2, 2, 2), {"padding": [1, 0, 1]}),
    (F.conv_transpose1d, (2, 4, 5), (4, 3, 3), {"stride": 2, "output_padding": 1, "dilation": 2}),
    (F.conv_transpose2d, (2, 4, 5, 5), (4, 3, 3, 3), {"stride": (2,), "padding": 1, "groups": 2}),
]


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("native", "x", "w", "options"), CALLS)
def test_values_and_gradients_are_torchs_to_the_bit(native, x, w, options, bias):
    x, w = torch.randn(x, requires_grad=True), torch.randn(w, requires_grad=True)
    channels = native(x, w, **options).shape[1 if x.dim() == w.dim() else 0]
    b = torch.randn(channels, requires_grad=True) if bias else None
    inputs = [t for t in (x, w, b) if t is not None]
    expected, found = native(x, w, b, **options), CONVOLUTIONS[native](x, w, b, **options)
    assert torch.equal(found, expected)
    g = torch.randn_like(expected)
    for wanted in ([x], [w], [x, w]):
        pairs = zip(*[torch.autograd.grad(y, wanted, g, retain_graph=True) for y in (found, expected)], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    ours, torchs = ([*torch.autograd.grad(y, inputs, g)] for y in (found, expected))
    torch.testing.assert_close(ours[2:], torchs[2:])


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize(("native", "x", "w", "options"), CALLS)
def test_second_derivatives_are_right_for_every_choice_of_inputs(native, x, w, options):
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (x, w))
    ours = CONVOLUTIONS[native]
    assert torch.autograd.gradgradcheck(lambda a, b: ours(a, b, **options), (x, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda b: ours(x.detach(), b, **options).square(), w, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda a: ours(a, w.detach(), **options).square(), x, fast_mode=True)


def test_models_that_transform_their_convolutions_are_measured():
    class Mapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = torch.nn.Conv1d(1, 1, 3, padding=1), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.vmap(lambda row: self.conv(row.view(1, 1, 4)).view(4))(torch.tanh(x)))

    model, batch = Mapped().double(), (torch.randn(5, 4).double(), torch.randint(3, (5,)))
    plain = torch.nn.Sequential(
        torch.nn.Tanh(), torch.nn.Unflatten(1, (1, 4)), model.conv, torch.nn.Flatten(), model.head
    )
    expected = twofold.Hessian(plain, F.cross_entropy, batch).to_dense()
    torch.testing.assert_close(twofold.Hessian(model, F.cross_entropy, batch).to_dense(), expected)


def test_penalties_run_convolutions_under_autocast_as_torch_does():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 16), torch.nn.Unflatten(1, (1, 4, 4)), torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten()
    )
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = twofold.GradientPenalty().backward(model, F.cross_entropy, (x, y))
        assert torch.equal(loss, F.cross_entropy(model(x), y))
