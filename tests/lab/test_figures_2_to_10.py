import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lab.synthetic import noise, table_of
from twofold import BetaGELU, Curvature
from twofold.lab.figures import figure_7, find_figure, style
from twofold.lab.figures import traces as traces_file
from twofold.lab.figures.scales import find_scale
from twofold.lab.runs import RunDirectory, load_table, run_id
from twofold.lab.training import train

QUICK = find_scale("quick")
NUMBERS = range(2, 11)


def plain(config, split):
    return 60.0 + noise(config)


def no_epochs(config):
    return pd.DataFrame({"epoch": [0, 25], "step": [0, 800]})


def table_with(number, accuracy=plain, epochs=no_epochs, scale=QUICK):
    """The runs of a figure with chosen accuracies and, under "metrics", chosen rows for each epoch."""
    figure = find_figure(number)
    table = table_of(figure, scale, accuracy)
    return table.assign(metrics=[epochs(config) for config in figure.runs(scale, "mnist1d")])


def verdicts_of(number, accuracy=plain, epochs=no_epochs, scale=QUICK):
    table = table_with(number, accuracy, epochs, scale)
    return {v.finding: v for v in find_figure(number).verdicts(table, scale)}


def one(found, *words):
    (verdict,) = [v for text, v in found.items() if all(word in text for word in words)]
    return verdict


def is_psam(config, activation):
    return config.model.activation == activation and config.regularizer.name == "gradient_penalty"


def phi_zero(config):
    return config.regularizer.second_derivative == "0"


def synthetic(config):
    return str(config.regularizer.second_derivative).startswith("gaussian")


def gauss_newton(config):
    return dict(config.regularizer.options).get("curvature") == "gauss_newton"


VARIANTS = {2: ("gelu", phi_zero, -1), 3: ("relu", synthetic, 1), 10: ("gelu", gauss_newton, -1)}
"""Figure: activation, what marks the variant, and whether the paper finds it better or worse than PSAM's own H."""


@pytest.mark.parametrize("number", VARIANTS)
@pytest.mark.parametrize(("effect", "expected"), [(4.0, "shows"), (-4.0, "opposite"), (0.0, "does not show")])
def test_variants_of_psam_in_test_accuracy(number, effect, expected):
    activation, is_variant, sign = VARIANTS[number]

    def accuracy(config, split):
        changed = is_psam(config, activation) and is_variant(config)
        return 60.0 + noise(config) + (sign * effect if changed and split != "train" else 0.0)

    found = verdicts_of(number, accuracy)
    judged = [v for text, v in found.items() if "test accuracy" in text]
    assert len(judged) == 3
    assert {v.verdict for v in judged} == {expected}
    assert all(v.effect == pytest.approx(effect, abs=0.5) for v in judged)


@pytest.mark.parametrize("number", VARIANTS)
@pytest.mark.parametrize(
    ("better", "worse", "expected"), [(1.0, 6.0, "shows"), (6.0, 1.0, "opposite"), (3.0, -3.0, "does not show")]
)
def test_variants_of_psam_in_distance_from_sam(number, better, worse, expected):
    activation, is_variant, sign = VARIANTS[number]

    def accuracy(config, split):
        if split != "train" or not is_psam(config, activation):
            return 60.0 + noise(config)
        variant = is_variant(config)
        return 60.0 + noise(config) + (better if variant == (sign > 0) else worse)

    (judged,) = [v for text, v in verdicts_of(number, accuracy).items() if "distance" in text]
    assert judged.verdict == expected
    # the difference of two distances is a distance again where both lie on one side
    assert judged.effect == pytest.approx(abs(worse) - abs(better), abs=0.5)


@pytest.mark.parametrize("number", VARIANTS)
def test_ranges_of_rho_are_judged_apart(number):
    activation, is_variant, sign = VARIANTS[number]

    def accuracy(config, split):
        small = config.regularizer.strength < 0.15
        changed = is_psam(config, activation) and is_variant(config)
        return 60.0 + noise(config) + (sign * (4.0 if small else -4.0) if changed else 0.0)

    found = verdicts_of(number, accuracy)
    assert [v.verdict for text, v in found.items() if "up to 0.15" in text] == ["shows"]
    assert [v.verdict for text, v in found.items() if "above 0.15" in text] == ["opposite"]


