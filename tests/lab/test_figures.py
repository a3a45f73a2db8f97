import io
import math
import re

import matplotlib as mpl
import pandas as pd
import pytest

from lab.synthetic import noise, table_of
from twofold.errors import TwofoldError
from twofold.lab.figures import curves, figure_names, find_figure, select_figures, style
from twofold.lab.figures.figure_1 import FINDINGS, RHO
from twofold.lab.figures.scales import SCALES, find_scale
from twofold.lab.figures.verdicts import Finding, judge
from twofold.lab.runs import run_id

TRACKING, EQUAL_RHO, OWN_BEST, BELOW_SGD = (finding.text for finding in FINDINGS)
FIGURE = find_figure(1)
QUICK = find_scale("quick")
GAP = {"none": 0.0, "sam": 0.0, "gradient_penalty": 1.0}


def gap_in_training(relu: float, gelu: float = 0.0, spread=noise):
    """Accuracies where PSAM trains better than SAM by so many points at every rho; nothing else differs."""

    def accuracy(config, split):
        gap = relu if config.model.activation == "relu" else gelu
        return 60.0 + spread(config) + (GAP[config.regularizer.name] * gap if split == "train" else 0.0)

    return accuracy


def gap_in_test(relu: float, gelu: float = 0.0):
    def accuracy(config, split):
        gap = relu if config.model.activation == "relu" else gelu
        return 60.0 + noise(config) - (GAP[config.regularizer.name] * gap if split != "train" else 0.0)

    return accuracy


def verdicts_of(table, scale=QUICK):
    return {verdict.finding: verdict for verdict in FIGURE.verdicts(table, scale)}


# registry and scales


def test_figures_are_found_by_their_files():
    assert figure_names()[:10] == [str(number) for number in range(1, 11)]
    for name in figure_names():
        assert find_figure(name).name == name
    assert find_figure(1) is find_figure("1")
    assert [figure.name for figure in select_figures()] == figure_names()
    assert [figure.name for figure in select_figures(("2", 1, "1"))] == ["1", "2"]


@pytest.mark.parametrize("number", ["0", "11", "one", "", "-1", "1.5", "../1", "²"])
def test_unknown_figure_lists_the_known(number):
    with pytest.raises(TwofoldError, match=r"no figure.*: 1"):
        find_figure(number)


def test_unknown_scale_or_data():
    with pytest.raises(TwofoldError, match="smoke, quick, cpu, paper"):
        find_scale("huge")
    with pytest.raises(TwofoldError, match="mnist1d, fashion-mnist"):
        QUICK.recipe("cifar10")


@pytest.mark.parametrize("number", figure_names())
@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_every_figure_has_distinct_runs_at_every_scale(number, scale):
    for data in scale.recipes:
        configs = find_figure(number).runs(scale, data)
        assert len({run_id(config) for config in configs}) == len(configs)
        assert {config.data.name for config in configs} == ({data} if configs else set())
        assert min((config.seed for config in configs), default=100) >= 100
        assert configs or number == "7"  # the toy landscape


def test_figure_1_pairs_all_methods_over_the_same_seeds():
    configs = FIGURE.runs(QUICK, "mnist1d")
    for activation in ("gelu", "relu"):
        chosen = [c.regularizer for c in configs if c.model.activation == activation]
        assert len(chosen) == len(QUICK.seeds) * (1 + 2 * len(RHO["quick"]))
        for name in ("sam", "gradient_penalty"):
            assert {r.strength for r in chosen if r.name == name} == set(RHO["quick"])


# curves


def test_best_strength_is_chosen_on_validation_only():
    def accuracy(config, split):
        rho = config.regularizer.strength
        return 50 + (100 * rho if split == "test" else -100 * rho)

    runs = table_of(FIGURE, QUICK, accuracy)
    runs = runs[runs["model.activation"] == "relu"]
    assert curves.best_strength(runs[runs["regularizer.name"] == "sam"]) == min(RHO["quick"])
    of_sam = runs["regularizer.name"] == "sam"
    lacking = of_sam & (runs["regularizer.strength"] == 0.2)
    runs.loc[lacking, "validation/accuracy"] = runs["seed"].map({100: 0.99})  # of the others there is no result
    assert curves.best_strength(runs[of_sam]) == min(RHO["quick"])
    assert math.isnan(curves.best_strength(runs[runs["regularizer.name"] == "none"]))
    assert math.isnan(curves.best_strength(runs[:0]))


