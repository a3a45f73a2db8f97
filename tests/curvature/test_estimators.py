"""Traces and norms: exact where they must be, calibrated where they are random."""

import math

import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

import twofold
from models import CASES
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")

ESTIMATORS = {
    twofold.trace: lambda A: A.trace().item(),
    twofold.frobenius_norm: lambda A: A.norm().item(),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_exact_on_a_diagonal(estimator):
    A = torch.diag(torch.tensor([3.0, -1.0, 0.5, 0.0]))
    found = estimator(A, num_matvecs=5)
    assert found.value == pytest.approx(ESTIMATORS[estimator](A), rel=1e-12)
    assert found.stderr == pytest.approx(0, abs=1e-12)
    assert found.num_matvecs == 5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_standard_errors_are_calibrated(estimator):
    A = torch.randn(30, 30)
    A = A + A.T
    truth, scores = ESTIMATORS[estimator](A), []
    for seed in range(200):
        found = estimator(A, num_matvecs=40, generator=torch.Generator().manual_seed(seed))
        scores.append((found.value - truth) / found.stderr)
    scores = torch.tensor(scores)
    assert 0.5 < scores.var().item() < 2
    assert abs(scores.mean().item()) < 0.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_same_call_same_numbers_and_no_global_randomness(estimator):
    A = torch.randn(9, 9)
    before = torch.get_rng_state()
    assert estimator(A, 4) == estimator(A, 4)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(3)
    assert estimator(A, 4, generator=generator) != estimator(A, 4, generator=generator)


def test_numpy_and_scipy_operators_are_understood():
    A = torch.randn(9, 9)
    for other in (A.numpy(), aslinearoperator(A.numpy())):
        assert twofold.trace(other, 4).value == pytest.approx(twofold.trace(A, 4).value, rel=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("operator", "count"), [(torch.ones(3, 2), 4), (torch.ones(3, 3), 0), ([[1.0]], 4)])
def test_bad_input_is_refused(estimator, operator, count):
    with pytest.raises(TwofoldError):
        estimator(operator, count)


def test_one_probe_has_no_standard_error():
    assert math.isnan(twofold.trace(torch.randn(5, 5), 1).stderr)


def test_curvature_shares_probes_among_its_matrices():
    case = CASES["ragged"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    traces, norms = c.traces(300), c.frobenius(300)
    assert traces["hessian"].value == pytest.approx(traces["gauss_newton"].value + traces["nme"].value)
    for part in traces:
        matrix = getattr(c, part).to_dense()
        assert abs(traces[part].value - matrix.trace().item()) < 4 * traces[part].stderr
        assert abs(norms[part].value - matrix.norm().item()) < 4 * norms[part].stderr
        alone = twofold.trace(getattr(c, part), 300)
        assert alone.value == pytest.approx(traces[part].value)
        assert alone.stderr == pytest.approx(traces[part].stderr)
    with pytest.raises(TwofoldError, match="parts"):
        c.traces(4, parts=("hesian",))


def test_an_estimate_reads_well():
    estimate = twofold.Estimate(12.3456, 0.5, 64)
    assert str(estimate) == "12.35 ± 0.5 (64 matvecs)"
    assert float(estimate) == 12.3456
