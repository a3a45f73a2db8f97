import copy
import functools
import json
import math
import operator
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twofold
from models import CASES, classification, mlp
from references import dense
from twofold import CurvatureReport, Estimate, TwofoldError
from twofold.curvature.budget import seconds_of
from twofold.curvature.measure import STAGES
from twofold.curvature.report import Cost, blocks_of

MATRICES = ["hessian", "gauss_newton", "nme", "activation_nme", "rest"]


def measured(case, **options):
    options = {"num_probes": 8, "forward": case.forward} | options
    return twofold.measure(case.model, case.loss_fn, case.batches, **options)


def without_cost(report):
    return replace(report, cost=Cost(0.0, 0, 0))


@pytest.fixture(scope="module")
def small():
    """One report that has everything, of a model with two batches."""
    torch.manual_seed(0)
    return measured(classification(mlp(4, 5, 4, 3), sizes=(7, 3)))


@pytest.mark.parametrize(
    "name", ["ragged", "tied", "checkpoint", "sum", "LSTM", "forward=", "class weights and smoothing"]
)
def test_what_is_exact_equals_dense_brute_force(float64, name):
    case = CASES[name]()
    reference = dense(case.model, case.loss_fn, case.batches, case.counts, forward=case.forward)
    report = measured(case, num_probes=2)
    curvature = twofold.Curvature(case.model, case.loss_fn, case.batches, forward=case.forward)
    g = curvature.gradient()
    assert report.loss == pytest.approx(curvature.loss(), rel=1e-12)
    assert report.gradient_norm == pytest.approx(g.norm().item(), rel=1e-12)
    assert report.num_parameters == len(g)
    for matrix in ("hessian", "gauss_newton", "nme"):
        A = getattr(reference, matrix)
        scale = reference.hessian.norm().item()
        assert report.along_gradient[matrix] == pytest.approx((g @ A @ g / (g @ g)).item(), abs=1e-9 * scale)
    values = torch.linalg.eigvalsh(reference.hessian)
    expected = torch.cat([values[:3], values[-3:]])
    for eigenvalue, wanted in zip(report.eigenvalues, expected.tolist(), strict=True):
        assert abs(eigenvalue.value - wanted) <= eigenvalue.residual + 1e-9
        assert eigenvalue.residual <= 1e-3 * values.abs().max()
        assert eigenvalue.gauss_newton + eigenvalue.nme == pytest.approx(eigenvalue.value, abs=1e-9)


def test_halves_of_an_eigenvalue_are_those_of_its_eigenvector(float64):
    case = classification(mlp(4, 5, 3))
    reference = dense(case.model, case.loss_fn, case.batches, case.counts)
    values, vectors = torch.linalg.eigh(reference.hessian)
    for eigenvalue, at in zip(measured(case, num_eigenvalues=2).eigenvalues, (0, -1), strict=True):
        v = vectors[:, at]
        assert eigenvalue.value == pytest.approx(values[at].item(), abs=1e-6)
        assert eigenvalue.gauss_newton == pytest.approx((v @ reference.gauss_newton @ v).item(), abs=2e-3)
        assert eigenvalue.nme == pytest.approx((v @ reference.nme @ v).item(), abs=2e-3)


def test_estimates_lie_within_their_errors(float64):
    case = classification(mlp(4, 5, 4, 3), sizes=(7, 3))
    reference = dense(case.model, case.loss_fn, case.batches, case.counts)
    report = measured(case, num_probes=200)
    G, N = reference.gauss_newton, reference.nme
    truth = [(report.nme_ratio, N.norm() / G.norm()), (report.cosine, (G * N).sum() / (G.norm() * N.norm()))]
    for matrix in ("hessian", "gauss_newton", "nme"):
        A = getattr(reference, matrix)
        truth += [(report.traces[matrix], A.trace()), (report.frobenius[matrix], A.norm())]
        at = 0
        for name, parameter in case.model.named_parameters():
            end = at + parameter.numel()
            truth.append((report.block_traces[name][matrix], A[at:end, at:end].trace()))
            at = end
    for estimate, value in truth:
        assert abs(estimate.value - value.item()) <= 4.5 * estimate.stderr + 1e-10
        assert estimate.num_matvecs == 200


def test_the_parts_agree_with_curvature_on_the_same_probes(small):
    torch.manual_seed(0)
    case = classification(mlp(4, 5, 4, 3), sizes=(7, 3))
    curvature = twofold.Curvature(case.model, case.loss_fn, case.batches)
    traces, norms = curvature.traces(8, parts=MATRICES), curvature.frobenius(8, parts=MATRICES)
    for matrix in MATRICES:
        assert small.traces[matrix].value == pytest.approx(traces[matrix].value, rel=1e-4, abs=1e-5)
        assert small.traces[matrix].stderr == pytest.approx(traces[matrix].stderr, rel=1e-3, abs=1e-5)
        assert small.frobenius[matrix].value == pytest.approx(norms[matrix].value, rel=1e-4)
    cosine = curvature.inner(8).cosine
    assert small.cosine.value == pytest.approx(cosine.value, rel=1e-4, abs=1e-6)
    assert small.cosine.stderr == pytest.approx(cosine.stderr, rel=1e-3)