def test_gelu_without_second_derivative_like_relu():
    def like(values):
        def accuracy(config, split):
            kind = "without" if phi_zero(config) else config.model.activation
            start = 10.0 if config.model.activation == "relu" else 0.0  # a start apart is no difference
            return 60.0 + start + noise(config) + (values[kind] if is_psam(config, config.model.activation) else 0.0)

        (verdict,) = [v for text, v in verdicts_of(2, accuracy).items() if "behaves like ReLU" in text]
        return verdict.verdict

    assert like({"gelu": 8.0, "relu": 2.0, "without": 2.5}) == "shows"
    assert like({"gelu": 2.5, "relu": 2.0, "without": 8.0}) == "opposite"
    assert like({"gelu": 4.0, "relu": 2.0, "without": 0.0}) == "does not show"


@pytest.mark.parametrize("number", [2, 3, 4, 5, 10])
def test_numbers_hold_every_point_once(number):
    figure = find_figure(number)
    table = table_of(figure, QUICK, lambda config, split: 60.0 + noise(config))
    numbers = figure.numbers(table)
    keys = ["data", "curve", numbers.columns[2]]
    assert not numbers.duplicated(keys).any()
    sgd = numbers[numbers[keys[2]] == 0]
    assert set(sgd["curve"]) == set(numbers["curve"])
    # plain SGD is shared by all curves of an activation; every other run belongs to one curve
    runs = numbers.loc[numbers[keys[2]] > 0, "seeds"].sum() + len(QUICK.seeds) * table["model.activation"].nunique()
    assert number == 5 or runs == len(table)


# figures 4 and 5: strengths


def by_name(**drops):
    """Accuracy that a regularizer, at some strength of it, takes away."""

    def accuracy(config, split):
        drop = drops.get(config.regularizer.name, lambda strength: 0.0)
        return 60.0 + noise(config) - (drop(config.regularizer.strength) if config.regularizer.strength else 0.0)

    return accuracy


@pytest.mark.parametrize(("drop", "expected"), [(20.0, "shows"), (0.0, "does not show"), (-20.0, "opposite")])
def test_breaking_is_judged_at_the_largest_strength(drop, expected):
    found = verdicts_of(4, by_name(hessian_trace=lambda c: drop if c == 0.008 else 0.0))
    assert one(found, "tr H breaks").verdict == expected
    assert one(found, "weight noise breaks").verdict == "does not show"
    assert one(found, "tr GN still helps").verdict == "does not show"


def test_both_conventions_of_equal_strength():
    """Noise costs what its sigma^2 says, the penalty what its strength says: they agree where they are matched."""

    def cost(sigma_squared):
        return 1000 * sigma_squared

    accuracy = by_name(weight_noise=lambda sigma: cost(sigma**2), gauss_newton_trace=lambda c: cost(2 * c))
    matched = one(verdicts_of(4, accuracy), "matched")
    paper = one(verdicts_of(4, accuracy), "paper's convention")
    assert matched.effect == pytest.approx(0.0, abs=0.3)
    # sigma^2 tr GN stands at 2 sigma^2; the last of the strengths has no such partner
    assert paper.effect == pytest.approx(-sum(map(cost, (1e-3, 2e-3, 4e-3, 8e-3))) / 4, abs=0.3)


@pytest.mark.parametrize(("gain", "expected"), [(5.0, "opposite"), (-5.0, "shows"), (0.0, "does not show")])
@pytest.mark.parametrize(("name", "text"), [("weight_noise", "weight noise does not"), ("hessian_trace", "tr H does")])
def test_whether_noise_and_the_hessian_penalty_help_at_their_best(name, text, gain, expected):
    accuracy = by_name(**{name: lambda strength: -gain})
    assert one(verdicts_of(4, accuracy), text).verdict == expected


