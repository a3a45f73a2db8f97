"""A kept recording is used while it is true and no longer."""

import copy

import pytest
import torch
from torch import nn

import twofold
from models import CASES, classification, conv_batchnorm
from twofold import TwofoldError


def fresh(case, v):
    return twofold.Hessian(case.model, case.loss_fn, case.batches[0]) @ v


def fused_adamw(model, case):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    case.loss_fn(model(case.batches[0][0]), case.batches[0][1]).backward()
    optimizer.step()


def one_entry_by_data(model, case):
    model[0].weight.data[1, 2] += 1e-3


def sign_flip(model, case):
    model[0].weight.data.mul_(-1)


def permutation(model, case):
    weight = next(p for p in model.parameters() if p.numel() > 1000)
    weight.data.copy_(weight.data.flip(0))


def new_memory(model, case):
    model[0].weight.data = model[0].weight.data + 0.1


def load(model, case):
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})


def replaced_module(model, case):
    model[1] = nn.Tanh()


def one_row_turned(model, case):
    model[0].weight.data[0].neg_()


def two_neurons_swapped(model, case):
    model[0].weight.data[[0, 1]] = model[0].weight.data[[1, 0]]


def assigned(model, case):
    state = {name: tensor + 0.1 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def new_parameter(model, case):
    model[0].weight = nn.Parameter(model[0].weight.detach() + 0.1)


CHANGES = [
    one_row_turned,
    two_neurons_swapped,
    assigned,
    new_parameter,
    fused_adamw,
    one_entry_by_data,
    sign_flip,
    permutation,
    new_memory,
    load,
    replaced_module,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_parameters_is_seen(change):
    case = classification(nn.Sequential(nn.Linear(40, 50), nn.GELU(), nn.Linear(50, 3)), (40,))
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches[0])
    v = torch.randn(hessian.shape[0])
    before = hessian @ v
    change(case.model, case)
    after = hessian @ v
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(case, v))


def test_a_change_of_buffers_and_modes_is_seen():
    case = classification(conv_batchnorm(), (1, 2, 2))
    case.model.eval()
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches[0])
    v = torch.randn(hessian.shape[0])
    results = [hessian @ v]
    case.model[1].running_var.data.mul_(2)
    results.append(hessian @ v)
    assert torch.equal(results[-1], fresh(case, v))
    case.model.train()
    results.append(hessian @ v)
    assert torch.equal(results[-1], fresh(case, v))
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_a_change_of_the_batch_is_seen():
    case = CASES["mlp"]()
    batch = tuple(t.float() if t.is_floating_point() else t for t in case.batches[0])
    hessian = twofold.Hessian(case.model, case.loss_fn, batch)
    v = torch.randn(hessian.shape[0])
    before = hessian @ v
    batch[0].mul_(2)
    assert torch.equal(hessian @ v, twofold.Hessian(case.model, case.loss_fn, batch) @ v)
    assert not torch.equal(hessian @ v, before)


def test_a_change_of_the_second_derivative_is_seen():
    case = CASES["mlp"]()
    nme = twofold.NME(case.model, case.loss_fn, case.batches[0])
    v = torch.randn(nme.shape[0])
    before = nme @ v
    with twofold.second_derivative(0, of="gelu"):
        within = nme @ v
        assert torch.equal(within, twofold.NME(case.model, case.loss_fn, case.batches[0]) @ v)
    assert not torch.equal(within, before)
    assert torch.equal(nme @ v, before)


def test_nothing_is_recorded_twice_without_need():
    case = CASES["mlp"]()
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += 1
        return model(batch[0]), batch[1]

    c = twofold.Curvature(case.model, case.loss_fn, case.batches[0], forward=forward)
    c.products(torch.randn(c.hessian.shape[0], 3))
    c.frobenius(4)
    assert calls == 1


@pytest.mark.parametrize("part", ["hessian", "activation_nme"])
def test_recordings_leave_memory_without_the_garbage_collector(part):
    import gc
    import weakref

    case = CASES["mlp"]()
    gc.disable()
    try:
        c = twofold.Curvature(case.model, case.loss_fn, case.batches[0])
        c.products(torch.ones(c.hessian.shape[0]), parts=(part,))
        (recording,) = c._products.recordings.kept.values()
        ref = weakref.ref(recording.outputs[0])
        del recording, c
        assert ref() is None
    finally:
        gc.enable()


def test_dropout_masks_are_fixed_for_each_batch():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 3))
    case = classification(model, sizes=(6, 4))
    torch.manual_seed(5)
    c = twofold.Curvature(model, case.loss_fn, case.batches, memory=0)
    first = c.gradient()
    torch.randn(3)
    assert torch.equal(c.gradient(), first)
    torch.manual_seed(5)
    losses = [case.loss_fn(model(x), y) * len(y) for x, y in case.batches]
    expected = torch.autograd.grad(sum(losses) / 10, list(model.parameters()))
    torch.testing.assert_close(first, torch.cat([g.reshape(-1) for g in expected]))


def test_a_change_of_a_plain_tensor_or_of_the_loss_is_seen():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = nn.Linear(4, 3), torch.ones(3)

        def forward(self, x):
            return torch.tanh(self.body(x)) * self.scale

    loss_fn = nn.CrossEntropyLoss(weight=torch.ones(3))
    case = classification(Scaled(), loss_fn=loss_fn)
    hessian = twofold.Hessian(case.model, loss_fn, case.batches[0])
    v = torch.randn(hessian.shape[0])
    results = [hessian @ v]
    for change in (lambda: case.model.scale.mul_(3), lambda: loss_fn.weight.data[:1].fill_(50.0)):
        change()
        results.append(hessian @ v)
        assert torch.equal(results[-1], fresh(case, v))
        assert not torch.equal(results[-1], results[-2])


def test_parameters_of_another_kind_than_at_first_are_refused():
    case = CASES["mlp"]()
    hessian = twofold.Hessian(case.model, case.loss_fn, case.batches[0])
    case.model.double()
    with pytest.raises(TwofoldError, match="Build the operator anew"):
        hessian @ torch.ones(hessian.shape[0])
    case.model.float()
    hessian @ torch.ones(hessian.shape[0])
    case.model[0] = nn.Identity()
    with pytest.raises(TwofoldError, match="gone"):
        hessian @ torch.ones(hessian.shape[0])


def test_a_copy_of_a_used_curvature_makes_its_own_recordings():
    case = CASES["mlp"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches[0])
    v = torch.randn(c.layout.size)
    expected = c.nme @ v
    assert torch.equal(copy.deepcopy(c).nme @ v, expected)
