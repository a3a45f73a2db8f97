import pytest
import torch
import torch.nn.functional as F
from torch import nn

from twofold.errors import TwofoldError
from twofold.regularizers import EigenSAM, FriendlySAM, LookSAM, SharpnessAware
from twofold.regularizers.memory import Memory


def test_sums_are_weighted_and_what_is_not_finite_is_left_out():
    memory = Memory()
    assert memory.take() is None
    memory.add([torch.ones(2)], 0.5)
    memory.add([torch.full((2,), float("inf"))], 1.0)
    memory.add([torch.full((2,), 3.0)], 0.25)
    total, weight = memory.take()
    assert torch.equal(total[0], torch.full((2,), 1.25))
    assert weight == 0.75
    assert memory.take() is None


def test_a_state_keeps_its_values_when_the_memory_moves_on():
    memory, other = Memory(), Memory()
    memory.add([torch.ones(2)], 1.0)
    state = memory.state_dict()
    memory.add([torch.ones(2)], 1.0)
    other.load_state_dict(state)
    assert torch.equal(other.take()[0][0], torch.ones(2))


def backward(regularizer, width=4, dtype=torch.float32):
    model = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, 3)).to(dtype)
    regularizer.backward(model, F.cross_entropy, (torch.randn(6, 3, dtype=dtype), torch.randint(3, (6,))))
    return model


@pytest.mark.parametrize("make", [FriendlySAM, LookSAM, EigenSAM])
def test_the_memory_of_another_model_is_refused_and_nothing_is_lost(make):
    regularizer, other = make(), make()
    backward(regularizer)
    other.load_state_dict(regularizer.state_dict())
    kept = other.memory.kept
    with pytest.raises(TwofoldError, match="another model"):
        backward(other, width=5)
    assert all(torch.equal(a, b) for a, b in zip(other.memory.kept, kept, strict=True))
    with pytest.raises(TwofoldError, match="another model"):
        backward(SharpnessAwareOf(other), width=5)
    backward(other)
    backward(other, dtype=torch.float64)
    assert all(tensor.dtype == torch.float64 for tensor in other.memory.kept)


class SharpnessAwareOf:
    """The same from a closure; where a closure does not work, from backward."""

    def __init__(self, regularizer):
        self.regularizer = regularizer

    def backward(self, model, loss_fn, batch):
        if isinstance(self.regularizer, EigenSAM):
            self.regularizer.backward(model, loss_fn, batch)
            return
        optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), self.regularizer)

        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model(batch[0]), batch[1])
            loss.backward()
            return loss

        try:
            optimizer.step(closure)
        finally:
            assert all(p.grad is None for p in model.parameters())


def test_a_state_of_another_kind_is_refused_and_changes_nothing():
    regularizer = FriendlySAM()
    backward(regularizer)
    good = regularizer.state_dict()
    for memory in (None, {}, {**good["memory"], "kept": 3}, {**good["memory"], "arrived": [torch.ones(2, dtype=int)]}):
        with pytest.raises(TwofoldError, match="memory"):
            regularizer.load_state_dict({**good, "steps": 9, "memory": memory})
    assert regularizer.steps == 1
    assert regularizer.memory.kept is good["memory"]["kept"]


def test_a_base_state_that_does_not_load_leaves_the_regularizers_own():
    model = nn.Linear(3, 2)
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), FriendlySAM())
    state = optimizer.state_dict()
    state["twofold"] = {**state["twofold"], "steps": 7}
    state["param_groups"] = []
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(state)
    assert optimizer.reg.steps == 0
