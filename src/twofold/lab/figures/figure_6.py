"""Figure 6: tr H and tr GN along training while one of them is penalised, and with plain SGD.

Settings come from trial runs with seeds 0 to 4; all of this was fixed before the runs that are judged, with seeds from
100, and from 200 at scale cpu: there the strength was 0.008 at first, which ends training on Fashion-MNIST, and the
measurement before training counted. The shorter runs of scale quick stay at 0.008: at 0.004 one of three seeds ended
above 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.ticker import SymmetricalLogLocator

from twofold.lab.config import RunConfig
from twofold.lab.figures import style
from twofold.lab.figures.along_training import measurements, numbers_by_step
from twofold.lab.figures.curves import Curve
from twofold.lab.figures.figure import Figure
from twofold.lab.figures.figure_1 import LABELS
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.style import COLOURS
from twofold.lab.figures.traces import FIXED_HESSIAN_OF_LOSS, TRACE_DIFFERS, trace_curve, trace_recipe
from twofold.lab.figures.verdicts import Finding, Verdict, judge, rule_for

if TYPE_CHECKING:
    import matplotlib.figure

SIGMA_SQUARED = {
    "smoke": {"mnist1d": 8e-3, "fashion-mnist": 2e-3},
    "quick": {"mnist1d": 8e-3, "fashion-mnist": 2e-3},
    "cpu": {"mnist1d": 4e-3, "fashion-mnist": 2e-3},
    "paper": dict.fromkeys(("imagenet", "cifar10", "fashion-mnist"), 1e-3),
}
"""At cpu the smallest strength of figure 4's grid at which tr H ended below 0 in every trial run."""

EPOCHS_BETWEEN = {"smoke": 1, "quick": 2, "cpu": 4, "paper": 10}
TRACES = {
    name: lambda metrics, key=f"curvature/{matrix}/trace": metrics[key]
    for name, matrix in {"tr H": "hessian", "tr GN": "gauss_newton", "tr NME": "nme"}.items()
}
ACCURACIES = {split: lambda metrics, key=f"{split}/accuracy": 100 * metrics[key] for split in ("train", "test")}
QUANTITIES = {**TRACES, **ACCURACIES}
"""What the table of numbers has, the accuracies in percent."""

SGD = "SGD"
HESSIAN = trace_curve("tr H penalised", "hessian_trace", (COLOURS["purple"], "D", "--"))
GAUSS_NEWTON = trace_curve("tr GN penalised", "gauss_newton_trace", (COLOURS["green"], "s", "-"))
CONTROL = replace(HESSIAN, activation="relu")
LOOKS = {SGD: (COLOURS["relu"], "o", ":"), HESSIAN.label: HESSIAN.look, GAUSS_NEWTON.label: GAUSS_NEWTON.look}
PANELS = (("gelu", "tr H"), ("gelu", "tr GN"), ("relu", "tr H"))

CAPTION = (
    "tr H and tr GN on 256 training examples along training, with plain SGD and while tr H or tr GN is penalised with "
    "the strength that matches weight noise of variance sigma^2, with GELU and, as a control, with ReLU, where "
    "phi'' = 0 and so tr H = tr GN. The axis is linear near 0 and logarithmic beyond. Lines are means over seeds, "
    "bands are 95 % intervals; a diverged run counts up to its last finite measurement. The table of numbers has the "
    "accuracies at the same steps."
)

DIFFERS = (
    *TRACE_DIFFERS[:3],
    FIXED_HESSIAN_OF_LOSS,
    "sigma^2 is 0.004 on MNIST-1D and 0.002 on the small Fashion-MNIST, the smallest of figure 4's strengths at which "
    "tr H ended below 0 in all five trial runs, 0.008 in the shorter runs of scale quick, and 0.001 in the paper; the "
    "penalty is sigma^2 / 2 tr, the paper's is sigma^2 tr.",
    "Traces are Hutchinson estimates with 16 probes on a fixed batch of training examples, in eval mode; the paper "
    "does not say.",
    "ReLU is added as a control.",
)

SMALLEST = 10.0
RULE = rule_for("in percent", SMALLEST) + (
    " Traces are those of each run's last finite measurement after the first step. The share of tr H is "
    "100 tr H / (tr GN + |tr NME|), from -100 to 100: the trace of H against the sizes of its two halves."
)


def runs(scale: Scale, data: str) -> list[RunConfig]:
    """SGD and both penalties with GELU, SGD and the penalty on tr H with ReLU, with curvature measured."""
    measured = replace(trace_recipe(scale, data), curvature_every=EPOCHS_BETWEEN[scale.name])
    values = (SIGMA_SQUARED[scale.name][data],)
    curves = (HESSIAN, GAUSS_NEWTON, CONTROL)
    return list(dict.fromkeys(config for c in curves for config in c.configs(measured, values, scale.seeds)))


