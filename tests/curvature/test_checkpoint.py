"""Segments under torch.utils.checkpoint are recomputed as they were recorded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import twofold
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")


class Segmented(nn.Module):
    def __init__(self, segment, checkpointed=True):
        super().__init__()
        self.a, self.segment, self.b, self.checkpointed = nn.Linear(4, 6), segment, nn.Linear(6, 3), checkpointed

    def forward(self, x):
        h = self.a(x)
        h = checkpoint(self.segment, h, use_reentrant=False) if self.checkpointed else self.segment(h)
        return self.b(h if h.dim() == 2 else h.mean(1))


def unsegmented(model):
    twin = copy.deepcopy(model)
    twin.checkpointed = False
    return twin


SEGMENTS = {
    "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.GELU()),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU()),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 6)),
}


@pytest.mark.parametrize("mode", [None, "train", "eval"])
@pytest.mark.parametrize("segment", SEGMENTS)
def test_a_checkpoint_changes_no_product(segment, mode):
    model, batch = Segmented(SEGMENTS[segment]()), (torch.randn(8, 4), torch.randint(3, (8,)))
    buffers = [b.clone() for b in model.buffers()]
    c = twofold.Curvature(model, F.cross_entropy, batch, mode=mode)
    plain = twofold.Curvature(unsegmented(model), F.cross_entropy, batch, mode=mode)
    v = torch.randn(c.layout.size)
    for a, b in zip(c.products(v), plain.products(v), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(c.hessian @ v, plain.hessian @ v)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert model.training


@pytest.mark.parametrize("training", [True, False])
def test_stock_attention_in_a_checkpoint(training):
    model = Segmented(nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True, activation="gelu")).train(training)
    batch = (torch.randn(4, 3, 4), torch.randint(3, (4,)))
    c = twofold.Curvature(model, F.cross_entropy, batch)
    plain = twofold.Curvature(unsegmented(model), F.cross_entropy, batch)
    v = torch.randn(c.layout.size)
    for a, b in zip(c.products(v), plain.products(v), strict=True):
        torch.testing.assert_close(a, b)


def test_penalties_move_running_statistics_once_through_a_checkpoint():
    model, batch = Segmented(SEGMENTS["BatchNorm"]()), (torch.randn(8, 4), torch.randint(3, (8,)))
    twin = unsegmented(model)
    for net in (model, twin):
        twofold.GradientPenalty(rho=0.1).backward(net, F.cross_entropy, batch)
    assert int(model.segment[1].num_batches_tracked) == 1
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_what_cannot_be_repaired_in_a_checkpoint_is_refused():
    segment = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    batch = (torch.randn(8, 4), torch.randint(3, (8,)))
    with pytest.raises(TwofoldError, match="weight norm"):
        twofold.Curvature(Segmented(segment), F.cross_entropy, batch).gradient()
    with pytest.raises(TwofoldError, match="difference"):
        twofold.HessianTrace(strength=1e-3).backward(Segmented(SEGMENTS["BatchNorm"]()), F.cross_entropy, batch)
