"""Beyond the paper: how large the NME is beside GN through training, its parts, its layers, and along the gradient.

A reviewer asked how much of the Hessian is neglected, and how much of that is the activations'. All of this was fixed
before the runs with seeds from 100; the trial runs, with seeds 0 to 4, saw the share fall from about 1 to about 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from twofold.lab.config import RunConfig
from twofold.lab.figures import style
from twofold.lab.figures.along_training import at_end, at_start, draw_line, numbers_by_step, over_time
from twofold.lab.figures.figure import Figure
from twofold.lab.figures.figure_1 import DIFFERS, LABELS
from twofold.lab.figures.figure_mechanism import measured
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.style import COLOURS
from twofold.lab.figures.verdicts import Finding, Verdict, judge, paired_difference, rule_for

if TYPE_CHECKING:
    import matplotlib.figure

LABELLINGS = {"noisy labels": None, "clean labels": 0.0}
"""What the training labels are: as in the recipe, or as published."""

SCALES = {"noisy labels": ("smoke", "quick", "cpu"), "clean labels": None}
"""Where they are asked about: the published recipes have no noise."""

LOOKS = {"noisy labels": ("o", "-"), "clean labels": ("s", "--")}

Share = Callable[[pd.DataFrame], pd.Series]
"""Metrics of a run -> percent of GN, one for each measurement."""


def _of_gauss_newton(matrix: str, quantity: str) -> Share:
    return lambda metrics: (
        100 * metrics[f"curvature/{matrix}/{quantity}"] / metrics[f"curvature/gauss_newton/{quantity}"]
    )


WHOLE, PHI, REST, ALONG = "NME", "NME of phi''", "NME without phi''", "NME along the gradient"
PARTS: dict[str, Share] = {
    WHOLE: _of_gauss_newton("nme", "frobenius_norm"),
    PHI: _of_gauss_newton("activation_nme", "frobenius_norm"),
    REST: _of_gauss_newton("rest", "frobenius_norm"),
    ALONG: _of_gauss_newton("nme", "along_gradient"),
}
_ROWS = "curvature/nme/frobenius_norm/"

CAPTION = (
    "The NME in percent of GN along training with plain SGD, with GELU and with ReLU, on noisy and on clean labels, "
    "all on 256 training examples: the ratio of the Frobenius norms; the same for the two parts of the NME, that of "
    "the activations' phi'' and the rest, which products of layers make (the whole anatomy of these networks); "
    "g'NME g / g'GN g along the gradient; and the ratio of norms in the rows of the first and of the last layer. The "
    "table of numbers has every layer. The NME is weighted by the residuals, so it falls as the training examples are "
    "fitted. Lines are means over seeds, bands are 95 % intervals."
)

SMALLEST = 5.0
RULE = rule_for("a difference paired by seed, in percent", SMALLEST)


def _seeds(scale: Scale) -> Sequence[int]:
    """Six at scale quick: the share before training differs much from seed to seed, and these runs are cheap."""
    return range(scale.seeds[0], scale.seeds[0] + 6) if scale.name == "quick" else scale.seeds


def runs(scale: Scale, data: str) -> list[RunConfig]:
    """Plain SGD with both activations, on noisy and on clean labels, with curvature measured."""
    recipe = measured(scale, data)
    found = []
    for activation in LABELS:
        for noise in LABELLINGS.values():
            of_data = recipe.data if noise is None else replace(recipe.data, label_noise=noise)
            model = replace(recipe.model, activation=activation)
            found += [replace(recipe, data=of_data, model=model, seed=seed) for seed in _seeds(scale)]
    return list(dict.fromkeys(found))


def of_curve(table: pd.DataFrame, activation: str, labelling: str) -> pd.DataFrame:
    """The runs of one line."""
    clean = table["data.label_noise"] == 0
    return table[(table["model.activation"] == activation) & (clean == (labelling == "clean labels"))]


def layers_of(table: pd.DataFrame) -> dict[str, Share]:
    """The share in each layer's rows, from the first to the last."""
    names = dict.fromkeys(name for metrics in table["metrics"] for name in metrics.columns if name.startswith(_ROWS))
    modules = [name.removeprefix(_ROWS) for name in names if not name.endswith("_stderr")]
    return {f"NME, layer {module}": _of_gauss_newton("nme", f"frobenius_norm/{module}") for module in modules}


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each data set, part, line and step."""
    return pd.DataFrame(
        [
            {"data": data, "part": part, "activation": activation, "labels": labelling, **row}
            for data, of_data in table.groupby("data.name")
            for part, share in (PARTS | layers_of(of_data)).items()
            for activation in LABELS
            for labelling in LABELLINGS
            for row in numbers_by_step(of_curve(of_data, activation, labelling), {"share": share})
        ],
        columns=[
            "data",
            "part",
            "activation",
            "labels",
            "step",
            "seeds",
            "diverged",
            "share",
            "share_low",
            "share_high",
        ],
    )


def draw(table: pd.DataFrame, columns: int = 3) -> matplotlib.figure.Figure:
    """For each data set a panel for each part, for the first layer and for the last."""
    points = numbers(table)
    panels = []
    for data, of_data in table.groupby("data.name"):
        layers = list(layers_of(of_data))
        panels += [(data, part) for part in dict.fromkeys([*PARTS, *layers[:1], *layers[-1:]])]
    figure, axes = style.panels(len(panels), columns)
    for panel, (data, part) in zip(axes, panels, strict=True):
        drawn = points[(points["data"] == data) & (points["part"] == part)]
        for (activation, labelling), rows in drawn.groupby(["activation", "labels"], sort=False):
            label = f"{LABELS[str(activation)]}, {labelling}"
            draw_line(panel, rows, "share", label, (COLOURS[str(activation)], *LOOKS[str(labelling)]))
        if part == ALONG:
            panel.axhline(0, color=style.INK, linewidth=1)
        else:
            panel.set_ylim(bottom=0)
        panel.set_title(f"{part} (% of GN)")
        panel.set_xlabel("step")
        panel.set_ylabel(str(data))
    style.legend_above(figure, axes[0])
    return figure


def _fall(activation: str, labelling: str) -> Finding:
    quantities = {"share": PARTS[WHOLE]}

    def effect(table: pd.DataFrame) -> pd.Series:
        chosen = of_curve(table, activation, labelling)
        return paired_difference(at_start(chosen, quantities)["share"], at_end(chosen, quantities)["share"])

    return Finding(
        f"The NME's share falls through training ({LABELS[activation]}, {labelling})",
        "||NME|| / ||GN|| before training minus at the last measurement.",
        effect,
        SMALLEST,
        scales=SCALES[labelling],
    )


def _mostly_phi(labelling: str) -> Finding:
    def effect(table: pd.DataFrame) -> pd.Series:
        last = at_end(of_curve(table, "gelu", labelling), {part: PARTS[part] for part in (PHI, REST)})
        return (100 * (last[PHI] - last[REST]) / (last[PHI] + last[REST])).dropna()

    return Finding(
        f"After training most of the NME is that of phi'' (GELU, {labelling})",
        "100 (a - b) / (a + b), a the norm of the NME's part of phi'' and b that of its rest, at the last measurement.",
        effect,
        SMALLEST,
        scales=SCALES[labelling],
    )


def _less_along(activation: str, labelling: str) -> Finding:
    def effect(table: pd.DataFrame) -> pd.Series:
        mean = over_time(
            of_curve(table, activation, labelling),
            {WHOLE: PARTS[WHOLE], ALONG: lambda metrics: PARTS[ALONG](metrics).abs()},
        )
        return paired_difference(mean[WHOLE], mean[ALONG])

    return Finding(
        f"Along the gradient the NME's share is smaller than in norm ({LABELS[activation]}, {labelling})",
        "||NME|| / ||GN|| minus |g'NME g| / g'GN g, each the mean over training.",
        effect,
        SMALLEST,
        scales=SCALES[labelling],
    )


FINDINGS = (
    *(_fall(activation, labelling) for activation in LABELS for labelling in LABELLINGS),
    *map(_mostly_phi, LABELLINGS),
    *(_less_along(activation, labelling) for activation in LABELS for labelling in LABELLINGS),
)


def verdicts(table: pd.DataFrame, scale: Scale) -> list[Verdict]:
    """Decide FINDINGS on each data set in the table."""
    return judge(FINDINGS, table, scale, FIGURE.name)


FIGURE = Figure(
    name="share",
    title="the NME beside GN through training",
    caption=CAPTION,
    differs=("The paper has no such figure.", *DIFFERS[:3], "Scale quick has six seeds here."),
    rule=RULE,
    runs=runs,
    draw=draw,
    numbers=numbers,
    verdicts=verdicts,
)
