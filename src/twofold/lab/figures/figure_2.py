"""Figure 2: accuracy against rho for PSAM with ReLU, with GELU, and with GELU whose phi'' is set to zero.

Values and first derivatives of GELU stay as they are; phi'' := 0 takes its part out of H g in PSAM's direction alone.
Settings and grids are those of figure 1, fixed before the runs with seeds from 100.
"""

from dataclasses import replace

import pandas as pd

from twofold.lab.figures import figure_1
from twofold.lab.figures.curves import Curve, accuracy, at_strength, over_strengths
from twofold.lab.figures.penalties import GELU_PSAM, GELU_SAM, POINTS, PSAM, RELU_PSAM
from twofold.lab.figures.strength_figure import contrast_findings, strength_figure
from twofold.lab.figures.style import COLOURS
from twofold.lab.figures.verdicts import Finding, paired_difference

WITHOUT = Curve("GELU PSAM, phi'' := 0", "gelu", replace(PSAM, second_derivative="0"), (COLOURS["purple"], "D", "--"))

CAPTION = (
    "Accuracy against rho for PSAM with GELU, with GELU whose second derivative phi'' is set to zero, and with ReLU, "
    f"on the test set and on the training labels; SAM with GELU is drawn for reference. {POINTS}"
)

DIFFERS = (
    *figure_1.DIFFERS,
    "SAM is drawn beside PSAM: what the paper calls worse is farther from SAM.",
    "Equal rho is judged in two ranges: the trial runs saw the paper's effect at small rho and not at large.",
)


def _gain(curve: Curve, runs: pd.DataFrame) -> pd.DataFrame:
    """Change of training accuracy against plain SGD with the same activation: the activations start apart."""
    table = accuracy(curve.of(runs), "train")
    return table.sub(at_strength(table, 0.0), axis=0)


def _nearer_to_relu(runs: pd.DataFrame) -> pd.Series:
    relu = _gain(RELU_PSAM, runs)
    with_, without = (over_strengths((_gain(curve, runs) - relu).abs()) for curve in (GELU_PSAM, WITHOUT))
    return paired_difference(with_, without)


FINDINGS = (
    *contrast_findings("2: phi'' := 0 takes from PSAM what GELU gives it", GELU_PSAM, WITHOUT, GELU_SAM),
    Finding(
        "2: with phi'' := 0, GELU behaves like ReLU",
        "Mean over rho > 0 of |change of training accuracy against SGD - that with ReLU|, for PSAM with GELU minus for "
        "PSAM with GELU and phi'' := 0.",
        _nearer_to_relu,
    ),
)

FIGURE = strength_figure(
    name="2",
    title="PSAM against rho with GELU's second derivative switched off",
    caption=CAPTION,
    differs=DIFFERS,
    rule=figure_1.RULE,
    curves=(GELU_SAM, GELU_PSAM, WITHOUT, RELU_PSAM),
    values=figure_1.RHO,
    findings=FINDINGS,
)
