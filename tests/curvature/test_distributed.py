"""Two ranks with a shard each measure what one process measures on the whole data."""

import pytest
import torch

import twofold
from curvature.shards import PROBLEMS, everything, measured, problem
from ranks import on_ranks
from references import relative
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(everything)


@pytest.mark.parametrize("name", PROBLEMS)
def test_two_ranks_equal_one_process_on_the_whole_data(ranks, name):
    whole = measured(name)
    for found, _ in ranks:
        assert found[name].keys() == whole.keys()
        for what, expected in whole.items():
            tolerance = 1e-7 if what == "eigenvalues" else 1e-10
            assert relative(found[name][what], expected) < tolerance, what
    for what in whole:
        assert torch.equal(ranks[0][0][name][what], ranks[1][0][name][what]), f"{what} differs between the ranks"


def test_without_a_group_each_rank_measures_its_own_shard(ranks):
    model, loss_fn, batches = problem("ragged")
    for (found, _), shard in zip(ranks, (batches[:2], batches[2:]), strict=True):
        expected = twofold.Hessian(model, loss_fn, shard).to_dense()
        assert relative(found["alone"]["hessian"], expected) < 1e-12


def test_any_group_of_the_ranks_serves(ranks):
    assert relative(ranks[0][0]["other group"]["nme"], measured("custom loss")["nme"]) < 1e-10


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        ("NaN", ["rank 1 of the group: NotFiniteError: The loss is not", "NotFiniteError: The loss is not finite"]),
        ("empty", ["rank 1 of the group: TwofoldError: data holds no batch", "TwofoldError: data holds no batch"]),
        ("loss", ["rank 1 of the group: TwofoldError: loss_fn must be", "TwofoldError: loss_fn must be callable"]),
        ("exception", ["rank 1 of the group: TypeError", "TypeError"]),
        ("activations", ["rank 1 of the group: TwofoldError: data holds", "TwofoldError: data holds no batch"]),
        ("vectors", ["The vectors differ"] * 2),
        ("parameters", ["The parameters differ"] * 2),
        ("generator", ["A generator came on ranks [1]"] * 2),
        ("no term", ["averages over no term at all"] * 2),
    ],
)
def test_an_error_on_one_rank_is_an_error_on_all(ranks, what, texts):
    for (_, failed), text in zip(ranks, texts, strict=True):
        assert text in failed[what]


def test_the_group_works_on_after_an_error(ranks):
    model, loss_fn, batches = problem("ragged")
    expected = twofold.Hessian(model, loss_fn, batches) @ torch.ones(43)
    for _, failed in ranks:
        assert relative(failed["afterwards"], expected) < 1e-10
    assert ranks[0][1]["member"] is None
    assert "not a member" in ranks[1][1]["member"]


def test_a_group_that_is_none_is_refused():
    model, loss_fn, batches = problem("ragged")
    with pytest.raises(TwofoldError, match="init_process_group"):
        twofold.Hessian(model, loss_fn, batches, group="world")