def of_curve(table: pd.DataFrame, curve: Curve) -> pd.DataFrame:
    """The runs of one curve without plain SGD."""
    return curve.of(table).query("`regularizer.name` != 'none'")


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each data set, activation, penalty and step, with the three traces and the accuracies in percent."""
    intervals = [name + end for name in QUANTITIES for end in ("", "_low", "_high")]
    return pd.DataFrame(
        [
            {"data": data, "activation": activation, "curve": label, **row}
            for (data, activation), of_activation in table.groupby(["data.name", "model.activation"])
            for label, chosen in _by_penalty(of_activation).items()
            for row in numbers_by_step(chosen, QUANTITIES)
        ],
        columns=["data", "activation", "curve", "step", "seeds", "diverged", *intervals],
    )


def _by_penalty(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    names = {SGD: "none", HESSIAN.label: HESSIAN.regularizer.name, GAUSS_NEWTON.label: GAUSS_NEWTON.regularizer.name}
    return {label: runs[runs["regularizer.name"] == name] for label, name in names.items()}


def draw(table: pd.DataFrame, columns: int = 3) -> matplotlib.figure.Figure:
    """Three panels for each data set: tr H and tr GN with GELU, tr H with ReLU."""
    points = numbers(table)
    panels = [(data, *panel) for data in table["data.name"].unique() for panel in PANELS]
    figure, axes = style.panels(len(panels), columns)
    for panel, (data, activation, name) in zip(axes, panels, strict=True):
        drawn = points[(points["data"] == data) & (points["activation"] == activation)]
        for label, rows in drawn.groupby("curve", sort=False):
            colour, marker, dash = LOOKS[str(label)]
            low = rows[f"{name}_low"].clip(lower=0.0 if name == "tr GN" else None)  # GN has no negative trace
            panel.fill_between(rows["step"], low, rows[f"{name}_high"], color=colour, alpha=0.15, lw=0)
            panel.plot(rows["step"], rows[name], color=colour, marker=marker, linestyle=dash, label=label)
            texts = [
                f"{label}, step {row['step']:g}: {style.with_interval(row, name)}, {style.seeds_of(row)}"
                for _, row in rows.iterrows()
            ]
            style.hover(panel, rows["step"], rows[name], texts)
        panel.axhline(0, color=style.INK, linewidth=1)
        panel.set_yscale("symlog", linthresh=10)
        few = SymmetricalLogLocator(base=10, linthresh=10)
        few.set_params(numticks=9)
        panel.yaxis.set_major_locator(few)
        panel.set_title(f"{name}, {LABELS[activation]}")
        panel.set_xlabel("step")
        panel.set_ylabel(data)
    style.legend_above(figure, axes[0])
    return figure


def last_traces(runs: pd.DataFrame) -> pd.DataFrame:
    """The traces at each run's last finite measurement, by seed; those before training count for no run."""
    return measurements(runs, QUANTITIES).query("step > 0").sort_values("step").groupby("seed").last()


def share(runs: pd.DataFrame) -> pd.Series:
    """100 tr H / (tr GN + |tr NME|) at the last measurement, by seed."""
    last = last_traces(runs)
    return 100 * last["tr H"] / (last["tr GN"] + last["tr NME"].abs())


def _smaller(runs: pd.DataFrame) -> pd.Series:
    large, small = (last_traces(of_curve(runs, curve))["tr GN"] for curve in (HESSIAN, GAUSS_NEWTON))
    return (100 * (large - small) / (large + small)).dropna()


FINDINGS = (
    Finding(
        "6: penalised, tr H runs to negative values (GELU)",
        "Minus the share of tr H with the penalty on tr H and GELU.",
        lambda runs: -share(of_curve(runs, HESSIAN)),
        SMALLEST,
    ),
    Finding(
        "6: penalising tr GN keeps tr H positive (GELU)",
        "The share of tr H with the penalty on tr GN and GELU.",
        lambda runs: share(of_curve(runs, GAUSS_NEWTON)),
        SMALLEST,
    ),
    Finding(
        "6: penalising tr GN brings tr GN lower than penalising tr H (GELU)",
        "100 (a - b) / (a + b), a the tr GN with the penalty on tr H and b that with the penalty on tr GN.",
        _smaller,
        SMALLEST,
    ),
    Finding(
        "6, control: without phi'', penalised tr H stays positive (ReLU)",
        "The share of tr H with the penalty on tr H and ReLU.",
        lambda runs: share(of_curve(runs, CONTROL)),
        SMALLEST,
    ),
)


def verdicts(table: pd.DataFrame, scale: Scale) -> list[Verdict]:
    """Decide FINDINGS on each data set in the table."""
    return judge(FINDINGS, table, scale, FIGURE.name)


FIGURE = Figure(
    name="6",
    title="tr H and tr GN while they are penalised",
    caption=CAPTION,
    differs=DIFFERS,
    rule=RULE,
    runs=runs,
    draw=draw,
    numbers=numbers,
    verdicts=verdicts,
)
