"""Figure 9: the fraction of activation inputs at which phi'' of beta-GELU is not 0, before and after training.

Settings and grids are those of figure 8, fixed before the runs with seeds from 100.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from twofold.lab.config import RunConfig
from twofold.lab.figures import figure_1, style
from twofold.lab.figures.betas import AXIS, LOOKS, beta_configs, of_method
from twofold.lab.figures.curves import interval_columns, num_diverged
from twofold.lab.figures.figure import Figure
from twofold.lab.figures.figure_8 import DIFFERS as BETA_DIFFERS
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.verdicts import Finding, Verdict, judge, paired_difference, rule_for

if TYPE_CHECKING:
    import matplotlib.figure

KEY = "activation/live_fraction"
METHODS = ("SGD", "PSAM")
LINES = {
    ("SGD", "before"): ("before training", (style.INK, "o", ":")),
    ("SGD", "after"): ("after SGD", LOOKS["SGD"]),
    ("PSAM", "after"): ("after PSAM", LOOKS["PSAM"]),
}

CAPTION = (
    "Share of activation inputs at which phi'' of beta-GELU is not 0 (in float32: |beta h| below 13 or so), before "
    "training and after training with SGD and with PSAM at rho = 0.1, on 256 training examples in eval mode. Points "
    "are means over seeds, bars are 95 % intervals. A run that diverged is measured where it ended, unless its "
    "weights are not finite; a hollow marker has diverged runs behind it."
)

DIFFERS = (
    *figure_1.DIFFERS[:3],
    BETA_DIFFERS[-2],
    "Not 0 means not exactly 0 in float32, over all hidden layers; the paper does not say.",
    figure_1.DIFFERS[-1],
)

SMALLEST = 5.0
RULE = rule_for("a difference paired by seed, in percent of the activation inputs", SMALLEST)


def runs(scale: Scale, data: str) -> list[RunConfig]:
    """SGD and PSAM over beta: runs of figure 8."""
    return beta_configs(scale, data, METHODS)


def live(table: pd.DataFrame, method: str, when: str) -> pd.DataFrame:
    """Percent of live inputs "before" or "after" training: one row a seed, one column a beta."""
    chosen = of_method(table, method)
    percent = [100 * _measured(metrics, when) for metrics in chosen["metrics"]]
    return chosen[["seed", AXIS]].assign(percent=percent).pivot(index="seed", columns=AXIS, values="percent")


def _measured(metrics: pd.DataFrame, when: str) -> float:
    """NaN where it was not measured, as where a run ended with weights that are not finite."""
    if KEY not in metrics:
        return math.nan
    trained = metrics["step"] > 0
    found = metrics.loc[trained if when == "after" else ~trained, KEY].dropna()
    return float(found.iloc[-1]) if len(found) else math.nan


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each data set, line and beta."""
    rows = []
    for data, of_data in table.groupby("data.name"):
        for (method, when), (label, _) in LINES.items():
            for beta, percent in live(of_data, method, when).items():
                chosen = of_method(of_data, method)
                behind = chosen[(chosen[AXIS] == beta) & chosen["seed"].isin(percent.dropna().index)]
                diverged = num_diverged(behind) if when == "after" else 0
                row = {"data": data, "curve": label, "beta": beta, "seeds": percent.count(), "diverged": diverged}
                rows.append(row | interval_columns("live", percent))
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, columns: int = 3) -> matplotlib.figure.Figure:
    """One panel for each data set."""
    points, looks = numbers(table), dict(LINES.values())
    figure, axes = style.panels(points["data"].nunique(), columns)
    for panel, (data, of_data) in zip(axes, points.groupby("data"), strict=True):
        lines = [style.Line(rows, str(name), *looks[str(name)]) for name, rows in of_data.groupby("curve", sort=False)]
        style.strength_curves(panel, lines, "live", within=(0, 100), axis="beta")
        panel.set_title("Live phi'' (%)")
        panel.set_ylabel(str(data))
    style.legend_above(figure, axes[0])
    return figure


def _fall(method: str, when: str) -> Finding:
    label, _ = LINES[method, when]
    return Finding(
        f"9: live phi'' falls as beta grows ({label})",
        "Percent of inputs with phi'' not 0 at beta = 1 minus that at the largest beta.",
        lambda runs: paired_difference(live(runs, method, when).iloc[:, 0], live(runs, method, when).iloc[:, -1]),
        SMALLEST,
    )


FINDINGS = tuple(_fall(method, when) for method, when in LINES)


def verdicts(table: pd.DataFrame, scale: Scale) -> list[Verdict]:
    """Decide FINDINGS on each data set in the table."""
    return judge(FINDINGS, table, scale, FIGURE.name)


FIGURE = Figure(
    name="9",
    title="Live second derivatives of beta-GELU",
    caption=CAPTION,
    differs=DIFFERS,
    rule=RULE,
    runs=runs,
    draw=draw,
    numbers=numbers,
    verdicts=verdicts,
)
