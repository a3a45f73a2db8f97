"""Beyond the paper: WSAM and Eigen-SAM beside SAM.

WSAM (2305.15817) weighs SAM's gradient against the plain one, Eigen-SAM (2501.12666) turns SAM's step towards the top
eigenvector. Grids are those of figure 1; both papers' own settings of their second parameter are taken.
"""

from twofold.lab.config import RegularizerConfig
from twofold.lab.figures import figure_1
from twofold.lab.figures.curves import Curve, at_equal_strength, best_against_best
from twofold.lab.figures.penalties import GELU_SAM, POINTS
from twofold.lab.figures.strength_figure import strength_figure
from twofold.lab.figures.style import COLOURS
from twofold.lab.figures.verdicts import Finding

WSAM = Curve("WSAM", "gelu", RegularizerConfig("wsam"), (COLOURS["purple"], "D", "--"))
EIGEN_SAM = Curve("Eigen-SAM", "gelu", RegularizerConfig("eigen_sam"), (COLOURS["green"], "s", "-"))


def _findings(curve: Curve) -> tuple[Finding, Finding]:
    claim = f"{curve.label} does better than SAM"
    gap = f"test accuracy of {curve.label} minus that of SAM"
    return (
        Finding(
            f"{claim} (equal rho)",
            f"Mean over rho > 0 of {gap}.",
            lambda runs: at_equal_strength(curve.of(runs), GELU_SAM.of(runs)),
        ),
        Finding(
            f"{claim} (each at its own best rho)",
            f"The {gap}, each at its own best rho.",
            lambda runs: best_against_best(curve.of(runs), GELU_SAM.of(runs)),
        ),
    )


FIGURE = strength_figure(
    name="siblings",
    title="WSAM and Eigen-SAM beside SAM",
    caption=f"Accuracy against rho for SAM, WSAM (gamma 0.9, decoupled) and Eigen-SAM (alpha 0.2) with GELU. {POINTS}",
    differs=("The paper has no such figure; each claim is that of the method's own paper.", *figure_1.DIFFERS[:3]),
    rule=figure_1.RULE,
    curves=(GELU_SAM, WSAM, EIGEN_SAM),
    values={**figure_1.RHO, "quick": (0.1, 0.4)},
    findings=(*_findings(WSAM), *_findings(EIGEN_SAM)),
)
