"""What figures 4, 5 and 6 share: penalties on tr H and tr GN, weight noise, and how their strengths compare.

Weight noise of variance sigma^2 adds sigma^2 / 2 tr H to the loss, up to O(sigma^4). The axis of these figures is
sigma^2, and a penalty is drawn at the sigma^2 whose noise it matches: at c tr H, sigma^2 = 2 c.
"""

from dataclasses import replace

import pandas as pd

import twofold
from twofold.lab.config import RegularizerConfig, RunConfig
from twofold.lab.figures.curves import Curve, accuracy, at_strength, over_strengths
from twofold.lab.figures.figure_1 import DIFFERS
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.verdicts import paired_difference

AXIS = "sigma^2"
SIGMA_SQUARED = {
    "smoke": (4e-3, 8e-3),
    "quick": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "cpu": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "paper": (1e-6, 2e-6, 1e-5, 2e-5, 1e-4, 2e-4, 1e-3, 2e-3),
}

CONVENTIONS = {"matched": 1.0, "paper": 2.0}
"""Which penalty counts as the equal of noise sigma^2: that of sigma^2 / 2 tr ("matched"), or of sigma^2 tr ("paper").

The value is the place of that penalty on the axis, in units of sigma^2.
"""

TRACE_DIFFERS = (
    "Data and networks: MNIST-1D (4000 examples, 30 % of training labels redrawn, MLP 40-64x3-10, 30 epochs; scale "
    "quick stops after 400 steps) and Fashion-MNIST pooled to 14x14 (2000 examples, 40 % redrawn, MLP 196-100x3-10), "
    "with GELU where nothing else is said. The paper trains ResNet-50 on ImageNet and WideResNet-28-10 on CIFAR-10 and "
    "Fashion-MNIST.",
    *DIFFERS[1:3],
    "Strengths are matched: noise of variance sigma^2 is drawn at sigma^2, and so is the penalty sigma^2 / 2 tr, which "
    "has the same effect to second order. The paper compares noise sigma^2 with the penalty sigma^2 tr, twice as "
    "strong.",
    "The strength is chosen on a clean validation split, and nothing on the test set; the paper does not say.",
)

FIXED_HESSIAN_OF_LOSS = (
    "As in the paper, the gradient of the penalty on tr GN does not go through H_z, the loss's Hessian in the outputs, "
    "nor through what is drawn from it; figure samples has the whole gradient beside it."
)


def trace_recipe(scale: Scale, data: str) -> RunConfig:
    """The configuration that the figures on traces vary."""
    recipe = scale.recipe(data)
    if data != "mnist1d":
        return recipe
    steps = 400 if scale.name == "quick" else recipe.max_steps
    return replace(recipe, model=replace(recipe.model, depth=3), epochs=30, max_steps=steps)


def noise_curve(label: str, look: tuple[str, str, str]) -> Curve:
    """Weight noise over its variance."""
    noise = RegularizerConfig("weight_noise")
    return Curve(label, "gelu", noise, look, lambda value: twofold.matched_sigma(value / 2), lambda sigma: sigma**2)


def trace_curve(
    label: str, name: str, look: tuple[str, str, str], activation: str = "gelu", **options: str | int
) -> Curve:
    """A penalty on a trace, drawn at the variance whose noise it matches."""
    penalty = RegularizerConfig(name, options=tuple(options.items()))
    return Curve(label, activation, penalty, look, lambda value: value / 2, lambda strength: 2 * strength)


def at_equal_variance(runs: pd.DataFrame, penalty: Curve, noise: Curve, convention: str) -> pd.Series:
    """Test accuracy of the penalty minus that of noise, mean over the variances that both have, by seed."""
    noisy, penalised = (accuracy(curve.of(runs), "test") for curve in (noise, penalty))
    factor = CONVENTIONS[convention]
    both = [value for value in noisy.columns if factor * float(value) in penalised.columns]
    at_noise = penalised[[factor * float(value) for value in both]].set_axis(both, axis=1)
    return over_strengths(at_noise - noisy[both]).dropna()


def against_sgd(runs: pd.DataFrame, curve: Curve) -> pd.Series:
    """Test accuracy of a curve at the largest strength minus that of plain SGD, by seed."""
    table = accuracy(curve.of(runs), "test")
    return paired_difference(at_strength(table, float(max(table.columns, default=0.0))), at_strength(table, 0.0))