def test_blocks_add_up(small):
    parameters = [name for name in small.block_traces if name.endswith(("weight", "bias"))]
    modules = [name for name in small.block_traces if name not in parameters]
    assert modules == ["0", "2", "4"]
    for matrix in MATRICES:
        for names in (parameters, modules):
            total = math.fsum(small.block_traces[name][matrix].value for name in names)
            assert total == pytest.approx(small.traces[matrix].value, rel=1e-12, abs=1e-12)


class Scalars(nn.Module):
    """Parameters of one entry each, so that probes of a block are exact."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor([value])) for value in (0.3, -0.7, 1.1))

    def forward(self, x):
        return self.c * torch.tanh(self.b * torch.tanh(self.a * x))


def test_norms_of_blocks(float64):
    model, x, y = Scalars(), torch.randn(6, 1), torch.randn(6, 1)
    reference = dense(model, F.mse_loss, [(x, y)])
    blocks = twofold.measure(model, nn.MSELoss(), (x, y)).block_norms
    assert list(blocks) == ["hessian", "gauss_newton", "nme"]
    for matrix, norms in blocks.items():
        assert norms.blocks == ("a", "b", "c")
        found, wanted = norms.value, getattr(reference, matrix).abs()
        assert (found - wanted).abs().max() <= 1e-9 * wanted.max()


def test_densities_share_a_grid_and_hold_the_traces(small):
    assert list(small.densities) == ["hessian", "gauss_newton", "nme"]
    grid = small.densities["hessian"].grid
    for density in small.densities.values():
        assert torch.equal(density.grid, grid)
        assert torch.trapezoid(density.density, grid).item() == pytest.approx(1.0, abs=1e-3)
    for name, density in small.densities.items():
        mean = density.integrate(lambda x: x)
        trace = small.traces[name]
        gap = abs(small.num_parameters * mean.value - trace.value)
        assert gap <= 5 * (small.num_parameters * mean.stderr + trace.stderr)


def test_anatomy_is_a_sum(small):
    assert list(small.anatomy) == ["loss", "activation", "product", "normalisation", "attention", "other"]
    assert math.fsum(part.share for part in small.anatomy.values()) == pytest.approx(1.0, abs=1e-4)
    assert small.anatomy["loss"].share == pytest.approx(small.gradient_shares["gauss_newton"], rel=1e-3)


def test_live_fraction():
    case = classification(mlp(4, 6, 3, act=nn.ReLU))
    report = measured(case)
    assert report.live_fraction == 0
    assert report.traces["activation_nme"] == Estimate(0.0, 0.0, 8)
    linear = measured(classification(nn.Linear(4, 3)))
    assert linear.live_fraction is None
    assert "No activation" in linear.left_out["live fraction of phi''"]
    assert linear.nme_ratio.value == 0
    assert math.isnan(linear.cosine.value)
    assert "nan" not in str(linear.traces["nme"])


def test_the_same_call_gives_the_same_report(small):
    torch.manual_seed(0)
    again = measured(classification(mlp(4, 5, 4, 3), sizes=(7, 3)))
    assert without_cost(again) == without_cost(small)
    assert list(again.to_dict()) == [*(["format"]), *(field.name for field in fields(CurvatureReport))]
    other = torch.Generator().manual_seed(7)
    torch.manual_seed(0)
    seeded = measured(classification(mlp(4, 5, 4, 3), sizes=(7, 3)), generator=other)
    assert seeded.policy["seed"] == 7
    assert seeded.traces != small.traces


def test_params_and_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    case = classification(model)
    report = measured(case, params="3.*", mode="eval")
    assert report.num_parameters == 18
    assert list(report.block_traces) == ["3", "3.weight", "3.bias"]
    assert report.policy["mode"] == "eval mode"
    assert report.policy["num_batches"] == 1
    assert report.policy["num_terms"] == 10
    assert measured(case, params="3.*").policy["mode"] == "train mode (as found)"
    model[1].eval()
    assert measured(case, params="3.*").policy["mode"] == "mixed modes (as found)"


def test_read_only():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Dropout(0.5), nn.Linear(5, 3))
    model[0].weight.grad = torch.ones(5, 4)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    measured(classification(model, n=8, sizes=(5, 3)), mode="train") and None
    state_after = torch.get_rng_state()
    torch.set_rng_state(state)
    classification(model, n=8, sizes=(5, 3))  # draws the data
    assert torch.equal(torch.get_rng_state(), state_after)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model[0].weight.grad, torch.ones(5, 4))
    assert model[4].weight.grad is None
    assert all(p.requires_grad for p in model.parameters())


def test_progress_goes_through_the_stages_in_order():
    told = []
    measured(classification(mlp(4, 5, 3)), progress=lambda stage, fraction: told.append((stage, fraction)))
    assert list(dict.fromkeys(stage for stage, _ in told)) == list(STAGES)
    for stage in STAGES:
        fractions = [fraction for name, fraction in told if name == stage]
        assert fractions == sorted(fractions)
        assert 0 <= fractions[0] <= fractions[-1] == 1


def test_a_short_budget_measures_the_most_important_and_says_what_is_left_out():
    report = measured(classification(mlp(4, 5, 3)), budget=1e-6, num_probes=50)
    assert report.traces["hessian"].num_matvecs == 2
    assert math.isfinite(report.gradient_shares["nme"])
    assert report.eigenvalues == ()
    assert report.densities == report.anatomy == report.block_norms == {}
    assert {"probes", "eigenvalues", "spectral densities", "anatomy", "norms of blocks"} <= set(report.left_out)
    assert "2 of 50" in report.left_out["probes"]
    assert all("budget of 1e-06 s" in why for why in report.left_out.values())
    for name in report.left_out:
        assert f"Left out: {name}" in str(report)
    assert CurvatureReport.from_dict(report.to_dict()) == report
    assert report.plot() is not None


def test_little_memory_is_told():
    case = classification(mlp(8, 30, 3), (8,))
    per_vector = 4 * sum(p.numel() for p in case.model.parameters())
    report = measured(case, memory=int(14 * per_vector / 0.75))
    assert len(report.eigenvalues) == 3
    assert "14 vectors fit the memory" in report.left_out["eigenvalues"]
    assert "4 x 12 Lanczos steps, not 4 x 40" in report.left_out["accuracy of the spectral densities"]
    assert report.left_out["anatomy"].startswith("14 vectors fit")
    none = measured(case, memory=0)
    assert none.eigenvalues == ()
    assert none.densities == {}
    assert none.traces == report.traces


def test_what_cannot_be_told_apart_is_left_out():
    report = measured(CASES["checkpoint"]())
    assert {"hessian", "gauss_newton", "nme"} <= set(report.traces)
    if "activation NME and rest" in report.left_out:
        assert list(report.traces) == ["hessian", "gauss_newton", "nme"]
    assert CurvatureReport.from_dict(report.to_dict()) == report


def test_save_and_load(small, tmp_path):
    path = tmp_path / "report.json"
    small.save(path)
    loaded = CurvatureReport.load(path)
    assert loaded == small
    assert str(loaded) == str(small)
    assert loaded.to_dict() == small.to_dict()
    assert torch.equal(loaded.densities["nme"].nodes, small.densities["nme"].nodes)
    assert loaded != replace(small, loss=0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_numbers_that_are_not_finite_survive(small, tmp_path):
    odd = replace(
        small, loss=math.inf, cosine=Estimate(math.nan, math.nan, 1), along_gradient={"hessian": -math.inf, "nme": 0.0}
    )
    odd.save(tmp_path / "odd.json")
    assert CurvatureReport.load(tmp_path / "odd.json") == odd
    assert "NaN" not in json.dumps(small.to_dict())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no curvature report"),
        ("{]", "holds no curvature report"),
        ("[1, 2]", "holds no curvature report"),
        ('{"format": "other"}', "other"),
        ('{"format": "twofold.CurvatureReport/1"}', "damaged: model is missing"),
    ],
    ids=["empty", "not JSON", "list", "other", "half"],
)
def test_what_is_no_report_is_refused(tmp_path, content, said):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(TwofoldError, match=said) as caught:
        CurvatureReport.load(path)
    assert str(path) in str(caught.value)


def test_every_field_is_needed(small):
    values_of = small.to_dict()
    for name in values_of:
        with pytest.raises(TwofoldError):
            CurvatureReport.from_dict({other: value for other, value in values_of.items() if other != name})
        wrong = {"odd": 1} if isinstance(values_of[name], int | float) else 17
        with pytest.raises(TwofoldError):
            CurvatureReport.from_dict({**values_of, name: wrong})


def places(values, *path):
    """The path of every mapping and list of a report."""
    if isinstance(values, dict | list):
        yield path
        for key, item in values.items() if isinstance(values, dict) else enumerate(values):
            yield from places(item, *path, key)


def outcome(file):
    try:
        return CurvatureReport.load(file), ""
    except TwofoldError as error:
        return None, str(error)


def test_what_is_emptied_or_missing_is_refused_by_field_or_prints_all_the_same(small, tmp_path):
    values, file = small.to_dict(), tmp_path / "report.json"
    values["block_traces"] = dict(list(values["block_traces"].items())[:3])
    for density in values["densities"].values():
        density |= {name: curve[:5] for name, curve in density.items() if isinstance(curve, list)}
    refused, emptied = set(), set()
    for path in places(values):
        inside = functools.reduce(operator.getitem, path, values)
        for gone in [None, *(inside if isinstance(inside, dict) else [])]:
            damaged = json.loads(json.dumps(values))
            place = functools.reduce(operator.getitem, path, damaged)
            place.clear() if gone is None else place.pop(gone)
            file.write_text(json.dumps(damaged))
            loaded, error = outcome(file)
            if error:
                assert str(file) in error
                assert not path or path[0] in error
                refused.add((*path, gone))
                continue
            assert str(loaded)
            if len(path) == 1 and gone is None:
                assert loaded.plot() is not None
                emptied.add(path[0])
    assert emptied == {"block_traces", "eigenvalues", "block_norms", "densities", "anatomy", "left_out"}
    for field, gone in (("frobenius", "nme"), ("along_gradient", "hessian"), ("policy", "mode"), ("cost", "seconds")):
        assert {(field, None), (field, gone)} <= refused


def test_a_failed_save_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    small.save(path)
    before = path.read_bytes()
    with pytest.raises(TwofoldError, match="cannot be written"):
        small.save(tmp_path / "missing" / "report.json")
    with pytest.raises(TypeError):
        replace(small, model=object()).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(TwofoldError, match="cannot be read"):
        CurvatureReport.load(tmp_path / "missing.json")


def test_text_begins_with_the_share_of_the_nme(small):
    lines = str(small).splitlines()
    assert 25 <= len(lines) <= 45
    assert max(map(len, lines)) <= 100
    assert f"{small.num_parameters:,} parameters; 2 batches, 10 terms" in lines[1]
    assert lines[3].startswith("NME / GN")
    assert f"{100 * small.gradient_shares['nme']:.1f} %" in lines[3]


def test_plot_draws_a_panel_for_each_part(small):
    titles = {axes.get_title(loc="left") for axes in small.plot().axes}
    assert {
        "Spectral densities",
        "Frobenius norms",
        "Traces",
        "Eigenvalues of H, and their halves",
        "GN: norms of blocks",
        "NME: norms of blocks",
    } <= titles
    bare = replace(
        small, densities={}, eigenvalues=(), block_norms={}, anatomy={}, along_gradient={"hessian": math.nan}
    )
    assert {axes.get_title(loc="left") for axes in bare.plot().axes} >= {"Frobenius norms", "Traces"}


def test_plot_without_matplotlib_names_the_way_out(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "twofold.curvature.report_figure", raising=False)
    with pytest.raises(TwofoldError, match="pip install matplotlib"):
        small.plot()


def test_measuring_loads_no_matplotlib():
    code = (
        "import sys, torch, twofold; from torch import nn; "
        "print(len(str(twofold.measure(nn.Linear(2, 2), nn.MSELoss(), (torch.ones(1, 2), torch.ones(1, 2))))) > 0, "
        "'matplotlib' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["True", "False"]


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [("60s", 60), ("5min", 300), ("1.5h", 5400), ("10", 10), (2, 2), (0.5, 0.5), (None, math.inf), (" 3 min ", 180)],
    ids=str,
)
def test_budgets(budget, seconds):
    assert seconds_of(budget) == seconds


@pytest.mark.parametrize("budget", ["soon", "", "-3s", 0, -1, math.nan, math.inf, True, "5 years", [1]], ids=repr)
def test_budgets_that_are_none(budget):
    with pytest.raises(TwofoldError, match="budget is a positive time"):
        measured(classification(mlp(4, 5, 3)), budget=budget)


@pytest.mark.parametrize(
    "options", [{"num_probes": 1}, {"num_eigenvalues": 0}, {"mode": "test"}, {"memory": -1}], ids=str
)
def test_bad_arguments_are_refused(options):
    with pytest.raises(TwofoldError):
        measured(classification(mlp(4, 5, 3)), **options)


def test_blocks_are_cut_where_names_are():
    names = ["tok.weight", "h.0.a.weight", "h.0.a.bias", "h.1.a.weight", "scale"]
    assert list(blocks_of(names, 9)) == names
    assert list(blocks_of(names, 4)) == ["tok.weight", "h.0.a", "h.1.a", "scale"]
    assert list(blocks_of(names, 3)) == ["tok", "h", "scale"]
    assert list(blocks_of(names, 1)) == ["tok", "h", "scale"]