@pytest.mark.parametrize("beta", [2, 100])
def test_each_synthetic_bell_is_judged_where_it_runs(beta):
    def accuracy(config, split):
        helped = config.regularizer.second_derivative == f"gaussian:{beta}"
        return 60.0 + noise(config) + (5.0 if helped and split != "train" else 0.0)

    found = verdicts_of(3, accuracy, scale=find_scale("cpu"))
    helped = {finding for finding, verdict in found.items() if verdict.verdict == "shows"}
    assert helped == {finding for finding in found if f"beta {beta} (test" in finding}
    assert len(helped) == 3
    assert not any("beta 100" in finding for finding in verdicts_of(3, accuracy))


def test_a_diverged_run_is_told_where_the_effect_rests_on_it():
    figure = find_figure(6)
    table = table_with(6, epochs=traces(lambda config: (200.0, -50.0)))
    hit = table["regularizer.name"].eq("hessian_trace") & table["model.activation"].eq("gelu") & table["seed"].eq(101)
    table.loc[hit, "status"] = "diverged"
    told = {v.finding: v.diverged for v in figure.verdicts(table, QUICK)}
    assert one(told, "runs to negative") == one(told, "tr GN lower") == 1
    assert one(told, "control") == one(told, "keeps tr H positive") == 0


@pytest.mark.parametrize("scale", ["smoke", "quick", "cpu", "paper"])
def test_every_scale_has_strengths_for_both_conventions(scale):
    values = traces_file.SIGMA_SQUARED[scale]
    for factor in traces_file.CONVENTIONS.values():
        assert any(factor * value in values for value in values)


@pytest.mark.parametrize(("gain", "expected"), [(5.0, "shows"), (-5.0, "opposite"), (0.0, "does not show")])
def test_best_penalty_on_gauss_newton(gain, expected):
    found = verdicts_of(4, by_name(gauss_newton_trace=lambda c: -gain))
    assert one(found, "best penalty on tr GN helps").verdict == expected
    for other in ("weight noise (each", "tr H (each", "tr H (equal"):
        assert one(found, "more than " + other).verdict == expected


def test_two_seeds_of_figure_5_decide_nothing_and_ten_do():
    accuracy = by_name(hessian_trace=lambda c: 40.0)
    assert {v.verdict for v in verdicts_of(5, accuracy).values()} == {"undecided"}
    assert {v.verdict for v in verdicts_of(5, accuracy, scale=find_scale("cpu")).values()} == {"shows"}


# figure 6: traces along training


def traces(of_config):
    def epochs(config):
        gauss_newton, nme = of_config(config)
        scale = 1 + 0.01 * (config.seed % 3)
        columns = {"gauss_newton": gauss_newton, "nme": nme, "hessian": gauss_newton + nme}
        measured = {f"curvature/{m}/trace": [10.0, scale * value, math.nan] for m, value in columns.items()}
        accuracies = {"train/accuracy": [0.1, 0.5, 0.5], "test/accuracy": [0.1, 0.4, 0.4]}
        return pd.DataFrame({"epoch": [0, 12, 13], "step": [0, 384, 400], **accuracies, **measured})

    return epochs


@pytest.mark.parametrize(("nme", "expected"), [(-3000.0, "shows"), (500.0, "opposite"), (-200.0, "does not show")])
def test_penalised_trace_runs_negative(nme, expected):
    def of_config(config):
        return (200.0, nme if config.regularizer.name == "hessian_trace" and config.model.activation == "gelu" else 0.0)

    found = verdicts_of(6, epochs=traces(of_config))
    judged = one(found, "runs to negative")
    assert judged.verdict == expected
    assert judged.effect == pytest.approx(-100 * (200 + nme) / (200 + abs(nme)))
    assert one(found, "keeps tr H positive").effect == pytest.approx(100)
    assert one(found, "control").verdict == "shows"
    assert one(found, "tr GN lower").verdict == "does not show"


