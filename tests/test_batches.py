"""What counts as a batch and as data."""

from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import twofold
from models import classification, mlp
from twofold import TwofoldError


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(4, 5, 3)

    def forward(self, left, right):
        return self.body(left + right)


def hessian(model, data, **options):
    return twofold.Hessian(model, F.cross_entropy, data, **options).to_dense()


def test_every_form_of_the_same_batch_gives_the_same_matrix():
    model, a, b, y = Add(), torch.randn(6, 4), torch.randn(6, 4), torch.randint(3, (6,))
    expected = hessian(model.body, (a + b, y))
    forms = [((a, b), y), ([a, b], y), ({"left": a, "right": b}, y), {"left": a, "right": b, "labels": y}]
    for batch in forms:
        data = batch if isinstance(batch, dict | tuple) else [batch]
        assert torch.equal(hessian(model, data), expected)
        assert torch.equal(hessian(model, [data]), expected)


def test_a_list_made_only_of_tensors_is_one_batch():
    case = classification(mlp(4, 5, 3))
    x, y = case.batches[0]
    assert torch.equal(hessian(case.model, [x, y]), hessian(case.model, (x, y)))


def test_a_loader_is_data():
    case = classification(mlp(4, 5, 3))
    x, y = case.batches[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    torch.testing.assert_close(hessian(case.model, loader), hessian(case.model, (x, y)))


def test_logits_are_taken_from_an_output_object():
    class Output(dict):
        def __getattr__(self, name):
            return self[name]

    class Wrapped(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return Output(logits=self.body(x), loss=None)

    case = classification(mlp(4, 5, 3))
    assert torch.equal(hessian(Wrapped(case.model), case.batches[0]), hessian(case.model, case.batches[0]))


def loaders():
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    data = TensorDataset(x, y)
    model = mlp(4, 5, 3)
    return {
        "one-shot": (model, iter([(x, y)]), r"list\(loader\)"),
        "generator": (model, ((x, y) for _ in range(2)), r"list\(loader\)"),
        "shuffling": (model, DataLoader(data, 4, shuffle=True), "shuffle=False"),
        "weighted": (model, DataLoader(data, 4, sampler=WeightedRandomSampler([1.0] * 8, 8)), "WeightedRandomSampler"),
        "empty list": (model, [], "no batch"),
        "empty loader": (model, DataLoader(TensorDataset(x[:0], y[:0])), "no batch"),
        "a tensor": (model, x, "batch"),
        "a number": (model, 3, "int"),
        "three parts": (model, (x, y, y), r"\(inputs, targets\)"),
        "a mapping without labels": (model, {"x": x}, '"labels"'),
    }


@pytest.mark.parametrize("name", loaders())
def test_bad_data_is_refused_with_the_way_out(name):
    model, data, text = loaders()[name]
    with pytest.raises(TwofoldError, match=text):
        hessian(model, data)


def test_a_forward_that_returns_no_pair_is_refused():
    case = classification(mlp(4, 5, 3))
    with pytest.raises(TwofoldError, match=r"\(outputs, targets\)"):
        hessian(case.model, case.batches[0], forward=lambda model, batch: model(batch[0]))


def test_data_that_changes_its_length_is_refused():
    case = classification(mlp(4, 5, 3), sizes=(5, 5))

    class Shrinking:
        def __init__(self):
            self.left = 3

        def __iter__(self):
            self.left -= 1
            return iter(case.batches[: self.left])

    operator = twofold.Hessian(case.model, case.loss_fn, Shrinking(), memory=0)
    v = torch.ones(operator.shape[0])
    operator @ v
    with pytest.raises(TwofoldError, match="2 batches before and 1 now"):
        operator @ v


@pytest.mark.parametrize("bad", ["loss", "data", "all ignored"])
def test_what_is_not_finite_is_refused(bad):
    case = classification(mlp(4, 5, 3))
    x, y = case.batches[0]
    x, y = (x * float("nan"), y) if bad == "data" else (x, torch.full_like(y, -100)) if bad == "all ignored" else (x, y)
    loss_fn = (lambda z, t: z.sum() * float("inf")) if bad == "loss" else F.cross_entropy
    with pytest.raises(TwofoldError, match="no term at all" if bad == "all ignored" else "not finite"):
        twofold.Hessian(case.model, loss_fn, (x, y)).to_dense()


def test_causal_language_models_shift_their_labels():
    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

        def forward(self, input_ids):
            return self.head(torch.tanh(self.table(input_ids)))

    model, ids = Bigram(), torch.randint(5, (2, 6))
    labels = ids.clone()
    labels[0, :3] = -100
    batch = {"input_ids": ids, "labels": labels}
    c = twofold.Curvature(model, F.cross_entropy, batch, forward=twofold.causal_lm_forward)
    kept = labels[:, 1:] != -100
    expected = F.cross_entropy(model(ids)[:, :-1][kept], ids[:, 1:][kept])
    assert c.loss() == pytest.approx(expected.item())


def test_a_loader_draws_the_same_each_time_and_moves_no_generator():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return torch.randn(4), i % 3

    case = classification(mlp(4, 5, 3))
    own = torch.Generator().manual_seed(3)
    for loader in (DataLoader(Noisy(), 4), DataLoader(Noisy(), 4, generator=own)):
        before, before_own = torch.get_rng_state(), own.get_state()
        operator = twofold.Hessian(case.model, case.loss_fn, loader, memory=0)
        v = torch.ones(operator.shape[0])
        assert torch.equal(operator @ v, operator @ v)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(own.get_state(), before_own)


def test_sparse_buffers_and_mappings_of_any_class_are_understood():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(4, 5, 3)
            self.register_buffer("adjacency", torch.eye(6).to_sparse())

        def forward(self, x):
            return self.body(torch.sparse.mm(self.adjacency, x))

    model, x, y = Graph(), torch.randn(6, 4), torch.randint(3, (6,))
    expected = hessian(model.body, (x, y))
    assert torch.equal(hessian(model, (x, y)), expected)
    batch = UserDict({"x": x, "labels": y})
    operator = twofold.Hessian(model, F.cross_entropy, batch)
    assert torch.equal(operator.to_dense(), expected)
    x.mul_(2)
    assert torch.equal(operator.to_dense(), hessian(model.body, (x, y)))


def test_inference_tensors_are_measured():
    with torch.inference_mode():
        model, x = mlp(4, 5, 3), torch.randn(6, 4)
    y = torch.randint(3, (6,))
    twin = mlp(4, 5, 3)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(hessian(model, (x, y)), hessian(twin, (x.clone(), y)))
