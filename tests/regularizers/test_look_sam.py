import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from references import relative
from regularizers.rows import Problem, flat, sam, unit
from twofold.errors import TwofoldError
from twofold.regularizers import SAM, LookSAM, SharpnessAware


def gradient(problem, regularizer):
    problem.model.zero_grad()
    regularizer.backward(problem.model, problem.loss_fn, problem.batch)
    return flat(problem.model)


def batches(problem, n):
    return [
        Problem(problem.model, problem.loss_fn, (torch.randn(6, 3).double(), torch.randint(3, (6,)))) for _ in range(n)
    ]


@pytest.mark.parametrize("names", [["0.weight", "0.bias", "2.weight", "2.bias"], ["0.weight", "2.bias"]])
def test_every_step_follows_the_formula(names):
    first = Problem()
    mask = first.mask(names)
    regularizer = LookSAM(rho=0.2, alpha=0.6, interval=3, params=names)
    for step, problem in enumerate([first, *batches(first, 6)]):
        g = problem.gradient()
        if step % 3 == 0:
            expected = sam(problem, 0.2, mask)
            kept = mask * (expected - (expected * mask) @ unit(g * mask) * unit(g * mask))
        else:
            expected = g + 0.6 * (g * mask).norm() * unit(kept)
        assert relative(gradient(problem, regularizer), expected) < 1e-10


def test_a_step_between_makes_one_pass():
    problem = Problem()
    passes = []
    problem.model.register_forward_hook(lambda *_: passes.append(1))
    regularizer = LookSAM(interval=4)
    counts = []
    for _ in range(9):
        passes.clear()
        gradient(problem, regularizer)
        counts.append(len(passes))
    assert counts == [2, 1, 1, 1, 2, 1, 1, 1, 2]


def test_an_interval_of_one_is_sam_and_alpha_zero_the_plain_gradient_between():
    first = Problem()
    always, nothing = LookSAM(rho=0.1, interval=1), LookSAM(rho=0.1, alpha=0.0)
    for step, problem in enumerate([first, *batches(first, 2)]):
        expected = gradient(problem, SAM(rho=0.1))
        assert torch.equal(gradient(problem, always), expected)
        if step:
            expected = gradient(problem, SAM(rho=0.0))
        assert torch.equal(gradient(problem, nothing), expected)


def test_rounding_is_not_scaled_up_where_nothing_turns():
    """Along one weight g_p is parallel to g, whatever the loss."""
    model = nn.Linear(1, 1, bias=False)
    batch = (torch.randn(8, 1), torch.randn(8, 1))
    regularizer = LookSAM()
    regularizer.backward(model, F.mse_loss, batch)
    model.zero_grad()
    regularizer.backward(model, F.mse_loss, batch)
    found = flat(model)
    model.zero_grad()
    F.mse_loss(model(batch[0]), batch[1]).backward()
    torch.testing.assert_close(found, flat(model))


def test_all_calls_of_a_step_are_full_or_none_and_their_mean_is_kept():
    first = Problem()
    optimizer = torch.optim.SGD(first.model.parameters(), lr=0.0)
    regularizer = LookSAM(rho=0.2, interval=2).attach(optimizer)
    pair = batches(first, 2)
    ones = torch.ones_like(first.theta)
    uphill, kept = [sam(problem, 0.2, ones) for problem in pair], 0
    for problem, g_p in zip(pair, uphill, strict=True):
        regularizer.backward(problem.model, problem.loss_fn, problem.batch, weight=0.5)
        kept = kept + (g_p - g_p @ unit(problem.gradient()) * unit(problem.gradient())) / 2
    assert relative(flat(first.model), sum(uphill) / 2) < 1e-12
    optimizer.step()
    optimizer.zero_grad()
    regularizer.backward(first.model, first.loss_fn, first.batch)
    g = first.gradient()
    assert relative(flat(first.model), g + 0.7 * g.norm() * unit(kept)) < 1e-10


def test_a_full_step_that_was_not_finite_is_made_up_for():
    problem = Problem()
    bad = Problem(problem.model, problem.loss_fn, (problem.batch[0] * float("nan"), problem.batch[1]))
    regularizer = LookSAM(rho=0.1)
    with pytest.warns(UserWarning, match="not finite"):
        gradient(bad, regularizer)
    assert torch.equal(gradient(problem, regularizer), gradient(problem, SAM(rho=0.1)))


def test_it_resumes_behind_an_optimiser_bit_for_bit():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    data = [(torch.randn(6, 3), torch.randint(3, (6,))) for _ in range(4)]

    def make():
        return SharpnessAware(torch.optim.AdamW(model.parameters(), lr=0.01), LookSAM(interval=3))

    def step(optimizer, batch):
        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        optimizer.step(closure)

    optimizer = make()
    step(optimizer, data[0])
    state, before = pickle.loads(pickle.dumps((optimizer.state_dict(), model.state_dict())))
    found = []
    for resumed in (optimizer, make()):
        if resumed is not optimizer:
            model.load_state_dict(before)
            resumed.load_state_dict(state)
        for batch in data[1:]:
            step(resumed, batch)
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone())
        assert resumed.reg.steps == 4
    assert torch.equal(*found)


def test_an_alpha_that_makes_no_sense_is_refused():
    with pytest.raises(TwofoldError, match=r"alpha.*nan"):
        LookSAM(alpha=float("nan"))