def test_traces_before_training_judge_no_run():
    def epochs(config):
        found = traces(lambda config: (200.0, -3000.0 if config.regularizer.name == "hessian_trace" else 0.0))(config)
        return found.where(found["step"].eq(0) | (config.seed > 100)).assign(step=found["step"])

    judged = {v.finding: v for v in find_figure(6).verdicts(table_with(6, epochs=epochs), QUICK)}
    assert one(judged, "runs to negative").seeds == 2
    assert one(judged, "runs to negative").effect == pytest.approx(100 * 2800 / 3200)


def test_the_table_of_traces_has_the_accuracies():
    table = find_figure(6).numbers(table_with(6, epochs=traces(lambda config: (200.0, -50.0))))
    assert table["train"].unique().tolist() == [10.0, 50.0]
    assert table["test"].unique().tolist() == [10.0, 40.0]


def test_a_trace_that_was_never_measured_is_undecided_and_drawn():
    table = table_with(6)
    assert {v.verdict for v in find_figure(6).verdicts(table, QUICK)} == {"undecided"}
    assert find_figure(6).numbers(table).empty
    with style.applied():
        assert style.to_svg(find_figure(6).draw(table, 3))


# figures 8 and 9: beta


def over_beta(**at_largest):
    def accuracy(config, split):
        largest = config.model.beta == 64
        return 60.0 + noise(config) - (at_largest.get(config.regularizer.name, 0.0) if largest else 0.0)

    return accuracy


@pytest.mark.parametrize(("fall", "expected"), [(9.0, "shows"), (-9.0, "opposite"), (0.0, "does not show")])
def test_psam_falls_with_beta(fall, expected):
    found = verdicts_of(8, over_beta(gradient_penalty=fall))
    assert one(found, "PSAM falls as").verdict == expected
    assert one(found, "more than SGD").verdict == expected
    assert one(found, "more than SAM").verdict == expected
    assert one(found, "parts from SAM").verdict == ("shows" if fall else "does not show")
    assert one(verdicts_of(8, over_beta(gradient_penalty=fall, sam=fall)), "more than SAM").verdict == "does not show"


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(0.3, 0.1, "shows"), (0.1, 0.3, "shows"), (0.99, 1.0, "does not show")]
)
def test_live_second_derivatives(before, after, expected):
    def epochs(config):
        large, shift = config.model.beta == 64, 0.001 * (config.seed % 3)
        values = [before - shift, math.nan, after - shift] if large else [1.0, math.nan, 1.0]
        return pd.DataFrame({"epoch": [0, 1, 2], "step": [0, 32, 64], "activation/live_fraction": values})

    found = verdicts_of(9, epochs=epochs)
    assert one(found, "before training").effect == pytest.approx(100 * (1 - before), abs=0.2)
    assert one(found, "after PSAM").effect == pytest.approx(100 * (1 - after), abs=0.2)
    assert {v.verdict for v in found.values()} == {expected}


def test_a_diverged_run_has_no_live_share_after_training():
    def epochs(config):
        live = [0.9, math.nan] if config.seed == 101 else [0.9, 0.4]
        return pd.DataFrame({"epoch": [0, 1], "step": [0, 3], "activation/live_fraction": live})

    table = find_figure(9).numbers(table_with(9, epochs=epochs))
    before = table["curve"].eq("before training")
    assert table.loc[before, ["seeds", "live"]].drop_duplicates().values.tolist() == [[3, 90.0]]
    assert table.loc[~before, ["seeds", "live"]].drop_duplicates().values.tolist() == [[2, 40.0]]


def test_live_second_derivatives_that_were_not_measured():
    assert {v.verdict for v in verdicts_of(9).values()} == {"undecided"}
    with style.applied():
        assert style.to_svg(find_figure(9).draw(table_with(9), 3))


def test_figure_9_runs_nothing_beyond_figure_8():
    for scale in map(find_scale, ("smoke", "quick", "cpu")):
        assert set(find_figure(9).runs(scale, "mnist1d")) < set(find_figure(8).runs(scale, "mnist1d"))


# figure 7: the toy


