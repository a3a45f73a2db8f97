"""Batches and parameters in unusual forms, and embeddings that no regularizer can train through."""

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import mlp
from twofold import TwofoldError


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(4, 5, 3)

    def forward(self, x):
        return self.body(x)


def test_mappings_of_any_class_are_split():
    model, x, y = ByName(), torch.randn(6, 4), torch.randint(3, (6,))
    gradients = []
    for batch in ({"x": x, "labels": y}, UserDict({"x": x, "labels": y})):
        model.zero_grad()
        twofold.SAM(rho=0.1, microbatches=2).backward(model, F.cross_entropy, batch)
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_patterns_from_a_generator_last():
    model, batch = mlp(4, 5, 3), (torch.randn(6, 4), torch.randint(3, (6,)))
    regularizer = twofold.SAM(rho=0.1, params=(name for name in ["*.weight"]))
    for _ in range(2):
        regularizer.backward(model, F.cross_entropy, batch)
    assert regularizer.params == ("*.weight",)


@pytest.mark.parametrize(
    "regularizer",
    [
        twofold.SAM(),
        twofold.GradientPenalty(),
        twofold.HessianTrace(strength=1.0),
        twofold.GaussNewtonTrace(strength=1.0),
    ],
    ids=lambda regularizer: type(regularizer).__name__,
)
def test_sparse_embeddings_are_refused_by_name(regularizer):
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(TwofoldError, match="sparse=False"):
        regularizer.backward(model, F.cross_entropy, (torch.randint(7, (5, 2)), torch.randint(3, (5,))))
    assert all(p.grad is None for p in model.parameters())
