"""Products as compiled programs: the numbers of recordings, and a word where that cannot be done."""

import warnings

import pytest
import torch
from torch import nn

import twofold
from twofold.errors import TwofoldError, TwofoldWarning


class ByValue(nn.Module):
    """Normalises by how many inputs are positive, which a program would take for a constant."""

    def forward(self, x):
        return x / (1 + x[x.detach() > 0].shape[0])


def net(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.Linear(8, 3)).double()


def batches(sizes=(6, 6, 4)):
    return [(torch.randn(size, 5).double(), torch.randint(3, (size,))) for size in sizes]


def test_programs_give_what_recordings_give_and_leave_nothing_behind():
    model, data = net(nn.GELU(), nn.LayerNorm(8), nn.Dropout(0.5)).eval(), batches()
    data[1][1][:4] = -100
    recorded, compiled = (twofold.Curvature(model, nn.CrossEntropyLoss(), data, compile=c) for c in (False, True))
    vectors = torch.randn(recorded.hessian.shape[0], 2).double()
    before, rng = [p.clone() for p in model.parameters()], torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TwofoldWarning)
        found = compiled.products(vectors)
    for ours, truth in zip(found, recorded.products(vectors), strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert not compiled._products.recordings.kept
    with torch.no_grad():
        model[0].weight.mul_(1.5)  # a program belongs to its weights
    for ours, truth in zip(compiled.products(vectors), recorded.products(vectors), strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


def test_a_loss_that_is_not_finite_is_refused_by_its_batch():
    model, data = net(nn.Tanh()), batches((6, 6))
    data[1][0][0, 0] = torch.nan
    curvature = twofold.Curvature(model, nn.CrossEntropyLoss(), data, compile=True)
    with pytest.raises(TwofoldError, match="batch 1"):
        curvature.products(torch.randn(curvature.hessian.shape[0]).double())


@pytest.mark.parametrize(
    ("middle", "reason"),
    [(nn.Dropout(0.5), "random numbers"), (ByValue(), "depends on values")],
    ids=["random draws", "shapes by value"],
)
def test_what_cannot_be_compiled_is_recorded_and_says_so(middle, reason):
    model, data = net(nn.Tanh(), middle), batches()
    recorded, compiled = (twofold.Curvature(model, nn.CrossEntropyLoss(), data, compile=c) for c in (False, True))
    vector = torch.randn(recorded.hessian.shape[0]).double()
    with pytest.warns(TwofoldWarning, match=reason):
        found = compiled.hessian @ vector
    if reason != "random numbers":  # each draws its masks when it is made
        torch.testing.assert_close(found, recorded.hessian @ vector)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TwofoldWarning)
        assert torch.equal(compiled.hessian @ vector, found)  # said once


def test_compile_is_a_flag():
    with pytest.raises(TwofoldError, match="compile"):
        twofold.Hessian(net(nn.Tanh()), nn.CrossEntropyLoss(), batches(), compile="yes")
