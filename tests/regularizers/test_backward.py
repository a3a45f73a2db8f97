"""The contract of Regularizer.backward where it does not depend on the algorithm."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from regularizers.rows import flat
from twofold.curvature.operators import Hessian
from twofold.errors import TwofoldError
from twofold.regularizers import SAM, GradientPenalty, HessianTrace, Regularizer, WeightNoise


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))


BATCH = (torch.randn(6, 3), torch.randint(3, (6,)))


@pytest.mark.parametrize("regularizer", [SAM(), GradientPenalty()])
def test_batches_of_every_form(model, regularizer):
    x, y = BATCH
    regularizer.backward(model, F.cross_entropy, BATCH)
    expected = flat(model)
    forms = [
        ([x, y], None),
        (((x,), y), None),
        ({"input": x, "labels": y}, None),
        ({"a": x, "b": y}, lambda m, batch: (m(batch["a"]), batch["b"])),
    ]
    for batch, forward in forms:
        model.zero_grad()
        regularizer.backward(model, F.cross_entropy, batch, forward=forward)
        assert torch.equal(flat(model), expected)
        split = type(regularizer)(microbatches=2)
        split.backward(model, F.cross_entropy, batch, forward=forward)


def test_two_weights_may_not_share_a_gradient():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(3)) for _ in range(3))

        def forward(self, x):
            return self.a + self.b + self.c.expand(2, 3)

    model = Sum()
    SAM(rho=0.0).backward(model, lambda z, y: z.sum(), BATCH)
    assert model.a.grad.data_ptr() != model.b.grad.data_ptr()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert flat(model).norm() == pytest.approx(0.1, rel=1e-4)


def test_ddp_is_looked_through_in_one_process(model):
    SAM().backward(model, F.cross_entropy, BATCH)
    expected = flat(model)
    model.zero_grad()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        SAM().backward(wrapped, F.cross_entropy, BATCH)
        assert torch.equal(flat(model), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_and_scripted_models_are_refused(model):
    class FSDPModule(nn.Linear):
        pass

    with pytest.raises(TwofoldError, match="FSDP"):
        SAM().backward(FSDPModule(3, 3), F.cross_entropy, BATCH)
    with pytest.raises(TwofoldError, match=r"torch\.jit"):
        SAM().backward(torch.jit.trace(model, BATCH[0]), F.cross_entropy, BATCH)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weight": float("nan")}, "nan"),
        ({"weight": "1"}, "'1'"),
        ({"scaler": 1024.0}, "GradScaler"),
    ],
)
def test_options_of_backward_are_checked(model, options, text):
    with pytest.raises(TwofoldError, match=text):
        SAM().backward(model, F.cross_entropy, BATCH, **options)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"microbatches": 0}, "microbatches .* 0 came"),
        ({"microbatches": 2.0}, "2.0"),
        ({"share_masks": 1}, "share_masks"),
        ({"generator": 3}, "generator"),
    ],
)
def test_common_options_are_checked(options, text):
    with pytest.raises(TwofoldError, match=text):
        SAM(**options)


def test_parameters_and_batches_that_do_not_fit_are_told(model):
    for regularizer, batch, text in (
        (SAM(params="conv*"), BATCH, "matches no parameter"),
        (SAM(microbatches=9), BATCH, "at least 9"),
        (SAM(microbatches=2), (BATCH[0], BATCH[1][:4]), "must be the same"),
        (SAM(), BATCH[0], "not a batch"),
    ):
        with pytest.raises(TwofoldError, match=text):
            regularizer.backward(model, F.cross_entropy, batch)
    with pytest.raises(TwofoldError, match="not a scalar"):
        SAM().backward(model, nn.CrossEntropyLoss(reduction="none"), BATCH)
    with pytest.raises(TypeError):
        SAM(0.05)
    model[0].requires_grad_(False)
    with pytest.raises(TwofoldError, match="frozen"):
        SAM(params="0.*").backward(model, F.cross_entropy, BATCH)
    model.requires_grad_(False)
    with pytest.raises(TwofoldError, match="requires a gradient"):
        SAM().backward(model, F.cross_entropy, BATCH)


def test_reentrant_checkpoints_are_refused_by_name():
    class Reentrant(nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    hidden = (Reentrant(3, 3), (BATCH[0].clone().requires_grad_(), BATCH[1]))
    on_the_way = (nn.Sequential(nn.Linear(3, 3), Reentrant(3, 3)), BATCH)
    for model, batch in (hidden, on_the_way):
        for regularizer in (SAM(), GradientPenalty(), HessianTrace(strength=1.0)):
            with pytest.raises(TwofoldError, match="use_reentrant=False"):
                regularizer.backward(model, F.cross_entropy, batch)
        with pytest.raises(TwofoldError, match="use_reentrant=False"):
            Hessian(model, F.cross_entropy, batch).to_dense()


def test_numbers_of_numpy_serve(model):
    SAM(rho=np.float32(0.1), microbatches=np.int64(2)).backward(model, F.cross_entropy, BATCH, weight=np.float32(0.5))
    assert flat(model).norm() > 0


def test_sparse_gradients_are_refused_by_name():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.table(x))

    with pytest.raises(TwofoldError, match="sparse=False"):
        SAM().backward(Words(), F.cross_entropy, (torch.randint(5, (6,)), BATCH[1]))


def test_states_of_another_kind_are_refused():
    with pytest.raises(TwofoldError, match="expects a state"):
        SAM().load_state_dict({"momentum": 1})
    with pytest.raises(TwofoldError, match="generator"):
        SAM().load_state_dict(WeightNoise(sigma=1.0, generator=torch.Generator()).state_dict())


def test_a_batch_whose_targets_are_all_ignored_changes_nothing(model):
    batch = (BATCH[0], torch.full((6,), -100))
    for regularizer in (SAM(), GradientPenalty(), SAM(microbatches=2)):
        model.zero_grad()
        assert regularizer.backward(model, F.cross_entropy, batch).isnan()
        assert flat(model).norm() == 0


def test_a_regularizer_of_ones_own_needs_one_method(model):
    class Plain(Regularizer):
        def direction(self, passes):
            from twofold.regularizers.base import plain

            return plain(passes)

    assert Plain().backward(model, F.cross_entropy, BATCH) > 0
