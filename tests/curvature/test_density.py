"""Spectral densities: exact quadrature, mass one, calibrated errors, refusals."""

import math

import pytest
import torch

import twofold
from models import CASES
from twofold import TwofoldError

pytestmark = pytest.mark.usefixtures("float64")


def symmetric(values):
    Q = torch.linalg.qr(torch.randn(len(values), len(values)))[0]
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


@pytest.mark.parametrize(
    "values",
    [
        torch.cat([torch.tensor([20.0, 10, 5, 2, 1]), torch.linspace(0, 1e-3, 180)]),
        torch.linspace(-3, 1, 60),
        torch.ones(40),
        torch.zeros(40),
        torch.tensor([2.0]),
    ],
)
def test_the_density_integrates_to_one(values):
    found = twofold.spectral_density(symmetric(values), num_probes=3, steps=20)
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1, abs=1e-5)
    assert (found.density >= 0).all()
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3))
    assert (found.weights >= 0).all()


def test_all_steps_give_the_exact_curve_of_a_diagonal_matrix():
    values = torch.tensor([-2.0, 0.5, 0.5, 3.0, 4.0])
    found = twofold.spectral_density(torch.diag(values), num_probes=2, sigma=0.1)
    curves = torch.exp(-0.5 * ((found.grid - values[:, None]) / 0.1) ** 2) / (0.1 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(found.density, curves.mean(0))
    torch.testing.assert_close(found.stderr, torch.zeros_like(found.grid))
    assert found.num_matvecs == 8  # four distinct eigenvalues
    assert found.integrate(lambda x: x.abs()).value == pytest.approx(values.abs().mean().item())


def test_quadrature_is_exact_for_polynomials():
    A = symmetric(torch.randn(50))
    found = twofold.spectral_density(A, num_probes=4, steps=3)
    for power in range(6):
        matrix = torch.linalg.matrix_power(A, power)
        alone = twofold.trace(matrix, 4)  # the same probes
        integral = found.integrate(lambda x, power=power: x**power)
        assert integral.value == pytest.approx(alone.value / 50, abs=1e-10)
        assert integral.num_matvecs == 12
    with_five = twofold.spectral_density(A, num_probes=4, steps=5).integrate(lambda x: x**6).value
    assert found.integrate(lambda x: x**6).value != pytest.approx(with_five, rel=1e-6)


def test_standard_errors_are_calibrated():
    values, grid = torch.linspace(-1.5, 1.5, 30), torch.linspace(-1.4, 1.4, 7)
    A, functions = symmetric(values), (torch.exp, torch.abs, torch.square)
    curve = torch.exp(-0.5 * ((grid - values[:, None]) / 0.3) ** 2).mean(0) / (0.3 * math.sqrt(2 * math.pi))
    scores = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        found = twofold.spectral_density(A, num_probes=10, steps=14, grid=grid, sigma=0.3, generator=generator)
        integrals = [found.integrate(f) for f in functions]
        truths = [f(values).mean().item() for f in functions]
        scores.append(
            [(integral.value - truth) / integral.stderr for integral, truth in zip(integrals, truths, strict=True)]
            + ((found.density - curve) / found.stderr).tolist()
        )
    scores = torch.tensor(scores)
    assert ((scores.var(0) > 0.5) & (scores.var(0) < 2)).all()
    assert (scores.mean(0).abs() < 0.5).all()


def test_no_node_is_a_ghost():
    A = symmetric(torch.cat([torch.tensor([20.0, 10, 5, 2, 1]), torch.linspace(0, 1e-3, 180)])).float()
    found = twofold.spectral_density(A, num_probes=2, steps=60)
    for nodes in found.nodes:
        for value in (20, 10, 5, 2, 1):
            assert ((nodes - value).abs() < 1e-3).sum() == 1


def test_both_halves_of_a_model_on_a_common_grid():
    case = CASES["mlp"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    nme = twofold.spectral_density(c.nme, num_probes=20)
    gauss_newton = twofold.spectral_density(c.gauss_newton, num_probes=20, grid=nme.grid, sigma=nme.sigma)
    assert torch.equal(nme.grid, gauss_newton.grid)
    size = c.nme.shape[0]
    for density, operator in ((nme, c.nme), (gauss_newton, c.gauss_newton)):
        square = density.integrate(torch.square)
        truth = operator.to_dense().square().sum().item() / size
        assert abs(square.value - truth) < 4 * square.stderr
        assert size * density.integrate(lambda x: x).value == pytest.approx(twofold.trace(operator, 20).value)
    moved = nme.on(torch.linspace(-9, 9, 2001), sigma=0.5)
    assert torch.trapezoid(moved.density, moved.grid).item() == pytest.approx(1)
    assert torch.equal(moved.nodes, nme.nodes)


def test_one_probe_has_no_standard_error():
    found = twofold.spectral_density(symmetric(torch.randn(9)), num_probes=1)
    assert found.stderr.isnan().all()
    assert math.isnan(found.integrate(torch.exp).stderr)


def test_same_call_same_numbers_and_no_global_randomness():
    A = symmetric(torch.randn(30))
    before = torch.get_rng_state()
    first, second = (twofold.spectral_density(A, num_probes=2, steps=5) for _ in range(2))
    assert torch.equal(first.density, second.density)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(1)
    third = twofold.spectral_density(A, num_probes=2, steps=5, generator=generator)
    assert not torch.equal(first.nodes, third.nodes)


@pytest.mark.parametrize(
    ("operator", "arguments", "match"),
    [
        (torch.randn(30, 30), {}, "not symmetric"),
        (torch.full((3, 3), torch.nan), {}, "not finite"),
        (torch.ones(3, 2), {}, "Expected"),
        (torch.eye(3), {"num_probes": 0}, "num_probes"),
        (torch.eye(3), {"steps": 0}, "steps"),
        (torch.eye(3), {"sigma": 0.0}, "sigma"),
        (torch.eye(3), {"grid": torch.tensor([1.0, 0.0])}, "grid"),
        (torch.eye(3), {"grid": torch.tensor([1.0])}, "grid"),
    ],
)
def test_bad_input_is_refused(operator, arguments, match):
    with pytest.raises(TwofoldError, match=match):
        twofold.spectral_density(operator, **arguments)


def test_halves_share_probes_grid_and_width():
    case = CASES["mlp"]()
    c = twofold.Curvature(case.model, case.loss_fn, case.batches)
    generator = torch.Generator().manual_seed(2)
    found = c.spectral_densities(num_probes=3, steps=12, generator=generator)
    alone = twofold.spectral_density(c.nme, num_probes=3, steps=12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found["nme"].nodes, alone.nodes)
    assert len({density.sigma for density in found.values()}) == 1
    for density in found.values():
        assert torch.equal(density.grid, found["hessian"].grid)
        assert torch.trapezoid(density.density, density.grid).item() == pytest.approx(1, abs=1e-5)
    means = {part: density.integrate(lambda x: x).value for part, density in found.items()}
    assert means["hessian"] == pytest.approx(means["gauss_newton"] + means["nme"])
    split = c.spectral_densities(parts=("activation_nme", "rest"), num_probes=2, steps=4, sigma=0.5)
    assert {density.sigma for density in split.values()} == {0.5}
    with pytest.raises(TwofoldError, match="parts"):
        c.spectral_densities(parts=("nmee",))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_krylov_space_that_ends_early_is_no_error(rank):
    values = torch.zeros(60)
    values[:rank] = torch.tensor([4.0, -2.0, 1.0])[:rank]
    found = twofold.spectral_density(symmetric(values), num_probes=4, steps=40)
    assert found.num_matvecs <= 4 * (rank + 2)  # rounding may add one
    assert found.integrate(torch.square).value * 60 < 8 * values.square().sum().item() + 1e-12
    zeros = (found.weights * (found.nodes.abs() < 1e-9)).sum(1)
    assert (zeros > 0.5).all()


def test_a_width_that_no_grid_can_show_is_refused():
    with pytest.raises(TwofoldError, match="Pass a grid"):
        twofold.spectral_density(symmetric(torch.linspace(-1, 1, 20)), sigma=1e-9)
