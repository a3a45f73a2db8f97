import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from references import relative
from regularizers.rows import Problem, flat, top_eigenvector
from twofold.curvature.eigen import eigsh
from twofold.errors import TwofoldError
from twofold.regularizers import SAM, EigenSAM, SharpnessAware


def gradient(problem, regularizer):
    problem.model.zero_grad()
    regularizer.backward(problem.model, problem.loss_fn, problem.batch)
    return flat(problem.model)


def vector(regularizer):
    return torch.cat([part.reshape(-1) for part in regularizer.memory.kept])


def moved(problem, by=0.3):
    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(by * torch.randn_like(p))
    return Problem(problem.model, problem.loss_fn, problem.batch)


@pytest.mark.parametrize("names", [["0.weight", "0.bias", "2.weight", "2.bias"], ["2.weight", "0.bias"]])
def test_the_vector_is_the_top_eigenvector_of_the_chosen_hessian(names):
    problem = Problem()
    regularizer = EigenSAM(params=names)
    gradient(problem, regularizer)
    mask = problem.mask(names)
    expected = top_eigenvector(problem, mask)[mask.bool()]
    found = vector(regularizer)
    assert abs(found @ expected) > 1 - 1e-5
    assert found.norm().item() == pytest.approx(1)
    g = problem.gradient()[mask.bool()]
    assert abs(regularizer.diagnostics["alignment"]) == pytest.approx(abs(g @ expected / g.norm()).item(), rel=1e-2)


def test_the_sign_of_the_vector_makes_no_difference():
    problem = Problem()
    regularizer = EigenSAM(rho=0.1)
    first = gradient(problem, regularizer)
    regularizer.memory.kept = [-part for part in regularizer.memory.kept]
    assert relative(gradient(problem, regularizer), first) < 1e-14


def test_a_turn_of_zero_is_sam_bit_for_bit_and_looks_for_no_vector():
    problem = Problem()
    regularizer = EigenSAM(rho=0.1, alpha=0.0)
    assert torch.equal(gradient(problem, regularizer), gradient(problem, SAM(rho=0.1)))
    assert regularizer.memory.kept is None


def test_without_a_positive_eigenvalue_it_is_sam():
    concave = Problem(loss_fn=lambda z, y: -(z - 1).square().sum(), model=nn.Linear(3, 2).double())
    regularizer = EigenSAM(rho=0.1)
    assert torch.equal(gradient(concave, regularizer), gradient(concave, SAM(rho=0.1)))
    assert regularizer.memory.kept is None
    assert "alignment" not in regularizer.diagnostics


def test_the_vector_is_found_anew_at_the_interval_once_a_step():
    problem = Problem()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0)
    regularizer = EigenSAM(interval=2).attach(optimizer)
    found = []
    for _ in range(5):
        problem = moved(problem)
        gradient(problem, regularizer)
        first = vector(regularizer)
        gradient(moved(problem), regularizer)
        assert torch.equal(vector(regularizer), first)
        found.append(first)
        optimizer.step()
    assert [torch.equal(a, b) for a, b in itertools.pairwise(found)] == [True, False, True, False]


def test_a_known_vector_saves_products(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).double()
    problem = Problem(model, batch=(torch.randn(64, 8).double(), torch.randint(4, (64,))))
    spent = []

    def counted(*arguments, **options):
        pair = eigsh(*arguments, **options)
        spent.append(pair.num_matvecs)
        return pair

    monkeypatch.setattr("twofold.regularizers.eigen_sam.eigsh", counted)
    regularizer = EigenSAM(interval=1)
    gradient(problem, regularizer)
    gradient(problem, regularizer)
    assert spent[1] < spent[0]


def test_it_resumes_and_copies_bit_for_bit():
    problem = Problem()
    regularizer = EigenSAM(interval=3)
    gradient(problem, regularizer)
    state = pickle.loads(pickle.dumps(regularizer.state_dict()))
    problem = moved(problem)
    others = [EigenSAM(interval=3), copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))]
    others[0].load_state_dict(state)
    expected = gradient(problem, regularizer)
    for other in others:
        assert torch.equal(gradient(problem, other), expected)
    assert not torch.equal(gradient(problem, EigenSAM(interval=3)), expected)


def test_dropout_masks_of_the_hessian_are_those_of_the_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    problem = Problem(model)
    mask = []
    model[2].register_forward_hook(lambda module, inputs, output: mask.append(output / inputs[0]))
    gradient(problem, EigenSAM())
    masks = torch.stack(mask)
    assert len(masks) > 2
    assert torch.equal(masks > 0, (masks[:1] > 0).expand_as(masks))
    assert 0 < (masks[0] > 0).double().mean() < 1


def test_a_closure_is_refused_before_it_runs_unless_no_vector_is_wanted():
    model, calls = nn.Linear(3, 2), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(torch.ones(2, 3)), torch.tensor([0, 1]))
        loss.backward()
        return loss

    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), EigenSAM())
    with pytest.raises(TwofoldError, match=r"reg\.backward"):
        optimizer.step(closure)
    assert not calls
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), EigenSAM(alpha=0.0))
    optimizer.step(closure)
    assert len(calls) == 2
