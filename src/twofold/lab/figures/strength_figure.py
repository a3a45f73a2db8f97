"""Figures of one kind: test and training accuracy of several curves over a strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from twofold.lab.config import RunConfig
from twofold.lab.figures import style
from twofold.lab.figures.curves import Curve, at_equal_strength, best_against_best, distance, summarise
from twofold.lab.figures.figure import Figure
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.verdicts import Finding, judge, paired_difference

if TYPE_CHECKING:
    import matplotlib.figure

SMALL_RHO = 0.15
"""Below it the trial runs, with other seeds, saw what the paper reports; above it they saw other things."""

PANELS = {"test": "Test accuracy (%)", "train": "Training accuracy (%)"}


def strength_figure(
    *,
    name: str,
    title: str,
    caption: str,
    differs: tuple[str, ...],
    rule: str,
    curves: Sequence[Curve],
    values: Mapping[str, Sequence[float]],
    findings: Sequence[Finding],
    axis: str = "rho",
    recipe: Callable[[Scale, str], RunConfig] = Scale.recipe,
    seeds: Callable[[Scale], Sequence[int]] = lambda scale: scale.seeds,
) -> Figure:
    """A figure whose panels are test and training accuracy, a line for each curve.

    Args:
        name: as in `Figure`, like the next four.
        title: what it shows.
        caption: what is drawn.
        differs: what differs from the paper's set-up.
        rule: how it is judged.
        curves: what is drawn; one without runs in the table is left out.
        values: scale's name -> values of the axis, without 0.
        findings: what is judged.
        axis: the axis' name.
        recipe: (scale, data set's name) -> the configuration that the curves vary.
        seeds: scale -> seeds, where the figure takes fewer than others.
    """

    def runs(scale: Scale, data: str) -> list[RunConfig]:
        chosen = [curve for curve in curves if curve.scales is None or scale.name in curve.scales]
        base = recipe(scale, data)
        every = [config for curve in chosen for config in curve.configs(base, values[scale.name], seeds(scale))]
        return list(dict.fromkeys(every))

    def numbers(table: pd.DataFrame) -> pd.DataFrame:
        rows = []
        for data, of_data in table.groupby("data.name"):
            for curve in curves:
                if curve.has_runs(of_data):
                    points = summarise(curve.of(of_data), name=axis)
                    points.insert(0, "data", data)
                    points.insert(1, "curve", curve.label)
                    rows.append(points)
        return pd.concat(rows, ignore_index=True)

    def draw(table: pd.DataFrame, columns: int = 3) -> matplotlib.figure.Figure:
        return draw_accuracy(numbers(table), {curve.label: curve.look for curve in curves}, axis, columns)

    def verdicts(table: pd.DataFrame, scale: Scale) -> list:
        return judge(findings, table, scale, name)

    return Figure(name, title, caption, differs, rule, runs, draw, numbers, verdicts)


def draw_accuracy(
    points: pd.DataFrame, looks: Mapping[str, tuple[str, str, str]], axis: str, columns: int
) -> matplotlib.figure.Figure:
    """Test and training accuracy against an axis, for each data set.

    Args:
        points: one row a point, with data, curve, the axis, diverged, and test and train with their intervals.
        looks: curve -> colour, marker and dash.
        axis: the column that is the x axis.
        columns: panels side by side.
    """
    panels = [(data, split) for data in points["data"].unique() for split in PANELS]
    figure, axes = style.panels(len(panels), min(columns, 2))
    for panel, (data, split) in zip(axes, panels, strict=True):
        lines = [
            style.Line(rows, str(label), *looks[str(label)])
            for label, rows in points[points["data"] == data].groupby("curve", sort=False)
        ]
        style.strength_curves(panel, lines, split, within=(0, 100), axis=axis)
        panel.set_title(PANELS[split])
        panel.set_ylabel(data)
    style.legend_above(figure, axes[0])
    return figure


def contrast_findings(claim: str, better: Curve, worse: Curve, sam: Curve) -> tuple[Finding, ...]:
    """What the paper claims of two ways to take the penalty: one helps more, and follows SAM more closely.

    Args:
        claim: the finding's number and text.
        better: the curve that the paper finds better; it is asked at this curve's scales.
        worse: the one that it finds worse.
        sam: SAM with the same activation.
    """
    gap = f"test accuracy of {better.label} minus that of {worse.label}"

    def pair(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        return better.of(runs), worse.of(runs)

    def follows(runs: pd.DataFrame) -> pd.Series:
        reference = sam.of(runs)
        near, far = (distance(side, reference) for side in pair(runs))
        return paired_difference(far, near)

    return (
        Finding(
            f"{claim} (test accuracy, equal rho up to {SMALL_RHO:g})",
            f"Mean over rho up to {SMALL_RHO:g} of {gap}.",
            lambda runs: at_equal_strength(*pair(runs), high=SMALL_RHO),
            scales=better.scales,
        ),
        Finding(
            f"{claim} (test accuracy, equal rho above {SMALL_RHO:g})",
            f"Mean over rho above {SMALL_RHO:g} of {gap}.",
            lambda runs: at_equal_strength(*pair(runs), low=SMALL_RHO),
            scales=better.scales,
        ),
        Finding(
            f"{claim} (test accuracy, each at its own best rho)",
            f"The {gap}, each at its own best rho.",
            lambda runs: best_against_best(*pair(runs)),
            scales=better.scales,
        ),
        Finding(
            f"{claim} (distance from SAM's training accuracy)",
            f"Mean over rho > 0 of |training accuracy - that of SAM|, for {worse.label} minus for {better.label}.",
            follows,
            scales=better.scales,
        ),
    )
