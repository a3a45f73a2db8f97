"""Figure 7: loss and ||NME|| over the two weights of a hidden layer, one datum, for GELU, beta-GELU and ReLU.

Nothing is trained. One datum is drawn a seed; the rule was fixed before they were looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import ndtr

from twofold.lab.config import RunConfig
from twofold.lab.figures import style
from twofold.lab.figures.figure import Figure
from twofold.lab.figures.scales import Scale
from twofold.lab.figures.verdicts import Finding, Verdict, judge, rule_for

if TYPE_CHECKING:
    import matplotlib.figure

BETAS = {"GELU": 1.0, "beta-GELU, beta 16": 16.0, "ReLU": math.inf}
REACH, POINTS, EVERY = 3.0, 61, 6  # the weights go from -REACH to REACH; every sixth point is in the table of numbers
SMALLEST = 10.0
DEAD = 0.01  # an ||NME|| below this share of its maximum counts as none

CAPTION = (
    "Loss (above) and Frobenius norm of the NME (below, on a logarithmic scale, blank below 0.001) over the two "
    "weights w of a hidden layer of two units, z = a . phi(w x + b), for the squared error on one datum: GELU, "
    "beta-GELU with beta = 16, and ReLU. The losses look alike; the NME is spread out for GELU, confined to strips for "
    "large beta, and 0 for ReLU. The table of numbers has every sixth point in each direction."
)

DIFFERS = (
    "The paper does not give its network and datum. Here x, y, a and b are standard normal, drawn anew for each seed; "
    "the drawing shows that of seed 100.",
    "The NME is that of the two weights that are varied.",
    "It is the same at every scale and for every data set; scales differ in the number of data.",
)

RULE = rule_for("a percentage for each datum", SMALLEST) + (
    " Two surfaces f and g >= 0 differ by 100 sum |f - g| / sum (f + g) over the drawn plane, from 0 to 100."
)


@dataclass(frozen=True)
class Toy:
    """z = a . phi(w x + b) with two units, and one datum (x, y)."""

    x: float
    y: float
    a: tuple[float, float]
    b: tuple[float, float]

    @classmethod
    def draw(cls, seed: int) -> Toy:
        """The network and datum of a seed."""
        x, y, a1, a2, b1, b2 = np.random.default_rng(seed).standard_normal(6).tolist()
        return cls(x, y, (a1, a2), (b1, b2))

    def surfaces(self, beta: float, w1: np.ndarray, w2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss (z - y)^2 and ||NME|| at the weights (w1, w2), for beta-GELU; ReLU at beta = inf.

        The NME in w is diagonal: 2 (z - y) a_i phi''(h_i) x^2 with h_i = w_i x + b_i.
        """
        inputs = [w * self.x + b for w, b in zip((w1, w2), self.b, strict=True)]
        residual = self.a[0] * _phi(inputs[0], beta) + self.a[1] * _phi(inputs[1], beta) - self.y
        bends = [2 * residual * a * _bend(h, beta) * self.x**2 for a, h in zip(self.a, inputs, strict=True)]
        return residual**2, np.hypot(*bends)


def _phi(h: np.ndarray, beta: float) -> np.ndarray:
    return np.maximum(h, 0) if math.isinf(beta) else h * ndtr(beta * h)


def _bend(h: np.ndarray, beta: float) -> np.ndarray:
    """phi'' of beta-GELU, beta n(beta h) (2 - (beta h)^2); zero for ReLU."""
    if math.isinf(beta):
        return np.zeros_like(h)
    s = beta * h
    return beta * np.exp(-(s**2) / 2) / math.sqrt(2 * math.pi) * (2 - s**2)


