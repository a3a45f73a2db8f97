"""Two ranks with half a batch each make the steps that one process makes on the whole batch."""

import pytest
import torch
import torch.nn.functional as F

import twofold
from ranks import on_ranks
from references import relative
from regularizers.rows import ROWS, Problem, flat
from regularizers.two_ranks import (
    STEPS,
    Branched,
    batches,
    by_closure,
    everything,
    flat_weights,
    trained,
)
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(everything)


def tolerance(name):
    """Eigenvectors are found to 1e-3; second differences amplify rounding."""
    return 1e-4 if name == "EigenSAM" else 1e-7 if name == "HessianTrace difference" else 1e-12


@pytest.mark.parametrize("ascent", ["global", "local"])
@pytest.mark.parametrize("name", ROWS)
def test_two_ranks_equal_one_process(ranks, name, ascent):
    """Of ascent="local" the equal is a process with two micro-batches."""
    expected = trained(name, ascent)[0]
    start = trained(name, ascent, steps=0)[0]
    for found in ranks:
        assert relative(found[name, ascent] - start, expected - start) < tolerance(name)
    assert torch.equal(ranks[0][name, ascent], ranks[1][name, ascent])


def test_the_ascents_differ():
    assert relative(trained("SAM", "global")[0], trained("SAM", "local")[0]) > 1e-5


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.closure])
def test_closures_average_too(ranks, name):
    expected = by_closure(name)[0]
    for found in ranks:
        assert relative(found["closures"][name], expected) < tolerance(name)


def test_a_ddp_model_brings_its_group(ranks):
    for found in ranks:
        assert torch.equal(found["DDP"], ranks[0]["SAM", "global"])


def test_the_loop_is_that_of_ddp_with_buffers_and_accumulation(ranks):
    for found in ranks:
        assert max(found["as_ddp_trains"]) < 1e-12


@pytest.mark.parametrize("ascent", ["global", "local"])
@pytest.mark.parametrize("name", ROWS)
def test_a_state_of_two_ranks_goes_on_in_one_process(ranks, name, ascent):
    """Either way the weights are those of a run that never stopped, on two ranks or in one process."""
    expected = ranks[0][name, ascent]
    start = trained(name, ascent, steps=0)[0]
    for found in ranks:
        weights = trained(name, ascent, start=found["states"][name, ascent])[0]
        assert relative(weights - start, expected - start) < tolerance(name)


@pytest.mark.parametrize("ascent", ["global", "local"])
@pytest.mark.parametrize("name", ROWS)
def test_a_state_of_one_process_goes_on_in_two(ranks, name, ascent):
    expected = trained(name, ascent)[0]
    start = trained(name, ascent, steps=0)[0]
    for found in ranks:
        assert relative(found["resumed"][name, ascent] - start, expected - start) < tolerance(name)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.closure])
def test_a_wrapped_optimiser_goes_on_with_another_number_of_ranks(ranks, name):
    expected = by_closure(name)[0]
    start = by_closure(name, steps=0)[0]
    for found in ranks:
        one = by_closure(name, start=found["states"][name])[0]
        assert relative(one - start, expected - start) < tolerance(name)
        assert relative(found["resumed"][name] - start, expected - start) < tolerance(name)


@pytest.mark.parametrize("ascent", ["global", "local"])
@pytest.mark.parametrize("name", ROWS)
def test_random_methods_go_on_with_another_number_of_ranks(ranks, name, ascent):
    """What is drawn is not what one process would have drawn; but all ranks hold the same, and go on."""
    (first, state), (second, other) = (found["resumed_with_own_noise"][name, ascent] for found in ranks)
    assert first.isfinite().all()
    assert torch.equal(first, second)
    assert state["steps"] == other["steps"] == STEPS
    assert torch.equal(state["generator"], other["generator"])
    torch.manual_seed(0)
    problem, alone = Problem(), ROWS[name].make(0.03, generator=torch.Generator())
    alone.load_state_dict(state)
    alone.backward(problem.model, F.cross_entropy, problem.batch)
    assert flat(problem.model).isfinite().all()