def test_numbers_are_means_with_intervals():
    numbers = FIGURE.numbers(table_of(FIGURE, QUICK, gap_in_training(relu=4.0)))
    row = numbers.query("activation == 'relu' and method == 'PSAM' and rho == 0.1").iloc[0]
    assert row["seeds"] == 3
    assert row["train_low"] < row["train"] < row["train_high"]
    assert row["distance"] == pytest.approx(4.0, abs=0.5)
    sgd = numbers[numbers["rho"] == 0]
    assert (sgd["distance"] == 0).all()
    best = numbers[numbers["best"] == "yes"]
    assert len(best) == 4
    assert (best["rho"] > 0).all()


# verdicts of figure 1


@pytest.mark.parametrize(
    ("relu", "gelu", "expected"),
    [
        (6.0, 1.0, "shows"),
        (1.0, 6.0, "opposite"),
        (1.2, 1.0, "does not show"),
        (-6.0, 1.0, "shows"),  # a distance has no sign
    ],
)
def test_tracking(relu, gelu, expected):
    assert verdicts_of(table_of(FIGURE, QUICK, gap_in_training(relu, gelu)))[TRACKING].verdict == expected


def test_tracking_is_undecided_where_seeds_disagree():
    spread = {100: 9.0, 101: 0.5, 102: 0.2}
    accuracy = gap_in_training(0.0, spread=lambda config: 0.0)

    def noisy(config, split):
        wide = config.model.activation == "relu" and config.regularizer.name == "gradient_penalty" and split == "train"
        return accuracy(config, split) + (spread[config.seed] if wide else 0.0)

    verdict = verdicts_of(table_of(FIGURE, QUICK, noisy))[TRACKING]
    assert verdict.verdict == "undecided"
    assert verdict.low < 0 < verdict.effect < verdict.high
    assert verdict.effect == pytest.approx((9.0 + 0.5 + 0.2) / 3)


@pytest.mark.parametrize(("relu", "expected"), [(5.0, "shows"), (-5.0, "opposite"), (0.0, "does not show")])
@pytest.mark.parametrize("finding", [EQUAL_RHO, OWN_BEST])
def test_test_accuracy(finding, relu, expected):
    assert verdicts_of(table_of(FIGURE, QUICK, gap_in_test(relu)))[finding].verdict == expected


@pytest.mark.parametrize(
    ("psam", "sam", "expected"),
    [
        (-5.0, 5.0, "shows"),
        (5.0, 5.0, "opposite"),
        (0.0, 5.0, "does not show"),
        (-5.0, -5.0, "does not show"),  # SAM falls below SGD as well
        (-5.0, 0.0, "undecided"),
    ],
)
def test_below_sgd(psam, sam, expected):
    over_sgd = {"none": 0.0, "sam": sam, "gradient_penalty": psam}

    def accuracy(config, split):
        return 60.0 + noise(config) + over_sgd[config.regularizer.name]

    assert verdicts_of(table_of(FIGURE, QUICK, accuracy))[BELOW_SGD].verdict == expected


def test_diverged_runs_count_as_they_are_and_are_told():
    table = table_of(FIGURE, QUICK, gap_in_training(relu=6.0))
    hit = (table["regularizer.name"] == "gradient_penalty") & (table["regularizer.strength"] == 0.4)
    hit &= (table["model.activation"] == "relu") & (table["seed"] == 101)
    before = verdicts_of(table)[TRACKING]
    table.loc[hit, "status"] = "diverged"
    table.loc[hit, "train/accuracy"] = 0.1
    after = verdicts_of(table)[TRACKING]
    assert (before.diverged, after.diverged) == (0, 1)
    assert before.seeds == after.seeds == 3
    # |66 - 60| at one of four rho of one of three seeds becomes |10 - 60|
    assert after.effect - before.effect == pytest.approx((50 - 6) / 4 / 3, abs=0.2)
    numbers = FIGURE.numbers(table)
    assert numbers["diverged"].sum() == 1


