"""Figure 8: accuracy against beta of beta-GELU, for SGD, for PSAM and for SAM at rho = 0.1.

Settings and grids come from trial runs with seeds 0 to 4; all of this was fixed before the runs with seeds from 100.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from twofold.lab.config import RunConfig
from twofold.lab.figures import figure_1
from twofold.lab.figures.betas import AXIS, LOOKS, METHODS, beta_configs, of_method
from twofold.lab.figures.curves import accuracy, summarise
from twofold.lab.figures.figure import Figure
from twofold.lab.figures.penalties import POINTS
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.strength_figure import draw_accuracy
from twofold.lab.figures.verdicts import Finding, Verdict, judge, paired_difference

if TYPE_CHECKING:
    import matplotlib.figure

CAPTION = (
    "Accuracy against beta of beta-GELU, x Phi(beta x), for plain SGD and for PSAM and SAM at rho = 0.1, on the test "
    "set and on the training labels. beta = 1 is GELU, large beta tends to ReLU. " + POINTS.partition(". ")[2]
)

DIFFERS = (
    *figure_1.DIFFERS[:3],
    "SAM is added: where it falls with beta as PSAM does, the fall is not PSAM's own.",
    "beta ends at 64 on the small networks, where hardly a pre-activation is left at which phi'' is alive (figure 9); "
    "the paper goes beyond 1000.",
    figure_1.DIFFERS[-1],
)

RULE = figure_1.RULE.partition(" A method's own")[0]


def runs(scale: Scale, data: str) -> list[RunConfig]:
    """SGD, PSAM and SAM over beta."""
    return beta_configs(scale, data, tuple(METHODS))


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each data set, method and beta."""
    rows = []
    for data, of_data in table.groupby("data.name"):
        for method in METHODS:
            points = summarise(of_method(of_data, method), axis=AXIS, name="beta")
            points.insert(0, "data", data)
            points.insert(1, "curve", method)
            rows.append(points)
    return pd.concat(rows, ignore_index=True)


def draw(table: pd.DataFrame, columns: int = 3) -> matplotlib.figure.Figure:
    """Test and training accuracy for each data set."""
    return draw_accuracy(numbers(table), LOOKS, "beta", columns)


def fall(runs: pd.DataFrame, method: str, split: str = "test") -> pd.Series:
    """Accuracy at the smallest beta minus that at the largest, by seed."""
    table = accuracy(of_method(runs, method), split, AXIS)
    return paired_difference(table.iloc[:, 0], table.iloc[:, -1]) if len(table.columns) else pd.Series(dtype=float)


def _distance_grows(runs: pd.DataFrame) -> pd.Series:
    psam, sam = (accuracy(of_method(runs, method), "train", AXIS) for method in ("PSAM", "SAM"))
    apart = (psam - sam).abs()
    return paired_difference(apart.iloc[:, -1], apart.iloc[:, 0]) if len(apart.columns) else pd.Series(dtype=float)


FINDINGS = (
    Finding(
        "8: PSAM falls as beta grows (test accuracy)",
        "Test accuracy of PSAM at beta = 1 minus that at the largest beta.",
        lambda runs: fall(runs, "PSAM"),
    ),
    Finding(
        "8: PSAM falls more than SGD as beta grows (test accuracy)",
        "Test accuracy at beta = 1 minus that at the largest beta, for PSAM minus for plain SGD.",
        lambda runs: paired_difference(fall(runs, "PSAM"), fall(runs, "SGD")),
    ),
    Finding(
        "8: PSAM falls more than SAM as beta grows (test accuracy)",
        "Test accuracy at beta = 1 minus that at the largest beta, for PSAM minus for SAM.",
        lambda runs: paired_difference(fall(runs, "PSAM"), fall(runs, "SAM")),
    ),
    Finding(
        "8: PSAM parts from SAM as beta grows (training accuracy)",
        "|Training accuracy of PSAM - that of SAM| at the largest beta minus that at beta = 1.",
        _distance_grows,
    ),
)


def verdicts(table: pd.DataFrame, scale: Scale) -> list[Verdict]:
    """Decide FINDINGS on each data set in the table."""
    return judge(FINDINGS, table, scale, FIGURE.name)


FIGURE = Figure(
    name="8",
    title="SGD, PSAM and SAM against beta of beta-GELU",
    caption=CAPTION,
    differs=DIFFERS,
    rule=RULE,
    runs=runs,
    draw=draw,
    numbers=numbers,
    verdicts=verdicts,
)
