"""Curves over the strength of a regularizer: accuracy by seed, means with intervals, each method's own best.

All accuracies here are in percent. A diverged run counts with the accuracy that it ended with; a failed one is missing.
"""

from __future__ import annotations

import math

import pandas as pd

from twofold.lab.figures.verdicts import confidence_interval

SPLITS = ("train", "validation", "test")


def accuracy(runs: pd.DataFrame, split: str) -> pd.DataFrame:
    """Accuracy of the runs of one curve: one row a seed, one column a strength, NaN where there is no result."""
    if runs.empty:
        return pd.DataFrame(dtype=float)
    percent = 100 * runs.get(f"{split}/accuracy", pd.Series(math.nan, index=runs.index)).astype(float)
    points = runs[["seed", "regularizer.strength"]].assign(percent=percent)
    return points.pivot(index="seed", columns="regularizer.strength", values="percent")


def at_strength(table: pd.DataFrame, strength: float) -> pd.Series:
    """One column of `accuracy`'s table; all NaN where there is no such strength."""
    return table[strength] if strength in table.columns else pd.Series(math.nan, index=table.index)


def best_strength(runs: pd.DataFrame) -> float:
    """The strength above 0 with the highest mean validation accuracy, the smaller of equals; NaN where there is none.

    It is the same for all seeds, and no test example has a say in it.
    """
    means = accuracy(runs, "validation").drop(columns=0.0, errors="ignore").mean().dropna()
    return float(means.idxmax()) if len(means) else math.nan


def num_diverged(runs: pd.DataFrame) -> int:
    """How many of these runs diverged."""
    return int(runs["status"].eq("diverged").sum())


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """A curve as numbers: one row a strength, with mean and 95 % interval over seeds of the accuracy on each split.

    Columns: rho, seeds, diverged, best ("yes" at the strength with the best validation accuracy), and for each split
    SPLIT, SPLIT_low, SPLIT_high.
    """
    tables = {split: accuracy(runs, split) for split in SPLITS}
    best = best_strength(runs)
    rows = []
    for strength in sorted(runs["regularizer.strength"].unique()):
        row = {
            "rho": strength,
            "seeds": int(tables["test"][strength].count()),
            "diverged": num_diverged(runs[runs["regularizer.strength"] == strength]),
            "best": "yes" if strength == best else "",
        }
        for split, table in tables.items():
            row |= interval_columns(split, table[strength])
        rows.append(row)
    return pd.DataFrame(rows)


def interval_columns(name: str, values: pd.Series) -> dict[str, float]:
    """The columns NAME, NAME_low and NAME_high of a table of numbers."""
    found = confidence_interval(values)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
