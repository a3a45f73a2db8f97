"""Figures that the paper does not have: the NME's share, and what predicts SAM's correction."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from lab.synthetic import noise, table_of
from twofold.lab.figures import find_figure, style
from twofold.lab.figures.along_training import at_end, at_start, measurements, numbers_by_step, over_time
from twofold.lab.figures.scales import find_scale

QUICK = find_scale("quick")
STEPS = (0, 64, 128)


def with_metrics(name, metrics_of):
    """The figure's runs, each with the metrics that `metrics_of(config)` makes."""
    figure = find_figure(name)
    table = table_of(figure, QUICK, lambda config, split: 50 + noise(config))
    configs = figure.runs(QUICK, "mnist1d")
    return figure, table.assign(metrics=[pd.DataFrame({"step": STEPS, **metrics_of(config)}) for config in configs])


def norms(config):
    """A share that falls from 1 to 0.25 with GELU and stays with ReLU; 10 % along the gradient; two layers."""
    falls = config.model.activation == "gelu"
    nme = [1.0 + 0.01 * noise(config), 0.5, 0.25 if falls else 1.0]
    measured = {
        "nme/frobenius_norm": nme,
        "nme/frobenius_norm_stderr": [0.1] * 3,
        "gauss_newton/frobenius_norm": [1.0] * 3,
    }
    for part, share in (("activation_nme", 0.8), ("rest", 0.2)):
        measured[f"{part}/frobenius_norm"] = [share * value for value in nme]
    for layer, size in (("linear0", 2.0), ("head", 4.0)):
        measured |= {f"nme/frobenius_norm/{layer}": nme, f"nme/frobenius_norm/{layer}_stderr": [0.1] * 3}
        measured[f"gauss_newton/frobenius_norm/{layer}"] = [size] * 3
    measured |= {"nme/along_gradient": [-0.1 * value for value in nme], "gauss_newton/along_gradient": [1.0] * 3}
    return {f"curvature/{name}": values for name, values in measured.items()}


def test_the_share_is_judged_by_its_fall():
    figure, table = with_metrics("share", norms)
    verdicts = {verdict.finding: verdict for verdict in figure.verdicts(table, QUICK)}
    falls = {finding: verdict for finding, verdict in verdicts.items() if "falls" in finding}
    assert len(falls) == 4
    for finding, verdict in falls.items():
        assert verdict.verdict == ("shows" if "GELU" in finding else "does not show")
        assert verdict.effect == pytest.approx(75 if "GELU" in finding else 0, abs=1)
    numbers = figure.numbers(table)
    assert len(numbers) == 6 * 4 * len(STEPS)
    last = numbers.query("activation == 'gelu' and step == 128 and labels == 'clean labels'").set_index("part")["share"]
    assert last.to_dict() == pytest.approx(
        {
            "NME": 25.0,
            "NME of phi''": 20.0,
            "NME without phi''": 5.0,
            "NME along the gradient": -2.5,
            "NME, layer linear0": 12.5,
            "NME, layer head": 6.25,
        }
    )


def test_the_parts_of_the_nme_are_judged():
    figure, table = with_metrics("share", norms)
    found = figure.verdicts(table, QUICK)
    mostly = [v for v in found if "most of the NME is that of phi''" in v.finding]
    assert [v.effect for v in mostly] == pytest.approx([60, 60])
    along = [v for v in found if "Along the gradient" in v.finding]
    means = {"GELU": 175 / 3, "ReLU": 250 / 3}
    for verdict in along:
        expected = next(mean for name, mean in means.items() if name in verdict.finding)
        assert verdict.effect == pytest.approx(0.9 * expected, abs=1)
    assert len(mostly) + len(along) == 6


def test_the_published_recipes_have_clean_labels_only():
    table = with_metrics("share", norms)[1]
    clean = table[table["data.label_noise"] == 0]
    assert all("noisy" not in v.finding for v in find_figure("share").verdicts(clean, find_scale("paper")))
    assert {config.data.label_noise for config in find_figure("share").runs(find_scale("paper"), "cifar10")} == {0}


def errors(config):
    """Relative errors that the paper's account of the failure expects."""
    relu = config.model.activation == "relu"
    own = 0.01 * noise(config)
    found = {"hessian": 0.6 if relu else 0.1, "hessian_without_activation_nme": 0.6 if relu else 0.3}
    found |= {"gauss_newton": 0.7 if relu else 0.4, "hessian_gaussian_2": 0.5, "hessian_gaussian_100": 0.9}
    return {
        f"fidelity/{name}/{quantity}": [value + own] * len(STEPS)
        for name, error in found.items()
        for quantity, value in (("relative_error", error), ("cosine", 1 - error))
    }


def test_the_mechanism_is_judged_by_errors_of_prediction():
    figure, table = with_metrics("mechanism", errors)
    verdicts = figure.verdicts(table, QUICK)
    assert [verdict.verdict for verdict in verdicts] == ["shows"] * 4
    assert [verdict.effect for verdict in verdicts] == pytest.approx([20, 30, 50, 10], abs=1)
    numbers = figure.numbers(table)
    assert len(numbers) == 2 * len(STEPS)
    assert numbers.query("activation == 'gelu'")["GN, error"].tolist() == pytest.approx([40] * 3, abs=1)
    assert numbers.query("activation == 'gelu'")["GN, cosine"].tolist() == pytest.approx([60] * 3, abs=1)


