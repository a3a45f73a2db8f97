"""Beyond the paper: how well rho C g^ predicts what SAM adds to the gradient, along training.

The paper explains the gradient penalty's failure by what its Hessian lacks; this measures the lack itself. All of this
was fixed before the runs with seeds from 100; the trial runs, with seeds 0 to 4, are told in the findings' direction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from twofold.lab.config import RegularizerConfig, RunConfig
from twofold.lab.figures import style
from twofold.lab.figures.along_training import draw_line, numbers_by_step, over_time
from twofold.lab.figures.figure import Figure
from twofold.lab.figures.figure_1 import DIFFERS, LABELS
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.style import COLOURS
from twofold.lab.figures.verdicts import Finding, Verdict, judge, paired_difference, rule_for

if TYPE_CHECKING:
    import matplotlib.figure

RHO = 0.1
EPOCHS_BETWEEN = {"smoke": 1, "quick": 5, "cpu": 2, "paper": 10}
CURVATURES = {
    "H": ("hessian", (COLOURS["gelu"], "o", "-")),
    "H, phi'' := 0": ("hessian_without_activation_nme", (COLOURS["purple"], "D", "--")),
    "H, synthetic phi'', beta 2": ("hessian_gaussian_2", (COLOURS["relu"], "^", "-")),
    "H, synthetic phi'', beta 100": ("hessian_gaussian_100", (COLOURS["relu"], "v", ":")),
    "GN": ("gauss_newton", (COLOURS["green"], "s", ":")),
}
"""Legend -> name in the metrics, and look."""

KINDS = {"error": "relative_error", "cosine": "cosine"}
QUANTITIES = {
    f"{label}, {kind}": lambda metrics, key=f"fidelity/{name}/{quantity}": 100 * metrics[key]
    for kind, quantity in KINDS.items()
    for label, (name, _) in CURVATURES.items()
}

CAPTION = (
    "How well rho C g^ predicts SAM's own correction, grad L(theta + rho g^) - grad L(theta), at "
    f"rho = {RHO:g} on 256 training examples along training with plain SGD: relative error and cosine, in percent, for "
    "the Hessian as C, the Hessian with phi'' := 0, the Hessian with a synthetic phi'' in the place of the "
    "activations' own (the bell of figure 3), and GN. At an error of 100 % a gradient penalty with that "
    "curvature is no better than none. Lines are means over seeds, bands are 95 % intervals, cut "
    "at 140 %."
)

SMALLEST = 5.0
RULE = rule_for("a difference of relative errors paired by seed, in percent, mean over training", SMALLEST)


def measured(scale: Scale, data: str) -> RunConfig:
    """Plain SGD with curvature and fidelity measured along training."""
    every = EPOCHS_BETWEEN[scale.name]
    return replace(scale.recipe(data), curvature_every=every, fidelity_rho=RHO, regularizer=RegularizerConfig())


def runs(scale: Scale, data: str) -> list[RunConfig]:
    """Plain SGD with both activations, with fidelity measured."""
    recipe = measured(scale, data)
    return [
        replace(recipe, model=replace(recipe.model, activation=activation), seed=seed)
        for activation in LABELS
        for seed in scale.seeds
    ]


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each data set, activation and step, with error and cosine of every curvature."""
    intervals = [name + end for name in QUANTITIES for end in ("", "_low", "_high")]
    return pd.DataFrame(
        [
            {"data": data, "activation": activation, **row}
            for (data, activation), chosen in table.groupby(["data.name", "model.activation"])
            for row in numbers_by_step(chosen, QUANTITIES)
        ],
        columns=["data", "activation", "step", "seeds", "diverged", *intervals],
    )


def draw(table: pd.DataFrame, columns: int = 3) -> matplotlib.figure.Figure:
    """For each data set and activation a panel of errors and one of cosines."""
    points = numbers(table)
    panels = [(data, kind, a) for data in table["data.name"].unique() for kind in KINDS for a in LABELS]
    figure, axes = style.panels(len(panels), min(columns, 2))
    for panel, (data, kind, activation) in zip(axes, panels, strict=True):
        rows = points[(points["data"] == data) & (points["activation"] == activation)]
        for label, (_, look) in CURVATURES.items():
            draw_line(panel, rows, f"{label}, {kind}", label, look)
        lowest = min([0.0, *(rows[f"{label}, {kind}_low"].min() for label in CURVATURES if len(rows))])
        panel.set_ylim(max(lowest, -100.0), 140 if kind == "error" else 105)
        panel.axhline(100, color=style.INK, linewidth=1)
        panel.set_title(f"{kind.capitalize()} of rho C g^ (%), {LABELS[activation]}")
        panel.set_xlabel("step")
        panel.set_ylabel(data)
    style.legend_above(figure, axes[0])
    return figure


def errors(table: pd.DataFrame, activation: str) -> pd.DataFrame:
    """Relative errors, mean over training: one row a seed, one column a curvature."""
    of_label = {label: QUANTITIES[f"{label}, error"] for label in CURVATURES}
    return over_time(table[table["model.activation"] == activation], of_label)


FINDINGS = (
    Finding(
        "Without phi'' the Hessian predicts SAM's correction worse (GELU)",
        "Relative error of H with phi'' := 0 minus that of H, with GELU.",
        lambda table: paired_difference(errors(table, "gelu")["H, phi'' := 0"], errors(table, "gelu")["H"]),
        SMALLEST,
    ),
    Finding(
        "GN alone predicts SAM's correction worse than H (GELU)",
        "Relative error of GN minus that of H, with GELU.",
        lambda table: paired_difference(errors(table, "gelu")["GN"], errors(table, "gelu")["H"]),
        SMALLEST,
    ),
    Finding(
        "The Hessian predicts SAM's correction worse with ReLU than with GELU",
        "Relative error of H with ReLU minus with GELU.",
        lambda table: paired_difference(errors(table, "relu")["H"], errors(table, "gelu")["H"]),
        SMALLEST,
    ),
    Finding(
        "A synthetic phi'' (beta 2) lets the Hessian predict SAM's correction better (ReLU)",
        "Relative error of H minus that of H with the synthetic phi'' of beta = 2, with ReLU.",
        lambda table: paired_difference(*(errors(table, "relu")[c] for c in ("H", "H, synthetic phi'', beta 2"))),
        SMALLEST,
    ),
)


def verdicts(table: pd.DataFrame, scale: Scale) -> list[Verdict]:
    """Decide FINDINGS on each data set in the table."""
    return judge(FINDINGS, table, scale, FIGURE.name)


FIGURE = Figure(
    name="mechanism",
    title="what predicts SAM's correction",
    caption=CAPTION,
    differs=("The paper has no such figure.", *DIFFERS[:3]),
    rule=RULE,
    runs=runs,
    draw=draw,
    numbers=numbers,
    verdicts=verdicts,
)
