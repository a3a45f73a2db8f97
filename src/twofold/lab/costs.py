"""What runs cost, before they are run: floating-point operations and launches over an assumed speed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from twofold.lab.config import ModelConfig, RunConfig
from twofold.lab.data import PUBLISHED
from twofold.lab.evaluation import MOST_TRAINING_EXAMPLES
from twofold.lab.figures.scales import find_scale
from twofold.lab.models import MODELS
from twofold.lab.ranks import num_batches
from twofold.lab.report import Reproduction
from twofold.lab.runs import RunDirectory
from twofold.regularizers import LookSAM


@dataclass(frozen=True)
class Speed:
    """What one GPU or one core is assumed to do.

    Attributes:
        unit: "GPU" or "core".
        flops: floating-point operations a second, sustained in training (a multiplication and an addition are two).
        launch_seconds: what a gradient takes beside them.
        basis: where the numbers come from.
    """

    unit: str
    flops: float
    launch_seconds: float
    basis: str


SPEEDS: Mapping[str, Speed] = {
    "cuda": Speed("GPU", 60e12, 5e-3, "what an A100 sustains in bfloat16 on ResNet-50 (2500 images a second)"),
    "cpu": Speed("core", 50e9, 6e-4, "measured with the small networks on one core"),
}

STEPS: Mapping[str, Mapping[str, float]] = {
    "mlp": {"sam": 2.3, "gradient_penalty": 3.4, "gauss_newton_trace": 3.0, "hessian_trace": 3.6, "weight_noise": 1.7},
    "conv": {"sam": 2.0, "gradient_penalty": 3.9, "gauss_newton_trace": 3.8, "hessian_trace": 5.6, "weight_noise": 1.0},
    "transformer": {
        "sam": 2.1,
        "gradient_penalty": 3.4,
        "gauss_newton_trace": 3.5,
        "hessian_trace": 5.5,
        "weight_noise": 1.2,
    },
}
"""A step of each regularizer in plain steps, as benchmarks/results/steps.csv has it ("conv" is its WideResNet)."""

_SWITCHED = 1.25  # a step with another phi'' in one with the activation's own
_EXACT_TRACE = 10.0  # a step with a penalty on an exact trace, of a small multilayer perceptron
_GRADIENT, _PRODUCTS = 3, 10  # in forward passes: a gradient; products with GN and both parts of the NME together
_ESTIMATES = 3  # traces, norms, and norms by module, each with probes of its own


def step_cost(config: RunConfig) -> float:
    """One step of a run's regularizer in plain steps."""
    regularizer = config.regularizer
    options = dict(regularizer.options)
    known = STEPS.get(config.model.name, STEPS["conv"])
    if regularizer.name == "none":
        return 1.0
    if regularizer.name == "exact_trace":
        return _EXACT_TRACE
    if regularizer.name == "look_sam":
        return 1 + (known["sam"] - 1) / int(options.get("interval") or LookSAM.interval)
    cost = known.get(regularizer.name, known["sam"] if regularizer.name.endswith("sam") else max(known.values()))
    samples = int(options.get("num_probes") or options.get("num_samples") or 1)
    cost = samples * cost if regularizer.name == "weight_noise" else 1 + samples * (cost - 1)
    return cost if regularizer.second_derivative is None else _SWITCHED * cost


def seconds(config: RunConfig) -> float:
    """What a run takes of one GPU or core; several ranks share it."""
    speed = SPEEDS[config.device.partition(":")[0]]
    forward = forward_flops(config)
    steps_per_epoch = num_batches(config.data.num_train, config.batch_size, config.ranks)
    steps = config.epochs * steps_per_epoch
    if config.max_steps is not None:
        steps = min(steps, config.max_steps)
    epochs = math.ceil(steps / steps_per_epoch)
    measured = 2 + epochs // config.curvature_every if config.curvature_every else 0
    products = measured * _ESTIMATES * config.curvature_matvecs
    examples = (
        _GRADIENT * step_cost(config) * steps * min(config.batch_size, config.data.num_train)
        + (epochs + 1) * _evaluated(config)
        + _PRODUCTS * products * config.curvature_probe
    )
    launches = step_cost(config) * steps + products
    return examples * forward / speed.flops + launches * speed.launch_seconds


def forward_flops(config: RunConfig) -> float:
    """Operations of a forward pass over one example, as torch counts them: products only."""
    published = PUBLISHED[config.data.name]
    channels, *sides = published.input_shape if len(published.input_shape) > 1 else (0, *published.input_shape)
    sides = [(config.data.image_size or side) // config.data.pool for side in sides]
    shape = tuple(sides) if channels == 0 else (channels, *sides)
    return _counted(replace(config.model, activation="relu"), shape, published.num_classes)


@lru_cache
def _counted(model: ModelConfig, input_shape: tuple[int, ...], num_classes: int) -> float:
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        built = MODELS[model.name](model, input_shape, num_classes).eval()
        with FlopCounterMode(display=False) as counter:
            built(torch.empty(1, *input_shape))
    return float(counter.get_total_flops())


def _evaluated(config: RunConfig) -> int:
    num_test = PUBLISHED[config.data.name].num_test if config.data.num_test is None else config.data.num_test
    return min(config.data.num_train, MOST_TRAINING_EXAMPLES) + config.data.num_validation + num_test


@dataclass(frozen=True)
class Cost:
    """Runs of a figure on a data set, or all.

    Attributes:
        figure: its name; "" for all figures together, in which runs that figures share count once.
        data: the data set; "" for all.
        unit: "GPU" or "core".
        runs: how many there are.
        there: how many of them have a result already.
        hours: of a GPU or a core, for those that have none.
        budget: hours that all of them may take; None where the scale sets no bound.
    """

    figure: str
    data: str
    unit: str
    runs: int
    there: int
    hours: float
    budget: float | None


def estimate(reproduction: Reproduction, out: Path) -> list[Cost]:
    """The cost of each figure on each data set, and last of all together.

    Args:
        reproduction: from `plan`.
        out: the output directory, whose results are reused.
    """
    budgets = {name: minutes / 60 for name, minutes in find_scale(reproduction.scale).core_minutes.items()}
    costs, every = [], {}
    for name in reproduction.figures:
        for data in reproduction.data_of(name):
            configs = reproduction.configs_on(name, data)
            if configs:
                every |= dict.fromkeys(configs)
                costs.append(_cost(name, data, configs, out, budgets.get(name)))
    return [*costs, _cost("", "", every, out, budgets.get(""))]


def _cost(figure: str, data: str, configs: Iterable[RunConfig], out: Path, budget: float | None) -> Cost:
    directories = [RunDirectory(out, config) for config in configs]
    missing = [directory.config for directory in directories if not directory.has_result()]
    units = {SPEEDS[directory.config.device.partition(":")[0]].unit for directory in directories}
    return Cost(
        figure,
        data,
        " or ".join(sorted(units)) or SPEEDS["cpu"].unit,
        runs=len(directories),
        there=len(directories) - len(missing),
        hours=sum(map(seconds, missing)) / 3600,
        budget=budget,
    )