@pytest.mark.parametrize("beta", [1.0, 16.0, math.inf])
def test_the_toy_is_the_network_that_it_says(beta):
    toy = figure_7.Toy.draw(101)
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU() if math.isinf(beta) else BetaGELU(beta), nn.Linear(2, 1)).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor(toy.b, dtype=torch.float64))
        model[2].weight.copy_(torch.tensor([toy.a], dtype=torch.float64))
        model[2].bias.zero_()
    batch = tuple(torch.tensor([[number]], dtype=torch.float64) for number in (toy.x, toy.y))
    for weights in ([0.3, -1.2], [-toy.b[0] / toy.x + 0.01, 0.05]):
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor(weights, dtype=torch.float64)[:, None])
        curvature = Curvature(model, nn.MSELoss(), batch, params=["0.weight"])
        loss, norm = toy.surfaces(beta, *(np.array([w]) for w in weights))
        assert loss.item() == pytest.approx(curvature.loss(), rel=1e-9)
        assert norm.item() == pytest.approx(curvature.nme.to_dense().norm().item(), rel=1e-9, abs=1e-15)


def test_surfaces_differ_by_a_percentage():
    ones, zeros = np.ones((2, 2)), np.zeros((2, 2))
    assert figure_7.difference(ones, ones) == 0
    assert figure_7.difference(ones, zeros) == 100
    assert figure_7.difference(3 * ones, ones) == 50


def test_the_toys_verdicts_are_those_of_its_seeds():
    for scale in (QUICK, find_scale("cpu")):
        found = find_figure(7).verdicts(pd.DataFrame(), scale)
        assert {v.data for v in found} == {"toy"}
        assert {v.seeds for v in found} == {len(scale.seeds)}
        effects = [figure_7.confined(figure_7.Toy.draw(seed)) for seed in scale.seeds]
        assert one({v.finding: v for v in found}, "strips").effect == pytest.approx(np.mean(effects))


# real runs


@pytest.mark.filterwarnings("ignore::twofold.TwofoldWarning")  # penalties on ReLU nets are drawn on purpose
@pytest.mark.parametrize("number", NUMBERS)
def test_real_runs_of_a_small_net_are_judged_and_drawn(number, tmp_path):
    figure, scale = find_figure(number), replace(find_scale("smoke"), seeds=(100,))
    configs = [
        replace(
            config,
            data=replace(config.data, num_train=40, num_validation=20, num_test=20),
            model=replace(config.model, width=4, depth=1),
            batch_size=20,
            curvature_probe=20,
            curvature_matvecs=2,
            max_steps=3,
        )
        for config in figure.runs(scale, "mnist1d")
    ]
    for config in configs:
        train(config, directory=RunDirectory(tmp_path, config))
    table = load_table(tmp_path, [run_id(config) for config in configs])
    found = figure.verdicts(table, scale)
    assert {v.seeds for v in found} == {1}
    assert all(math.isfinite(v.effect) for v in found)
    assert {v.verdict for v in found} == {"undecided"}
    numbers = figure.numbers(table).select_dtypes("number")
    assert numbers[[name for name in numbers if not name.endswith(("_low", "_high"))]].notna().all(axis=None)
    with style.applied():
        assert style.to_svg(figure.draw(table, 3))


# drawing


def along_training(config):
    epochs = traces(lambda config: (100.0, -900.0))(config)
    return epochs.assign(**{"activation/live_fraction": [1.0, 0.5, 0.4]})


@pytest.mark.parametrize("number", NUMBERS)
def test_files_are_the_same_byte_for_byte(number):
    table = table_with(number, epochs=along_training)

    def files():
        with style.applied():
            drawing = find_figure(number).draw(table, 3)
            return style.to_svg(drawing), style.to_png(drawing)

    first = files()
    assert first == files()
    assert b"<path" in first[0]


@pytest.mark.parametrize("number", [number for number in NUMBERS if number != 7])
@pytest.mark.parametrize("columns", [1, 3])
def test_legends_fit(number, columns):
    with style.applied():
        drawing = find_figure(number).draw(table_with(number, epochs=along_training), columns)
        drawing.draw_without_rendering()
        (legend,) = drawing.legends
        box = legend.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= drawing.bbox.x1
