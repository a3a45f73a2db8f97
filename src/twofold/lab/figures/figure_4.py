"""Figure 4: accuracy against sigma^2 for weight noise and for penalties on tr H and tr GN, one sample each.

Settings and grids come from trial runs with seeds 0 to 4; all of this was fixed before the runs with seeds from 100.
"""

import pandas as pd

from twofold.lab.figures import figure_1
from twofold.lab.figures.curves import Curve, accuracy, at_equal_strength, at_own_best, at_strength, best_against_best
from twofold.lab.figures.penalties import POINTS
from twofold.lab.figures.strength_figure import strength_figure
from twofold.lab.figures.style import COLOURS
from twofold.lab.figures.traces import (
    AXIS,
    FIXED_HESSIAN_OF_LOSS,
    SIGMA_SQUARED,
    TRACE_DIFFERS,
    against_sgd,
    at_equal_variance,
    noise_curve,
    trace_curve,
    trace_recipe,
)
from twofold.lab.figures.verdicts import Finding, paired_difference

NOISE = noise_curve("weight noise", (COLOURS["relu"], "o", "--"))
HESSIAN = trace_curve("tr H", "hessian_trace", (COLOURS["purple"], "D", "--"))
GAUSS_NEWTON = trace_curve("tr GN", "gauss_newton_trace", (COLOURS["green"], "s", "-"))

CAPTION = (
    "Accuracy against sigma^2 for weight noise of that variance and for penalties of sigma^2 / 2 on tr H and on tr GN, "
    "each estimated from one sample a step, on the test set and on the training labels. "
    + POINTS.replace("rho = 0", "sigma^2 = 0")
)

DIFFERS = (
    *TRACE_DIFFERS,
    "The strengths of the small networks lie a factor of 2 apart, so that the paper's convention is judged from the "
    "same runs as ours; noise of the largest strength has no partner there and is left out of it.",
    "tr GN is estimated by labels drawn from the model, one for each example, in one backward pass: the squared norm "
    "of the drawn gradient of a batch of B is short of a factor B, which is put back.",
    FIXED_HESSIAN_OF_LOSS,
)


def _best_against_sgd(runs: pd.DataFrame, curve: Curve) -> pd.Series:
    own = curve.of(runs)
    return paired_difference(at_own_best(own), at_strength(accuracy(own, "test"), 0.0))


FINDINGS = (
    Finding(
        "4: the best penalty on tr GN helps",
        "Test accuracy with the penalty on tr GN at its own best strength minus that of plain SGD.",
        lambda runs: _best_against_sgd(runs, GAUSS_NEWTON),
    ),
    Finding(
        "4: weight noise does not help, even at its own best strength",
        "Test accuracy of plain SGD minus that with weight noise at its own best strength.",
        lambda runs: -_best_against_sgd(runs, NOISE),
    ),
    Finding(
        "4: the penalty on tr H does not help, even at its own best strength",
        "Test accuracy of plain SGD minus that with the penalty on tr H at its own best strength.",
        lambda runs: -_best_against_sgd(runs, HESSIAN),
    ),
    Finding(
        "4: tr GN helps more than weight noise (each at its own best strength)",
        "Test accuracy with the penalty on tr GN minus that with weight noise, each at its own best strength.",
        lambda runs: best_against_best(GAUSS_NEWTON.of(runs), NOISE.of(runs)),
    ),
    Finding(
        "4: tr GN helps more than tr H (each at its own best strength)",
        "Test accuracy with the penalty on tr GN minus that with the one on tr H, each at its own best strength.",
        lambda runs: best_against_best(GAUSS_NEWTON.of(runs), HESSIAN.of(runs)),
    ),
    Finding(
        "4: tr GN helps more than weight noise (equal strength, matched)",
        "Mean over sigma^2 of test accuracy with penalty sigma^2 / 2 tr GN minus that with noise of variance sigma^2.",
        lambda runs: at_equal_variance(runs, GAUSS_NEWTON, NOISE, "matched"),
    ),
    Finding(
        "4: tr GN helps more than weight noise (equal strength, the paper's convention)",
        "Mean over sigma^2 of test accuracy with penalty sigma^2 tr GN minus that with noise of variance sigma^2, "
        "where both have runs.",
        lambda runs: at_equal_variance(runs, GAUSS_NEWTON, NOISE, "paper"),
    ),
    Finding(
        "4: tr GN helps more than tr H (equal strength)",
        "Mean over strengths of test accuracy with the penalty on tr GN minus that with the one on tr H.",
        lambda runs: at_equal_strength(GAUSS_NEWTON.of(runs), HESSIAN.of(runs)),
    ),
    Finding(
        "4: the penalty on tr H breaks at the largest strength",
        "Test accuracy of plain SGD minus that with the penalty on tr H at the largest strength.",
        lambda runs: -against_sgd(runs, HESSIAN),
    ),
    Finding(
        "4: weight noise breaks at the largest strength",
        "Test accuracy of plain SGD minus that with weight noise at the largest strength.",
        lambda runs: -against_sgd(runs, NOISE),
    ),
    Finding(
        "4: the penalty on tr GN still helps at the largest strength",
        "Test accuracy with the penalty on tr GN at the largest strength minus that of plain SGD.",
        lambda runs: against_sgd(runs, GAUSS_NEWTON),
    ),
)

FIGURE = strength_figure(
    name="4",
    title="Weight noise and trace penalties against sigma^2",
    caption=CAPTION,
    differs=DIFFERS,
    rule=figure_1.RULE,
    curves=(NOISE, HESSIAN, GAUSS_NEWTON),
    values=SIGMA_SQUARED,
    findings=FINDINGS,
    axis=AXIS,
    recipe=trace_recipe,
)
