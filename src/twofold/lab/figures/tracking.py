"""Controls of figure 1: does PSAM fall behind SAM without phi'' in another setting too?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from twofold.lab.config import RunConfig
from twofold.lab.figures import figure_1
from twofold.lab.figures.curves import Curve, distance
from twofold.lab.figures.figure import Figure
from twofold.lab.figures.penalties import GELU_PSAM, GELU_SAM, POINTS
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.strength_figure import strength_figure
from twofold.lab.figures.verdicts import Finding, paired_difference

RHO = {**{name: values[:3] for name, values in figure_1.RHO.items()}, "quick": (0.1, 0.2)}
"""Up to 0.2, where the trial runs saw the effect."""


def tracking_figure(
    name: str,
    *,
    title: str,
    setting: str,
    sam: Curve,
    psam: Curve,
    values: Mapping[str, Sequence[float]] = RHO,
    recipe: Callable[[Scale, str], RunConfig] = Scale.recipe,
) -> Figure:
    """SAM and PSAM with GELU and with another activation, judged by how far PSAM's training accuracy lies from SAM's.

    Args:
        name: as in `Figure`.
        title: what it shows.
        setting: what differs from figure 1's small networks, one sentence.
        sam: SAM with the other activation.
        psam: PSAM with it.
        values: scale's name -> values of rho, without 0.
        recipe: (scale, data set's name) -> the configuration that the curves vary.
    """
    other = psam.label.removesuffix(" PSAM")
    return strength_figure(
        name=name,
        title=title,
        caption=f"Accuracy against rho for SAM and PSAM, with GELU and with {other}. {setting} {POINTS}",
        differs=("The paper has no such figure; a reviewer asked for it.", setting, *figure_1.DIFFERS[:2]),
        rule=figure_1.RULE,
        curves=(GELU_SAM, GELU_PSAM, sam, psam),
        values=values,
        findings=(tracking_finding(name, sam, psam),),
        recipe=recipe,
    )


def tracking_finding(name: str, sam: Curve, psam: Curve) -> Finding:
    """How much farther PSAM's training accuracy lies from SAM's with another activation than with GELU.

    Args:
        name: the figure's name.
        sam: SAM with the other activation.
        psam: PSAM with it.
    """
    other = psam.label.removesuffix(" PSAM")

    def effect(runs: pd.DataFrame) -> pd.Series:
        far = distance(psam.of(runs), sam.of(runs))
        return paired_difference(far, distance(GELU_PSAM.of(runs), GELU_SAM.of(runs)))

    return Finding(
        f"PSAM follows SAM with GELU and parts from it with {other} ({name})",
        f"Mean over rho > 0 of |training accuracy of PSAM - that of SAM|, with {other} minus with GELU.",
        effect,
    )
