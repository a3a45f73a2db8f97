"""What does not repeat itself is refused by name; what draws from the global generators is replayed."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import twofold
from models import classification, mlp
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")


class Noise(nn.Module):
    """Draws from a generator of its own, which nobody replays."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x + 0.1 * self.draw(x)


def own_torch(x, generator=torch.Generator()):
    return torch.randn(x.shape, generator=generator)


def own_numpy(x, generator=np.random.default_rng(0)):
    return torch.as_tensor(generator.standard_normal(tuple(x.shape)))


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return torch.full_like(x, self.calls)


class Net(nn.Module):
    """A noisy module deep inside, behind others whose outputs differ for its sake."""

    def __init__(self, draw):
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.layer3 = nn.Sequential(nn.GELU())
        self.layer3.add_module("noise", Noise(draw))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer3(self.stem(x)))


class Inline(nn.Module):
    """Noise in the model's own forward, between its modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(F.gelu(self.a(x)) + own_torch(x[:, :1]))


class StochasticDepth(nn.Module):
    """Leaves a module out, by chance."""

    def __init__(self):
        super().__init__()
        self.body, self.skipped, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.generator = random.Random(3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        if self.generator.random() < 0.5:
            h = h + self.skipped(h)
        return self.head(h)


def repeatedly(f):
    """By chance, a few passes may be alike."""
    for _ in range(8):
        f()


def batches(sizes=(4, 3, 3)):
    return classification(mlp(4, 5, 3), sizes=sizes).batches


MODELS = {
    "torch": (lambda: Net(own_torch), r"module 'layer3\.noise' \(Noise\) gives different outputs"),
    "numpy": (lambda: Net(own_numpy), r"module 'layer3\.noise' \(Noise\)"),
    "state": (lambda: Net(Counter()), r"module 'layer3\.noise' \(Noise\)"),
    "inline": (Inline, r"the model's own forward \(Inline\) hands other inputs to 'b'"),
    "stochastic depth": (StochasticDepth, r"the model's own forward \(StochasticDepth\)"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_noisy_is_refused_where_batches_are_run_again(name):
    make, text = MODELS[name]
    c = twofold.Curvature(make(), F.cross_entropy, batches(), memory=0)
    with pytest.raises(TwofoldError, match=f"batch [012] changed between two forward passes.*{text}"):
        repeatedly(c.gradient)


@pytest.mark.parametrize("name", MODELS)
def test_an_explicit_check_finds_it_in_one_batch(name):
    make, text = MODELS[name]
    c = twofold.Curvature(make(), F.cross_entropy, batches((10,))[0])
    with pytest.raises(TwofoldError, match=text):
        repeatedly(c.check_determinism)


def test_kept_recordings_and_those_of_another_kind_agree():
    c = twofold.Curvature(Net(own_torch), F.cross_entropy, batches((10,))[0])
    c.gradient(), c.hessian @ torch.ones(c.hessian.shape[0])  # one recording, one draw
    with pytest.raises(TwofoldError, match=r"layer3\.noise"):
        c.activation_nme @ torch.ones(c.hessian.shape[0])


def test_noise_in_the_loss_or_in_forward_is_told_from_that_of_the_model():
    model = mlp(4, 5, 3)

    def loss_fn(z, y):
        return F.cross_entropy(z + own_torch(z), y)

    with pytest.raises(TwofoldError, match="loss_fn"):
        twofold.Curvature(model, loss_fn, batches()).check_determinism()

    def forward(m, batch):
        return m(batch[0] + own_torch(batch[0])), batch[1]

    with pytest.raises(TwofoldError, match="forward= hands other inputs"):
        twofold.Curvature(model, F.cross_entropy, batches(), forward=forward).check_determinism()


class Augmented(Dataset):
    def __init__(self, draw):
        self.x, self.y, self.draw = torch.randn(10, 4), torch.randint(3, (10,)), draw

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return self.x[i] + self.draw(self.x[i]), self.y[i]


class Shuffling(Sampler):
    def __init__(self):
        self.generator = random.Random(0)

    def __iter__(self):
        order = list(range(10))
        self.generator.shuffle(order)
        return iter(order)

    def __len__(self):
        return 10


@pytest.mark.parametrize("memory", [0, None])
def test_data_that_change_are_refused(memory):
    model = mlp(4, 5, 3)
    plain = TensorDataset(torch.randn(10, 4), torch.randint(3, (10,)))
    for loader in (
        DataLoader(Augmented(own_numpy), batch_size=4),
        DataLoader(plain, batch_size=4, sampler=Shuffling()),
    ):
        c = twofold.Curvature(model, F.cross_entropy, loader, memory=memory)
        c.gradient()
        with pytest.raises(TwofoldError, match="Batch 0 of data changed between two readings"):
            c.activation_nme @ torch.ones(c.hessian.shape[0])
        with pytest.raises(TwofoldError, match="Batch 0 of data changed"):
            twofold.Curvature(model, F.cross_entropy, loader, memory=memory).check_determinism()


def test_what_draws_from_the_global_generators_is_replayed():
    def draw(x):
        return torch.randn(x.shape) + np.random.standard_normal() + random.gauss(0, 1)

    model = nn.Sequential(Net(draw), nn.Dropout(0.5))
    loader = DataLoader(Augmented(draw), batch_size=4)
    c = twofold.Curvature(model, F.cross_entropy, loader, memory=0)
    v = torch.ones(c.hessian.shape[0])
    assert torch.equal(c.hessian @ v, c.hessian @ v)
    c.check_determinism()
    c.activation_nme @ v


def test_changes_that_are_meant_are_no_fault():
    model, data = mlp(4, 5, 3), batches()
    c = twofold.Curvature(model, F.cross_entropy, data, memory=0)
    v = torch.ones(c.hessian.shape[0])
    before = c.hessian @ v
    data[1][0].mul_(2)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    after = c.hessian @ v
    torch.testing.assert_close(after, twofold.Hessian(model, F.cross_entropy, data) @ v)
    assert not torch.equal(before, after)
    c.check_determinism()


def test_checking_leaves_no_trace():
    model = Net(own_torch)
    data, state = batches(), torch.get_rng_state()
    with pytest.raises(TwofoldError, match="noise"):
        twofold.Curvature(model, F.cross_entropy, data).check_determinism()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
