"""Figure 5: penalties on tr H and tr GN, both estimated by Hutchinson's method with five samples a step.

Settings and grids come from trial runs with seeds 0 to 4; all of this was fixed before the runs with seeds from 100.
"""

from collections.abc import Sequence

from twofold.lab.figures import figure_1
from twofold.lab.figures.curves import at_equal_strength, best_against_best
from twofold.lab.figures.figure_4 import HESSIAN
from twofold.lab.figures.penalties import POINTS
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.strength_figure import strength_figure
from twofold.lab.figures.style import COLOURS
from twofold.lab.figures.traces import (
    AXIS,
    FIXED_HESSIAN_OF_LOSS,
    SIGMA_SQUARED,
    TRACE_DIFFERS,
    against_sgd,
    trace_curve,
    trace_recipe,
)
from twofold.lab.figures.verdicts import Finding

HESSIAN_5 = trace_curve("tr H, 5 samples", "hessian_trace", (COLOURS["gelu"], "^", "-"), num_probes=5)
GAUSS_NEWTON_5 = trace_curve(
    "tr GN, 5 samples",
    "gauss_newton_trace",
    (COLOURS["green"], "s", "-"),
    num_samples=5,
    estimator="hutchinson",
)

CAPTION = (
    "Accuracy against sigma^2 for penalties of sigma^2 / 2 on tr H and on tr GN, both estimated by Hutchinson's method "
    "with five samples a step, on the test set and on the training labels; tr H with one sample is drawn beside them. "
    + POINTS.replace("rho = 0", "sigma^2 = 0")
)

DIFFERS = (
    *TRACE_DIFFERS,
    FIXED_HESSIAN_OF_LOSS,
    "Scale quick has two seeds, as the paper; its verdicts stay undecided, since two seeds can agree by chance. It has "
    "two strengths, a factor of 4 apart; scale cpu has those of figure 4, on MNIST-1D alone.",
)

FINDINGS = (
    Finding(
        "5: with five samples, the penalty on tr H still breaks",
        "Test accuracy of plain SGD minus that with the penalty on tr H at the largest strength, five samples.",
        lambda runs: -against_sgd(runs, HESSIAN_5),
    ),
    Finding(
        "5: with the same estimator, tr GN helps more than tr H (equal strength)",
        "Mean over strengths of test accuracy with the penalty on tr GN minus that with the one on tr H, five samples.",
        lambda runs: at_equal_strength(GAUSS_NEWTON_5.of(runs), HESSIAN_5.of(runs)),
    ),
    Finding(
        "5: with the same estimator, tr GN helps more than tr H (each at its own best strength)",
        "Test accuracy with the penalty on tr GN minus that with the one on tr H, five samples, each at its own best.",
        lambda runs: best_against_best(GAUSS_NEWTON_5.of(runs), HESSIAN_5.of(runs)),
    ),
)


def _seeds(scale: Scale) -> Sequence[int]:
    return scale.seeds[:2] if scale.name == "quick" else scale.seeds


FIGURE = strength_figure(
    name="5",
    title="Trace penalties by Hutchinson's method with five samples",
    caption=CAPTION,
    differs=DIFFERS,
    rule=figure_1.RULE,
    curves=(HESSIAN, HESSIAN_5, GAUSS_NEWTON_5),
    values={**SIGMA_SQUARED, "quick": (2e-3, 8e-3)},
    findings=FINDINGS,
    axis=AXIS,
    recipe=trace_recipe,
    seeds=_seeds,
)
