"""Traces and norms: exact where they must be, calibrated where they are random."""

import math

import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

import twofold
from models import CASES
from twofold import NotFiniteError, TwofoldError, TwofoldWarning
from twofold.curvature.probes import cosine_of, signs
from twofold.curvature.sampling import gram_of

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


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_standard_error_can_be_asked_for(estimator):
    A = torch.randn(30, 30)
    A = A + A.T
    truth, scores, counts = ESTIMATORS[estimator](A), [], []
    atol = estimator(A, 40).stderr
    for seed in range(200):
        found = estimator(A, 400, atol=atol, generator=torch.Generator().manual_seed(seed))
        assert found.stderr <= atol
        scores.append((found.value - truth) / found.stderr)
        counts.append(found.num_matvecs)
    assert min(counts) >= 10
    assert 20 < sum(counts) / 200 < 60
    # Stopping where the samples happen to agree neither biases the estimate nor hides its error.
    assert 0.5 < torch.tensor(scores).var().item() < 2
    assert abs(torch.tensor(scores).mean().item()) < 0.5


@pytest.mark.parametrize("estimator", [*ESTIMATORS, twofold.diagonal], ids=lambda estimator: estimator.__name__)
def test_what_did_not_become_precise_says_so(estimator):
    A = torch.randn(20, 20)
    with pytest.warns(TwofoldWarning, match="Raise num_matvecs: about"):
        found = estimator(A, 12, atol=1e-3)
    assert found.num_matvecs == 12
    with pytest.warns(TwofoldWarning, match="Raise num_matvecs"):
        estimator(A, 1, atol=1e-3)
    exact = estimator(torch.diag(torch.randn(20)), 50, atol=1e-6)
    assert exact.num_matvecs == 10
    for atol in (0.0, -1.0, math.nan, math.inf, True, "1"):
        with pytest.raises(TwofoldError, match="atol"):
            estimator(A, 12, atol=atol)


def test_xtrace_takes_no_standard_error():
    with pytest.raises(TwofoldError, match="hutchinson"):
        twofold.trace(torch.eye(3), 4, method="xtrace", atol=0.1)