@pytest.mark.parametrize("name", ["share", "mechanism"])
def test_both_draw_and_survive_runs_that_never_measured(name):
    figure, table = with_metrics(name, norms if name == "share" else errors)
    assert len(figure.draw(table).axes) == (6 if name == "share" else 4)
    bare = table.assign(metrics=[pd.DataFrame({"step": [0]}) for _ in range(len(table))])
    assert figure.numbers(bare).empty
    assert {verdict.verdict for verdict in figure.verdicts(bare, QUICK)} == {"undecided"}


def test_share_and_mechanism_measure_the_same_runs():
    share, mechanism = (set(find_figure(name).runs(QUICK, "mnist1d")) for name in ("share", "mechanism"))
    assert mechanism < share


def test_measurements_that_are_not_finite_do_not_count():
    metrics = pd.DataFrame({"step": [0, 1, 2], "x": [1.0, 3.0, math.inf]})
    runs = pd.DataFrame({"seed": [100], "status": ["finished"], "metrics": [metrics]})
    quantities = {"x": lambda found: found["x"]}
    assert len(measurements(runs, quantities)) == 2
    assert at_start(runs, quantities)["x"].tolist() == [1.0]
    assert at_end(runs, quantities)["x"].tolist() == [3.0]
    assert over_time(runs, quantities)["x"].tolist() == [2.0]


def test_a_run_counts_once_at_a_step_and_as_diverged_where_it_was_measured():
    whole = pd.DataFrame({"step": [0, 1, 2], "x": [1.0, 2.0, 3.0]})
    ended = pd.DataFrame({"step": [0, 1, 1], "x": [1.0, 2.0, 4.0]})  # the first step of an epoch made it diverge
    runs = pd.DataFrame({"seed": [100, 101], "status": ["finished", "diverged"], "metrics": [whole, ended]})
    quantities = {"x": lambda found: found["x"]}
    rows = pd.DataFrame(numbers_by_step(runs, quantities))
    assert rows[["step", "seeds", "diverged", "x"]].values.tolist() == [[0, 2, 1, 1.0], [1, 2, 1, 3.0], [2, 1, 0, 3.0]]
    assert over_time(runs, quantities)["x"].tolist() == [2.0, 2.5]


@pytest.mark.parametrize("name", ["6", "9", "mechanism", "share"])
@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_figures_without_a_measurement_are_drawn(name, status):
    figure = find_figure(name)
    table = table_of(figure, QUICK, lambda config, split: 50.0).assign(status=status)
    table["metrics"] = [pd.DataFrame() for _ in range(len(table))]
    assert {verdict.verdict for verdict in figure.verdicts(table, QUICK)} == {"undecided"}
    with style.applied():
        assert style.to_svg(figure.draw(table, 3))


def verdicts_of(name, accuracy):
    figure = find_figure(name)
    return {v.finding: v for v in figure.verdicts(table_of(figure, QUICK, accuracy), QUICK)}


@pytest.mark.parametrize("samples", ["1", "2", "5", "20", "exact"])
def test_the_penalty_on_the_hessian_trace_is_judged_by_its_number_of_samples(samples):
    options = {"matrix": "hessian"} if samples == "exact" else {"num_probes": int(samples)}

    def accuracy(config, split):
        own = dict(config.regularizer.options)
        return 60 + noise(config) - (20 if own == options else 0)

    found = verdicts_of("samples", accuracy)
    judged = {finding: v.verdict for finding, v in found.items() if "breaks" in finding}
    assert len(judged) == 5
    assert [finding for finding, verdict in judged.items() if verdict == "shows"] == [
        f"The penalty on tr H breaks at the largest strength (samples: {samples})"
    ]
    better = found["With exact traces, tr GN helps more than tr H (equal strength)"]
    assert better.verdict == ("shows" if samples == "exact" else "does not show")


@pytest.mark.parametrize(("option", "number"), [("second_derivative", "2"), ("curvature", "10")])
def test_a_conv_net_is_judged_as_the_small_networks_are(option, number):
    def accuracy(config, split):
        regularizer = config.regularizer
        lacks = {
            "second_derivative": regularizer.second_derivative == "0",
            "curvature": dict(regularizer.options).get("curvature") == "gauss_newton",
        }
        return 60 + noise(config) - (5 if lacks[option] and split != "train" else 0)

    found = verdicts_of("conv", accuracy)
    assert len(found) == 9
    judged = {finding: v.verdict for finding, v in found.items() if "test accuracy" in finding}
    assert {finding[:2].strip(",") for finding, verdict in judged.items() if verdict == "shows"} == {number}
    assert list(judged.values()).count("shows") == 3


def test_a_net_with_batch_norm_is_taken_as_the_scale_has_it():
    (recipe,) = {config.model for config in find_figure("conv").runs(QUICK, "mnist1d") if config.seed == 100} - {
        replace(config.model, activation="relu") for config in find_figure("conv").runs(QUICK, "mnist1d")
    }
    assert (recipe.name, recipe.norm) == ("conv", "batch")
    paper = find_scale("paper")
    for data in paper.recipes:
        assert {c.model.name for c in find_figure("conv").runs(paper, data)} == {paper.recipe(data).model.name}


CURVES = ("conv", "leaky", "samples", "siblings", "slow", "transformer")


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("columns", [1, 3])
def test_legends_fit_and_points_stand_at_their_strength(name, columns):
    figure = find_figure(name)
    table = table_of(figure, QUICK, lambda config, split: 50 + noise(config))
    with style.applied():
        drawing = figure.draw(table, columns)
        drawing.draw_without_rendering()
        (legend,) = drawing.legends
        box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= drawing.bbox.x1
    for axes in drawing.axes:
        places = [x for line in axes.lines for x in line.get_xdata()]
        assert max(abs(x - round(x)) for x in places) < 0.4
        assert {round(x) for x in places} == set(axes.get_xticks())