def plane(toy: Toy, beta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The weights along an axis, and loss and ||NME|| over the plane, [w2, w1]."""
    axis = np.linspace(-REACH, REACH, POINTS)
    return axis, *toy.surfaces(beta, *np.meshgrid(axis, axis))


def runs(scale: Scale, data: str) -> list[RunConfig]:
    """Nothing is trained."""
    return []


def shown() -> Toy:
    """The datum that is drawn."""
    return Toy.draw(100)


def numbers(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each activation and every sixth point of the drawn plane, in both directions."""
    rows = []
    for label, beta in BETAS.items():
        axis, loss, norm = plane(shown(), beta)
        rows += [
            {"activation": label, "w1": axis[i], "w2": axis[j], "loss": loss[j, i], "NME": norm[j, i]}
            for j in range(0, POINTS, EVERY)
            for i in range(0, POINTS, EVERY)
        ]
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, columns: int = 3) -> matplotlib.figure.Figure:
    """Two rows of panels, loss and ||NME||, one column for each activation."""
    planes = {label: plane(shown(), beta) for label, beta in BETAS.items()}
    highest = max(loss.max() for _, loss, _ in planes.values())
    figure, axes = style.panels(2 * len(BETAS), columns)
    for panel, (label, (axis, loss, _)) in zip(axes, planes.items(), strict=False):
        drawn = panel.contourf(axis, axis, loss, levels=np.linspace(0, highest, 13), cmap="viridis")
        figure.colorbar(drawn, ax=panel, format="%.2g")
        panel.set_title(f"Loss, {label}")
    for panel, (label, (axis, _, norm)) in zip(axes[len(BETAS) :], planes.items(), strict=True):
        panel.set_title(f"||NME||, {label}")
        if norm.any():
            visible = np.ma.masked_less(norm, 1e-3)
            levels = np.logspace(-3, 2, 11)
            drawn = panel.contourf(axis, axis, visible, levels=levels, norm="log", cmap="viridis", extend="max")
            figure.colorbar(drawn, ax=panel, ticks=levels[::2], format="%g")
        else:
            panel.set_xlim(-REACH, REACH)
            panel.set_ylim(-REACH, REACH)
            panel.text(0, 0, "0 everywhere", ha="center", va="center")
    for panel in axes[: 2 * len(BETAS)]:
        panel.set_xlabel("w1")
        panel.set_ylabel("w2")
        panel.grid(False)
    return figure


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """100 sum |f - g| / sum (f + g) of two surfaces that are not negative."""
    return float(100 * np.abs(first - second).sum() / (first + second).sum())


def alike_in_loss_only(toy: Toy) -> float:
    """How much more GELU and ReLU differ in the NME than in the loss."""
    (_, loss, norm), (_, relu_loss, relu_norm) = (plane(toy, BETAS[label]) for label in ("GELU", "ReLU"))
    return difference(norm, relu_norm) - difference(loss, relu_loss)


def confined(toy: Toy) -> float:
    """Percent of the plane with an NME at beta = 1, minus that at beta = 16."""
    wide, narrow = (plane(toy, BETAS[label])[2] for label in ("GELU", "beta-GELU, beta 16"))
    return float(100 * ((wide > DEAD * wide.max()).mean() - (narrow > DEAD * narrow.max()).mean()))


def _of_seeds(effect: Callable[[Toy], float]) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda data: pd.Series({seed: effect(Toy.draw(seed)) for seed in data["seed"]}, dtype=float)


FINDINGS = (
    Finding(
        "7: GELU and ReLU differ more in the NME than in the loss",
        "How much ||NME|| differs between GELU and ReLU minus how much the loss does.",
        _of_seeds(alike_in_loss_only),
        SMALLEST,
    ),
    Finding(
        "7: large beta confines the NME to strips",
        f"Percent of the plane where ||NME|| exceeds {DEAD:g} of its maximum, at beta = 1 minus at beta = 16.",
        _of_seeds(confined),
        SMALLEST,
    ),
)


def verdicts(table: pd.DataFrame, scale: Scale) -> list[Verdict]:
    """Decide FINDINGS over the scale's seeds, one datum each."""
    data = pd.DataFrame({"data.name": "toy", "seed": scale.seeds, "status": "finished"})
    return judge(FINDINGS, data, scale, FIGURE.name)


FIGURE = Figure(
    name="7",
    title="Loss and NME of a toy network",
    caption=CAPTION,
    differs=DIFFERS,
    rule=RULE,
    runs=runs,
    draw=draw,
    numbers=numbers,
    verdicts=verdicts,
)
