"""The diagonal: exact where it must be, calibrated entry by entry."""

import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

import twofold
from models import CASES
from twofold import TwofoldError
from twofold.curvature.probes import signs

pytestmark = pytest.mark.usefixtures("float64")


def test_exact_on_a_diagonal():
    values = torch.tensor([3.0, -1.0, 0.5, 0.0])
    found = twofold.diagonal(torch.diag(values), 5)
    torch.testing.assert_close(found.value, values)
    torch.testing.assert_close(found.stderr, torch.zeros(4))
    assert found.num_matvecs == 5


def test_standard_errors_are_calibrated():
    A = torch.randn(20, 20)
    A = A + A.T
    scores = []
    for seed in range(200):
        found = twofold.diagonal(A, 40, generator=torch.Generator().manual_seed(seed))
        scores.append((found.value - A.diagonal()) / found.stderr)
    scores = torch.stack(scores)
    assert ((scores.var(0) > 0.5) & (scores.var(0) < 2)).all()
    assert (scores.mean(0).abs() < 0.5).all()


def test_mean_and_spread_are_those_of_the_samples():
    A = torch.randn(7, 7) + 1e6 * torch.eye(7)
    singly = torch.Generator().manual_seed(3)
    probes = torch.stack([signs(7, singly).double() for _ in range(9)])
    samples = probes * (probes @ A.T)
    found = twofold.diagonal(A, 9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found.value, samples.mean(0))
    torch.testing.assert_close(found.stderr, samples.std(0) / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("part", ["hessian", "gauss_newton", "nme"])
def test_diagonals_of_a_model(part):
    case = CASES["ragged"]()
    operator = getattr(twofold.Curvature(case.model, case.loss_fn, case.batches), part)
    found, truth = twofold.diagonal(operator, 400), operator.to_dense().diagonal()
    assert ((found.value - truth).abs() <= 4 * found.stderr + 1e-12).all()
    assert found.value.sum().item() == pytest.approx(twofold.trace(operator, 400).value)


def test_numpy_and_scipy_operators_are_understood():
    A = torch.randn(9, 9)
    for other in (A.numpy(), aslinearoperator(A.numpy())):
        torch.testing.assert_close(twofold.diagonal(other, 4).value, twofold.diagonal(A, 4).value)


def test_one_probe_has_no_standard_error():
    assert twofold.diagonal(torch.randn(5, 5), 1).stderr.isnan().all()


def test_same_call_same_numbers_and_no_global_randomness():
    A = torch.randn(9, 9)
    before = torch.get_rng_state()
    assert torch.equal(twofold.diagonal(A, 4).value, twofold.diagonal(A, 4).value)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("operator", "count"), [(torch.ones(3, 2), 4), (torch.ones(3, 3), 0), ([[1.0]], 4)])
def test_bad_input_is_refused(operator, count):
    with pytest.raises(TwofoldError):
        twofold.diagonal(operator, count)
