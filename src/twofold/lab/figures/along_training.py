"""What figures of a quantity along training share: measurements by run and step, their means, and the lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from twofold.lab.figures import style
from twofold.lab.figures.curves import interval_columns

Quantities = Mapping[str, Callable[[pd.DataFrame], pd.Series]]
"""Name -> what computes it from the columns of a run's metrics."""


def measurements(runs: pd.DataFrame, quantities: Quantities) -> pd.DataFrame:
    """One row a run and step at which everything was measured: seed, step, diverged and the quantities.

    Finite ones only; of two measurements of a run at one step, as where the next one made it diverge, the last.
    """
    rows = []
    for seed, status, metrics in zip(runs["seed"], runs["status"], runs.get("metrics", ()), strict=False):
        try:
            found = {name: compute(metrics) for name, compute in quantities.items()}
        except KeyError:  # a run that never came to measure
            continue
        rows.append(pd.DataFrame({"seed": seed, "step": metrics["step"], "diverged": status == "diverged", **found}))
    table = pd.concat(rows) if rows else pd.DataFrame(columns=["seed", "step", "diverged", *quantities], dtype=float)
    return table.replace([math.inf, -math.inf], math.nan).dropna().drop_duplicates(["seed", "step"], keep="last")


def at_end(runs: pd.DataFrame, quantities: Quantities) -> pd.DataFrame:
    """The quantities at each run's last finite measurement, by seed."""
    return measurements(runs, quantities).sort_values("step").groupby("seed").last()


def at_start(runs: pd.DataFrame, quantities: Quantities) -> pd.DataFrame:
    """The quantities at each run's first finite measurement, by seed."""
    return measurements(runs, quantities).sort_values("step").groupby("seed").first()


def over_time(runs: pd.DataFrame, quantities: Quantities) -> pd.DataFrame:
    """The mean of the quantities over all measurements of a run, by seed."""
    return measurements(runs, quantities).groupby("seed")[list(quantities)].mean()


def numbers_by_step(runs: pd.DataFrame, quantities: Quantities) -> list[dict[str, Any]]:
    """One row a step: its seeds, how many of their runs diverged, and mean and interval of each quantity."""
    rows = []
    for step, measured in measurements(runs, quantities).groupby("step"):
        row: dict[str, Any] = {"step": step, "seeds": len(measured), "diverged": int(measured["diverged"].sum())}
        for name in quantities:
            row |= interval_columns(name, measured[name])
        rows.append(row)
    return rows


def draw_line(panel: Axes, rows: pd.DataFrame, name: str, label: str, look: tuple[str, str, str]) -> None:
    """A quantity over the steps with a band for its interval; points tell their values."""
    if rows.empty:
        return
    colour, marker, dash = look
    panel.fill_between(rows["step"], rows[f"{name}_low"], rows[f"{name}_high"], color=colour, alpha=0.15, lw=0)
    panel.plot(rows["step"], rows[name], color=colour, marker=marker, linestyle=dash, label=label)
    texts = [
        f"{label}, step {row['step']:g}: {style.with_interval(row, name)}, {style.seeds_of(row)}"
        for _, row in rows.iterrows()
    ]
    style.hover(panel, rows["step"], rows[name], texts)
