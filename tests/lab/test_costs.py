import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest

from twofold.lab import recipes
from twofold.lab.config import RegularizerConfig, mnist1d
from twofold.lab.costs import STEPS, estimate, forward_flops, seconds, step_cost
from twofold.lab.data import DATA_SETS, PUBLISHED, load
from twofold.lab.figures.scales import SCALES
from twofold.lab.models import MODELS
from twofold.lab.report import Reproduction, plan
from twofold.lab.runs import RunDirectory
from twofold.lab.training import train

STEPS_FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "steps.csv"
ROWS = {"mlp": "mlp", "conv": "wrn train", "transformer": "transformer"}
PAPERS = tuple(map(str, range(1, 11)))
METHODS = {
    "sam": "SAM",
    "gradient_penalty": "GradientPenalty",
    "gauss_newton_trace": "GaussNewtonTrace",
    "hessian_trace": "HessianTrace",
    "weight_noise": "WeightNoise",
}


def test_forward_passes_cost_what_is_known_of_the_published_nets():
    assert forward_flops(recipes.imagenet()) == pytest.approx(2 * 4.089e9, rel=1e-3)
    assert forward_flops(recipes.cifar10()) == pytest.approx(2 * 5.243e9, rel=1e-3)
    assert forward_flops(mnist1d()) == 2 * (40 * 64 + 3 * 64 * 64 + 64 * 10)


def test_steps_cost_what_the_benchmark_found():
    with STEPS_FILE.open() as file:
        measured = {(row["model"], row["method"]): float(row["time"]) for row in csv.DictReader(file)}
    for kind, row in ROWS.items():
        for name, method in METHODS.items():
            assert STEPS[kind][name] == pytest.approx(measured[row, method], rel=0.05), (kind, name)


def test_published_sizes_are_those_of_the_data(tmp_path):
    assert PUBLISHED.keys() == DATA_SETS.keys()
    data = load(mnist1d().data, tmp_path)
    known = PUBLISHED["mnist1d"]
    assert (data.input_shape, data.num_classes, len(data.test.targets)) == known


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", STEPS["conv"])
def test_every_step_of_a_regularizer_costs_more_than_a_plain_one(model, name):
    depth = {"wideresnet": 10, "resnet": 50}.get(model, 2)
    base = recipes.cifar10()
    config = replace(base, model=replace(base.model, name=model, depth=depth, width=16, norm="none"))
    dearer = replace(config, regularizer=RegularizerConfig(name, 0.1))
    assert step_cost(dearer) >= step_cost(config) == 1
    assert seconds(dearer) >= seconds(config) > 0


def test_what_makes_a_run_dearer():
    base = recipes.cifar10()
    trace = replace(base, regularizer=RegularizerConfig("hessian_trace", 1e-6))
    five = replace(base, regularizer=RegularizerConfig("hessian_trace", 1e-6, {"num_probes": 5}))
    assert step_cost(five) == pytest.approx(1 + 5 * (step_cost(trace) - 1))
    noise = replace(base, regularizer=RegularizerConfig("weight_noise", 0.01, {"num_samples": 4}))
    assert step_cost(noise) == pytest.approx(4 * STEPS["conv"]["weight_noise"])
    assert seconds(replace(base, epochs=400)) == pytest.approx(2 * seconds(base), rel=0.01)
    assert seconds(replace(base, curvature_every=10)) > seconds(base)
    assert seconds(replace(base, max_steps=10)) < seconds(base) / 100
    switched = RegularizerConfig("gradient_penalty", 0.1, second_derivative="0")
    assert step_cost(replace(base, regularizer=switched)) > STEPS["conv"]["gradient_penalty"]


def test_an_estimate_knows_what_is_there_and_counts_shared_runs_once(tmp_path):
    reproduction = plan(("1", "2"), "smoke")
    before = estimate(reproduction, tmp_path)
    assert [(cost.figure, cost.data) for cost in before] == [("1", "mnist1d"), ("2", "mnist1d"), ("", "")]
    both = {config for name in ("1", "2") for config in reproduction.configs(name)}
    assert before[-1].runs == len(both) < before[0].runs + before[1].runs
    assert before[-1].hours == pytest.approx(sum(map(seconds, both)) / 3600)
    config = reproduction.configs("1")[0]
    train(config, directory=RunDirectory(tmp_path, config))
    after = estimate(reproduction, tmp_path)
    assert [cost.there for cost in after][-1] == 1
    assert before[-1].hours - after[-1].hours == pytest.approx(seconds(config) / 3600)
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


def test_an_estimate_writes_nothing(tmp_path):
    estimate(plan(("1",), "smoke"), tmp_path / "none")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_can_be_estimated_without_its_machines(scale):
    reproduction = plan((), scale, gpu=False)
    found = estimate(reproduction, Path("/nonexistent"))
    assert found[-1].there == 0
    assert found[-1].hours > 0
    assert {cost.unit for cost in found} == {"GPU" if scale == "paper" else "core"}


def test_the_quick_scale_keeps_within_its_budget():
    *figures, together = estimate(plan(), Path("/nonexistent"))
    assert together.budget == pytest.approx(20 / 60)
    assert all(cost.hours <= 0.8 * cost.budget for cost in [*figures, together])


def test_the_paper_scale_has_the_papers_data_sets():
    everywhere = ("imagenet", "cifar10", "fashion-mnist")
    expected = {
        **dict.fromkeys("124", everywhere),
        **dict.fromkeys("36", ("imagenet",)),
        "5": ("cifar10",),
        **dict.fromkeys(("8", "9", "10"), ("imagenet", "cifar10")),
    }
    reproduction = plan((), "paper", gpu=False)
    for name, data in expected.items():
        assert reproduction.data_of(name) == data
        found = {(c.data.name, c.model.name, c.epochs, c.batch_size) for c in reproduction.configs(name)}
        setups = dict.fromkeys(("cifar10", "fashion-mnist"), ("wideresnet", 200, 128))
        setups["imagenet"] = ("resnet", 350, 1024)
        assert found == {(name, *setups[name]) for name in data}
    assert Reproduction(("3",), "paper", ("cifar10",)).configs("3")


def test_the_page_on_the_paper_scale_tells_these_hours(tmp_path):
    page = (STEPS_FILE.parents[2] / "docs" / "paper-scale.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d*) *\| (\d*) *\| (\d*) *\|$", page, re.MULTILINE)
    told = {
        (figure, data): int(hours)
        for figure, *columns in rows
        for data, hours in zip(("imagenet", "cifar10", "fashion-mnist"), columns, strict=True)
        if hours
    }
    found = {(cost.figure, cost.data): cost.hours for cost in estimate(plan(PAPERS, "paper", gpu=False), tmp_path)[:-1]}
    assert told == {key: pytest.approx(hours, rel=0.05) for key, hours in found.items()}