def test_parameters_that_one_rank_reaches(ranks):
    torch.manual_seed(0)
    names = [name for name, _ in Branched().named_parameters()]
    for found in ranks:
        reached = {n: g for n, g in zip(names, found["branch_of_one_rank"], strict=True) if g is not None}
        assert reached.keys() == {n for n in names if not n.startswith("unused")}
        assert reached["large.weight"].any()
    pairs = zip(*(found["branch_of_one_rank"] for found in ranks), strict=True)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def test_gradients_are_the_mean_over_ranks_and_pieces_without_terms_do_not_count(ranks):
    torch.manual_seed(0)
    problem, (x, y) = Problem(), batches()[0]

    def gradient(rows, rho=0.0):
        problem.model.zero_grad()
        twofold.SAM(rho=rho).backward(problem.model, F.cross_entropy, (x[rows], y[rows]))
        return flat(problem.model)

    ragged = (gradient(slice(0, 2)) + gradient(slice(2, 8))) / 2
    # pieces: 0, 1 and 4, 5 together; 6, 7 alone, since 2, 3 are ignored
    pieces = (4 * gradient([0, 1, 4, 5], 0.05) + 2 * gradient([6, 7], 0.05)) / 6
    for found in ranks:
        assert relative(found["mean_over_ranks"][0], ragged) < 1e-12
        assert relative(found["mean_over_ranks"][1], pieces) < 1e-12


@pytest.mark.filterwarnings("ignore::twofold.TwofoldWarning")
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(ranks):
    for found in ranks:
        results = dict(found["one_rank_is_not_finite"])
        assert results.pop("scaler") == (4.0, True)
        assert results == dict.fromkeys(results, (1, True))
        assert len(results) == 2 * len(ROWS)


def test_an_exception_on_one_rank_is_raised_on_all_and_everything_is_put_back(ranks):
    for found, own in zip(ranks, ("RankError", "RuntimeError"), strict=True):
        errors = found["errors"]
        for ascent in ("global", "local"):
            for fail_at in (1, 2):
                text, same, no_gradient = errors[ascent, fail_at]
                assert text.startswith(own)
                assert "on purpose" in text
                assert same
                assert no_gradient
        assert "microbatches=2" in errors["split"]
        assert "closure returned None" in errors["closure"].replace("The ", "")
        assert errors["copied"]


def test_noise_is_common_or_each_ranks_own(ranks):
    (a, b) = (found["own_noise"] for found in ranks)
    assert torch.equal(a["global"], b["global"])
    assert not torch.equal(a["local"], b["local"])
    assert a["local"].any()


def test_options_are_checked():
    with pytest.raises(TwofoldError, match="'global', 'local'; 'each' came"):
        twofold.SAM(ascent="each")
    with pytest.raises(TwofoldError, match="init_process_group"):
        twofold.SAM(group="world")


def test_hooks_after_accumulation_run_once_when_all_gradients_are_there():
    problem, seen = Problem(), []
    for parameter in problem.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))
    unused = problem.model[0].bias.requires_grad_(False)
    twofold.SAM().backward(problem.model, F.cross_entropy, problem.batch)
    assert seen == [True] * 3
    assert unused.grad is None
    weights = flat_weights(problem.model)
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in problem.model.parameters() if p.requires_grad}
    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(lambda p: (optimizers[p].step(), optimizers[p].zero_grad()))
    twofold.SAM().backward(problem.model, F.cross_entropy, problem.batch)
    assert not torch.equal(weights, flat_weights(problem.model))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_models_resolve(prefix):
    problem = Problem()
    expected = twofold.SAM(params=["0.*"], rho={"*.bias": 0.0, "*": 0.5})
    expected.backward(problem.model, F.cross_entropy, problem.batch)
    gradient = flat(problem.model)
    problem.model.zero_grad()
    regularizer = twofold.SAM(params=[f"{prefix}0.*"], rho={f"{prefix}*.bias": 0.0, f"{prefix}*": 0.5})
    regularizer.backward(problem.model, F.cross_entropy, problem.batch)
    assert torch.equal(flat(problem.model), gradient)
    c = twofold.Curvature(problem.model, F.cross_entropy, problem.batch, params=f"{prefix}2.*")
    assert list(c.layout.shapes) == ["2.weight", "2.bias"]
    v = torch.randn(c.hessian.shape[0])
    named = {f"{prefix}{name}": part for name, part in c.layout.as_dict(v).items()}
    assert torch.equal(c.layout.from_dict(c.hessian @ named), c.hessian @ v)