def test_curvature_stops_where_all_its_matrices_are_precise():
    case = CASES["mlp"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    atol = max(estimate.stderr for estimate in c.traces(40).values())
    found = c.traces(500, atol=atol)
    assert all(estimate.stderr <= atol for estimate in found.values())
    assert 10 <= found["nme"].num_matvecs < 200
    assert found["hessian"].value == pytest.approx(found["gauss_newton"].value + found["nme"].value)
    blocks = c.traces(500, atol=atol, by_block="module", parts=("nme",))["nme"]
    assert all(estimate.stderr <= atol for estimate in blocks.values())
    norms = c.frobenius(500, atol=atol, parts=("nme",))["nme"]
    assert norms.stderr <= atol
    with pytest.warns(TwofoldWarning, match="num_matvecs"):
        c.traces(12, atol=atol / 100)
    with pytest.raises(TwofoldError, match="atol"):
        c.traces(12, atol=0)


XTRACE_SPECTRA = {
    "flat": torch.linspace(-1, 2, 100),
    "decaying": 0.9 ** torch.arange(100.0),
    "few_large": torch.cat([torch.tensor([20.0, -15, 10]), torch.linspace(-0.1, 0.1, 97)]),
    "smaller_than_the_basis": torch.linspace(-1, 2, 30),
}


def in_random_directions(values):
    Q = torch.linalg.qr(torch.randn(len(values), len(values)))[0]
    return (Q * values) @ Q.T


@pytest.mark.parametrize("spectrum", XTRACE_SPECTRA)
def test_standard_errors_of_xtrace_are_calibrated(spectrum):
    A = in_random_directions(XTRACE_SPECTRA[spectrum].double())
    truth, scores = A.trace().item(), []
    for seed in range(200):
        found = twofold.trace(A, 48, method="xtrace", generator=torch.Generator().manual_seed(seed))
        scores.append((found.value - truth) / found.stderr)
    scores = torch.tensor(scores)
    assert 0.5 < scores.var().item() < 2
    assert abs(scores.mean().item()) < 0.5


@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_standard_errors_of_few_xtrace_probes_are_calibrated(spectrum):
    A = in_random_directions(XTRACE_SPECTRA[spectrum].double())
    truth, scores = A.trace().item(), []
    for seed in range(200):
        found = twofold.trace(A, 12, method="xtrace", generator=torch.Generator().manual_seed(seed))
        scores.append((found.value - truth) / found.stderr)
    assert 0.5 < torch.tensor(scores).var().item() < 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_xtrace_is_the_mean_of_its_leave_one_out_estimates(symmetric):
    """The definition (2301.07825, with normalisation), with one basis built for every probe left out."""
    A = torch.randn(12, 12)
    A = A + A.T if symmetric else A
    probes = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    probes *= 12**0.5 / probes.norm(dim=0)
    samples = []
    for i in range(4):
        others = [j for j in range(4) if j != i]
        Q = torch.linalg.qr(A @ probes[:, others])[0]
        rest = probes[:, i] - Q @ (Q.T @ probes[:, i])
        samples.append((Q.T @ A @ Q).trace() + rest @ A @ rest * (12 - 3) / rest.square().sum())
    found = twofold.trace(A, 9, method="xtrace", generator=torch.Generator().manual_seed(1))
    assert found.value == pytest.approx(torch.stack(samples).mean().item(), rel=1e-10)
    assert found.num_matvecs == 8


def test_xtrace_is_exact_for_low_rank_and_for_small_matrices():
    basis = torch.randn(80, 5)
    A = basis @ torch.diag(torch.tensor([3.0, 2, 1, -1, -4])) @ basis.T
    found = twofold.trace(A, 20, method="xtrace")
    assert found.value == pytest.approx(A.trace().item(), rel=1e-10)
    assert found.num_matvecs == 15
    assert twofold.trace(torch.zeros(9, 9), 6, method="xtrace").value == 0
    small = torch.randn(4, 4)
    found = twofold.trace(small, 30, method="xtrace")
    assert found.value == pytest.approx(small.trace().item(), rel=1e-9)
    assert found.num_matvecs == 8
    single = twofold.trace(A.float(), 20, method="xtrace")
    assert single.value == pytest.approx(A.trace().item(), rel=1e-4)


def test_xtrace_beats_hutchinson_where_few_eigenvalues_rule():
    A = in_random_directions(XTRACE_SPECTRA["few_large"])
    found = twofold.trace(A, 24, method="xtrace")
    assert found.stderr < twofold.trace(A, 24).stderr / 15
    assert abs(found.value - A.trace().item()) < 4 * found.stderr
    assert found.value == pytest.approx(twofold.trace(A.numpy(), 24, method="xtrace").value, rel=1e-10)


def test_bad_arguments_of_trace_are_refused():
    with pytest.raises(TwofoldError, match="method"):
        twofold.trace(torch.eye(3), method="hutch++")
    with pytest.raises(TwofoldError, match="at least 2"):
        twofold.trace(torch.eye(3), 1, method="xtrace")
    assert math.isnan(twofold.trace(torch.randn(9, 9), 2, method="xtrace").stderr)


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


def test_inner_product_of_the_halves():
    case = CASES["mlp"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    G, N = c.gauss_newton.to_dense(), c.nme.to_dense()
    inner = (G * N).sum().item()
    cosine = inner / (G.norm() * N.norm()).item()
    scores = []
    for seed in range(200):
        found = c.inner(24, generator=torch.Generator().manual_seed(seed))
        scores.append(
            [(found.value.value - inner) / found.value.stderr, (found.cosine.value - cosine) / found.cosine.stderr]
        )
    variance = torch.tensor(scores).var(0)
    assert ((variance > 0.5) & (variance < 2)).all()
    found, norms = c.inner(50), c.frobenius(50)
    assert found.value.num_matvecs == found.cosine.num_matvecs == 50
    squares = {part: norm.value**2 for part, norm in norms.items()}
    difference = squares["hessian"] - squares["gauss_newton"] - squares["nme"]
    assert found.value.value == pytest.approx(difference / 2)
    assert "cosine" in str(found)


def test_standard_errors_of_blocks_are_calibrated():
    case = CASES["linear"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    G, scores = c.gauss_newton.to_dense(), []
    sizes = {name: parameter.numel() for name, parameter in case.model.named_parameters()}
    blocks = dict(zip(sizes, torch.arange(len(G)).split(list(sizes.values())), strict=True))
    assert len(blocks) > 1
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        found = c.traces(12, parts=("gauss_newton",), by_block="parameter", generator=generator)["gauss_newton"]
        scores.append(
            [(found[name].value - G[rows, rows].sum().item()) / found[name].stderr for name, rows in blocks.items()]
        )
    variance = torch.tensor(scores).var(0)
    assert ((variance > 0.5) & (variance < 2)).all()


def test_the_cosine_with_nothing_is_unknown():
    case = CASES["linear"]()
    found = twofold.Curvature(case.model, case.loss_fn, case.batches).inner(4)
    assert found.value.value == 0
    assert math.isnan(found.cosine.value)


def test_an_estimate_reads_well():
    estimate = twofold.Estimate(12.3456, 0.5, 64)
    assert str(estimate) == "12.35 ± 0.5 (64 matvecs)"
    assert float(estimate) == 12.3456


@pytest.mark.parametrize(
    "estimator",
    [twofold.trace, twofold.frobenius_norm, twofold.diagonal, twofold.eigsh, twofold.spectral_density],
    ids=lambda estimator: estimator.__name__,
)
def test_estimates_do_not_depend_on_the_callers_autocast(estimator):
    A = torch.randn(40, 40, dtype=torch.float32)
    A = A + A.T
    expected = str(estimator(A))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert str(estimator(A)) == expected


def test_signs_are_fair_and_independent():
    n = 200_001
    drawn = signs(n, torch.Generator().manual_seed(0)).double()
    assert drawn.shape == (n,)
    assert drawn.abs().eq(1).all()
    assert abs(drawn.sum().item()) < 4 * n**0.5
    for lag in (1, 2, 4, 8, 16, 64):  # within a drawn word and from word to word
        assert abs((drawn[lag:] * drawn[:-lag]).sum().item()) < 4 * n**0.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("entry", [math.nan, math.inf, 1e200], ids=str)
def test_samples_out_of_range_are_refused(estimator, entry):
    A = torch.diag(torch.tensor([1.0, entry]))
    if estimator is twofold.trace and entry == 1e200:
        assert estimator(A, num_matvecs=2).value == pytest.approx(1e200)
        return
    with pytest.raises(NotFiniteError, match="not finite"):
        estimator(A, num_matvecs=2)


def test_inner_products_of_half_precision_neither_vanish_nor_overflow():
    vectors = [torch.tensor([2.0**-14, 2.0**-15]).half(), torch.tensor([2.0**12, 2.0**13]).half()]
    torch.testing.assert_close(gram_of(vectors), torch.tensor([[1.25 * 2.0**-28, 0.5], [0.5, 5 * 2.0**24]]))


def test_cosines_do_not_depend_on_scale():
    samples = [1.0, 2.0, 1.5], [4.0, 5.0, 6.0], [1.0, 2.0, 3.0]
    cosine = cosine_of(*samples)
    for scale in (1e-180, 1e180):
        scaled = cosine_of(*([scale * value for value in one] for one in samples))
        assert scaled.value == pytest.approx(cosine.value)
        assert scaled.stderr == pytest.approx(cosine.stderr)