def test_a_diverged_run_behind_a_condition_is_told():
    runs = pd.DataFrame({"data.name": "mnist1d", "seed": [100, 101, 102], "status": "finished", "x": [1.0, 1.1, 1.2]})
    finding = Finding("f", "r", lambda runs: pd.Series([1.0, 1.1, 1.2]), 0.1, condition=lambda runs: runs["x"])
    assert [verdict.diverged for verdict in judge([finding], runs, QUICK, "1")] == [0]
    runs.loc[1, "status"] = "diverged"
    assert [verdict.diverged for verdict in judge([finding], runs, QUICK, "1")] == [1]


def test_a_seed_with_a_failed_run_is_left_out():
    table = table_of(FIGURE, QUICK, gap_in_training(relu=6.0))
    failed = table.index[(table["regularizer.name"] == "sam") & (table["seed"] == 102)][0]
    table.loc[failed, "status"] = "failed"
    table.loc[failed, ["train/accuracy", "validation/accuracy", "test/accuracy"]] = math.nan
    verdict = verdicts_of(table)[TRACKING]
    assert verdict.seeds == 2
    assert verdict.verdict == "undecided"


def test_without_any_result_everything_is_undecided_and_still_drawn():
    table = table_of(FIGURE, QUICK, gap_in_training(0.0)).drop(
        columns=[f"{s}/accuracy" for s in ("train", "validation", "test")]
    )
    table["status"] = "failed"
    assert {verdict.verdict for verdict in FIGURE.verdicts(table, QUICK)} == {"undecided"}
    with style.applied():
        assert style.to_svg(FIGURE.draw(table, 3))


def test_data_sets_are_judged_apart():
    table = table_of(FIGURE, QUICK, gap_in_training(relu=6.0), data=("mnist1d", "fashion-mnist"))
    found = FIGURE.verdicts(table, QUICK)
    assert sorted((v.data, v.finding) for v in found) == sorted(
        (data, finding)
        for data in ("mnist1d", "fashion-mnist")
        for finding in (TRACKING, EQUAL_RHO, OWN_BEST, BELOW_SGD)
    )
    assert {v.figure for v in found} == {"1"}
    assert {v.scale for v in found} == {"quick"}


# drawing


def test_files_are_the_same_byte_for_byte_and_hold_no_date():
    table = table_of(FIGURE, QUICK, gap_in_training(relu=4.0))

    def files():
        with style.applied():
            figure = FIGURE.draw(table, 3)
            return style.to_svg(figure), style.to_png(figure)

    svg, png = files()
    assert (svg, png) == files()
    assert not re.search(rb"\b20\d\d-\d\d|Matplotlib v|<metadata", svg)
    assert b"Software" not in png


def test_a_users_matplotlibrc_changes_nothing():
    table = table_of(FIGURE, QUICK, gap_in_training(relu=4.0))

    def svg():
        with style.applied():
            return style.to_svg(FIGURE.draw(table, 3))

    plain = svg()
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert svg() == plain
        assert mpl.rcParams["font.size"] == 20


def test_columns_lay_out_the_same_panels():
    table = table_of(FIGURE, QUICK, gap_in_training(relu=4.0))
    with style.applied():
        wide, narrow = FIGURE.draw(table, 3), FIGURE.draw(table, 1)
    assert [a.get_title() for a in wide.axes] == [a.get_title() for a in narrow.axes]
    assert wide.get_figwidth() > 2 * narrow.get_figwidth()


def test_a_diverged_point_is_hollow():
    table = table_of(FIGURE, QUICK, gap_in_training(relu=4.0))

    def hollow():
        with style.applied():
            panel = FIGURE.draw(table, 3).axes[0]
        return sum(len(line.get_xdata()) for line in panel.lines if line.get_markerfacecolor() == "white")

    assert hollow() == 0
    hit = (table["regularizer.strength"] == 0.4) & (table["seed"] == 101) & (table["regularizer.name"] == "sam")
    table.loc[hit, "status"] = "diverged"
    assert hollow() == 2  # one for each activation


def test_csv_round_trip():
    numbers = FIGURE.numbers(table_of(FIGURE, QUICK, gap_in_training(relu=4.0)))
    again = pd.read_csv(io.StringIO(numbers.to_csv(index=False, float_format="%.6g")), keep_default_na=False)
    assert list(again.columns) == list(numbers.columns)
    assert again["rho"].tolist() == numbers["rho"].tolist()
