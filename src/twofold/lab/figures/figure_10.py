"""Figure 10: accuracy against rho for PSAM with GELU, with the whole NME and without it.

Without it the direction is g + rho GN g / ||g||: the Gauss-Newton matrix stands in the place of the Hessian.
Settings and grids are those of figure 1, fixed before the runs with seeds from 100.
"""

from dataclasses import replace

from twofold.lab.figures import figure_1
from twofold.lab.figures.curves import Curve
from twofold.lab.figures.penalties import GELU_PSAM, GELU_SAM, POINTS, PSAM
from twofold.lab.figures.strength_figure import contrast_findings, strength_figure
from twofold.lab.figures.style import COLOURS

GAUSS_NEWTON = Curve(
    "GELU PSAM, GN only",
    "gelu",
    replace(PSAM, options=(("curvature", "gauss_newton"), ("p", 1))),
    (COLOURS["green"], "D", "--"),
)

CAPTION = (
    "Accuracy against rho for PSAM with GELU, with the Hessian in its direction and with the Gauss-Newton matrix "
    f"in its place, on the test set and on the training labels; SAM with GELU is drawn for reference. {POINTS}"
)

DIFFERS = (
    *figure_1.DIFFERS,
    "For p = 1 the direction is g + rho GN g / ||g||. The paper's general formula (appendix C.1) raises a value that "
    "is identically zero to a negative power and cannot be used as it stands.",
)

FIGURE = strength_figure(
    name="10",
    title="PSAM against rho without the NME",
    caption=CAPTION,
    differs=DIFFERS,
    rule=figure_1.RULE,
    curves=(GELU_SAM, GELU_PSAM, GAUSS_NEWTON),
    values=figure_1.RHO,
    findings=contrast_findings(
        "10: without the NME, PSAM falls behind PSAM with the Hessian", GELU_PSAM, GAUSS_NEWTON, GELU_SAM
    ),
)
