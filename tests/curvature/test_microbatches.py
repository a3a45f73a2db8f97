"""A batch that is run in pieces gives the matrices of the whole batch, or is refused."""

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import CASES, classification, conv_batchnorm, mlp
from references import dense, relative
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")

SPLIT = [
    "mlp",
    "ragged",
    "conv BatchNorm eval",
    "LayerNorm and attention",
    "LSTM",
    "ignore_index",
    "class weights and smoothing",
    "soft targets",
    "segmentation",
    "sum",
    "MSE",
    "custom loss",
    "forward=",
    "checkpoint",
]


@pytest.mark.parametrize("count", [2, 3, 100])
@pytest.mark.parametrize("name", SPLIT)
def test_pieces_equal_the_whole_batch(name, count):
    case = CASES[name]()
    reference = dense(case.model, case.loss_fn, case.batches, case.counts, forward=case.forward)
    data = case.batches if len(case.batches) > 1 else case.batches[0]
    c = twofold.Curvature(case.model, case.loss_fn, data, forward=case.forward, microbatches=count, memory=0)
    h, g, n = c.products(torch.eye(c.hessian.shape[0]))
    for found, part in ((h, "hessian"), (g, "gauss_newton"), (n, "nme")):
        assert relative(found, getattr(reference, part)) < 1e-9
    whole = twofold.Curvature(case.model, case.loss_fn, data, forward=case.forward)
    assert c.loss() == pytest.approx(whole.loss(), rel=1e-12)
    assert relative(c.gradient(), whole.gradient()) < 1e-12


def test_batches_of_any_form_are_split():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(4, 5, 3)

        def forward(self, left, right, scale=1.0):
            return self.body(left + scale * right)

    model, a, b, y = Add(), torch.randn(7, 4), torch.randn(7, 4), torch.randint(3, (7,))
    expected = twofold.Hessian(model, F.cross_entropy, ((a, b), y)).to_dense()
    named = {"left": a, "right": b}
    for batch in (
        ((a, b), y),
        ((a, b, 1.0), y),
        (named, y),
        (UserDict(named), y),
        {**named, "labels": y},
        UserDict({**named, "labels": y, "scale": 1.0}),
    ):
        found = twofold.Hessian(model, F.cross_entropy, batch, microbatches=3).to_dense()
        assert relative(found, expected) < 1e-12


def test_pieces_take_the_memory_of_a_piece():
    """Held at once: the graphs of two pieces, not of all."""
    alive, most = set(), 0

    class Watching(nn.Linear):
        def forward(self, x):
            nonlocal most
            z = super().forward(x)
            token = object()
            if z.requires_grad:
                alive.add(token)
                most = max(most, len(alive))
                z.grad_fn.metadata["token"] = Token(lambda: alive.discard(token))
            return z

    class Token:
        def __init__(self, gone):
            self.gone = gone

        def __del__(self):
            self.gone()

    case = classification(nn.Sequential(Watching(4, 3)), n=12, sizes=(12,))
    c = twofold.Curvature(case.model, case.loss_fn, case.batches[0], microbatches=6, memory=0)
    for _ in range(2):
        c.gradient()
    assert most == 2


def test_train_mode_batchnorm_is_refused_by_name_and_eval_mode_is_not():
    case = classification(conv_batchnorm(), (1, 2, 2))
    c = twofold.Curvature(case.model, case.loss_fn, case.batches[0], microbatches=2)
    with pytest.raises(TwofoldError, match=r"microbatches=2 would change the loss: module '1' \(BatchNorm2d\)"):
        c.gradient()
    options = {"mode": "eval", "microbatches": 2}
    whole = twofold.Curvature(case.model, case.loss_fn, case.batches[0], mode="eval").gradient()
    found = twofold.Curvature(case.model, case.loss_fn, case.batches[0], **options).gradient()
    assert relative(found, whole) < 1e-12
    unseen = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)).eval()
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(TwofoldError, match=r"module '1' \(BatchNorm1d\)"):
        twofold.Curvature(unseen, F.cross_entropy, (x, y), microbatches=2).gradient()


class Centred(nn.Module):
    """Mixes the examples of a batch without a module that says so."""

    def forward(self, x):
        return x - x.mean(0)


def test_other_losses_that_splitting_changes_are_refused():
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    model = nn.Sequential(nn.Linear(4, 5), Centred(), nn.Linear(5, 3))
    with pytest.raises(TwofoldError, match="loss of the first batch is"):
        twofold.Curvature(model, F.cross_entropy, (x, y), microbatches=2).gradient()

    def contrastive(z, y):
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    with pytest.raises(TwofoldError, match="weight="):
        twofold.Curvature(mlp(4, 5, 3), contrastive, (x, y), microbatches=2).gradient()

    def total(z, y):
        return F.cross_entropy(z, y, reduction="sum")

    with pytest.raises(TwofoldError, match="weight="):
        twofold.Curvature(mlp(4, 5, 3), total, (x, y), microbatches=2).gradient()


def test_dropout_draws_for_each_piece_and_repeats_itself():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 3))
    case = classification(model)
    c = twofold.Curvature(model, case.loss_fn, case.batches[0], microbatches=5, memory=0)
    assert torch.equal(c.gradient(), c.gradient())
    c.check_determinism()


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "2"])
def test_a_count_that_makes_no_sense_is_refused(count):
    case = classification(mlp(4, 5, 3))
    with pytest.raises(TwofoldError, match="microbatches must be a positive integer"):
        twofold.Hessian(case.model, case.loss_fn, case.batches[0], microbatches=count)


def test_tensors_of_other_lengths_are_told():
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3))
    with pytest.raises(TwofoldError, match="splits every tensor of the batch"):
        twofold.Hessian(
            model, F.cross_entropy, (torch.randn(3, 2, 4), torch.randint(3, (6,))), microbatches=2
        ).to_dense()
