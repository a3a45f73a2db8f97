"""Curves over the strength of a regularizer: accuracy by seed, means with intervals, each method's own best.

All accuracies here are in percent. A diverged run counts with the accuracy that it ended with; a failed one is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from twofold.lab.config import RegularizerConfig, RunConfig
from twofold.lab.figures.verdicts import confidence_interval, paired_difference
from twofold.lab.runs import flatten

SPLITS = ("train", "validation", "test")
STRENGTH = "regularizer.strength"


@dataclass(frozen=True)
class Curve:
    """One regularizer over its strengths with one activation: which runs it has, and how it is drawn.

    Attributes:
        label: its name in legends and tables.
        activation: the networks' activation.
        regularizer: what varies in strength; its own strength is not read.
        look: colour, marker and dash.
        to_strength: value on the figure's axis -> strength of the regularizer.
        to_axis: the inverse.
        scales: scales at which it runs; None means all.
    """

    label: str
    activation: str
    regularizer: RegularizerConfig
    look: tuple[str, str, str]
    to_strength: Callable[[float], float] = float
    to_axis: Callable[[float], float] = float
    scales: tuple[str, ...] | None = None

    def configs(self, recipe: RunConfig, values: Sequence[float], seeds: Sequence[int]) -> list[RunConfig]:
        """Its runs at these values of the axis, and plain SGD, which is its point at 0."""
        regularizers = [replace(self.regularizer, strength=self.to_strength(value)) for value in values]
        model = replace(recipe.model, activation=self.activation)
        return [
            replace(recipe, model=model, regularizer=regularizer, seed=seed)
            for regularizer in (RegularizerConfig(), *regularizers)
            for seed in seeds
        ]

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        """Its runs in a table, plain SGD among them, with the axis in the place of the strength."""
        if table.empty:
            return table
        wanted = flatten({"regularizer": self.regularizer.to_dict()})
        own = pd.Series(True, index=table.index)
        for name in {*wanted, *(column for column in table.columns if column.startswith("regularizer."))} - {STRENGTH}:
            column, value = table.get(name, pd.Series(None, index=table.index)), wanted.get(name)
            own &= column.isna() if value is None else column.eq(value)
        runs = table[table["model.activation"].eq(self.activation) & (own | table["regularizer.name"].eq("none"))]
        # twelve digits bring back the axis' own number from its strength
        return runs.assign(**{STRENGTH: [float(f"{self.to_axis(strength):.12g}") for strength in runs[STRENGTH]]})

    def has_runs(self, table: pd.DataFrame) -> bool:
        """Whether the table holds more of it than plain SGD."""
        return not table.empty and bool(self.of(table)["regularizer.name"].eq(self.regularizer.name).any())


def accuracy(runs: pd.DataFrame, split: str, axis: str = STRENGTH) -> pd.DataFrame:
    """Accuracy of the runs of one curve: one row a seed, one column a strength, NaN where there is no result.

    Args:
        runs: the runs of one curve.
        split: "train", "validation" or "test".
        axis: the column of `runs` that the curve goes over.
    """
    if runs.empty:
        return pd.DataFrame(dtype=float)
    percent = 100 * runs.get(f"{split}/accuracy", pd.Series(math.nan, index=runs.index)).astype(float)
    points = runs[["seed", axis]].assign(percent=percent)
    return points.pivot(index="seed", columns=axis, values="percent")


def at_strength(table: pd.DataFrame, strength: float) -> pd.Series:
    """One column of `accuracy`'s table; all NaN where there is no such strength."""
    return table[strength] if strength in table.columns else pd.Series(math.nan, index=table.index)


def best_strength(runs: pd.DataFrame) -> float:
    """The strength above 0 with the highest mean validation accuracy, the smaller of equals; NaN where there is none.

    It is the same for all seeds, and no test example has a say in it. Strengths that more seeds lack than others do not
    count: their means would be over other seeds.
    """
    found = accuracy(runs, "validation").drop(columns=0.0, errors="ignore")
    counts = found.count()
    means = found.loc[:, counts.eq(counts.max()) & counts.gt(0)].mean()
    return float(means.idxmax()) if len(means) else math.nan


def over_strengths(difference: pd.DataFrame, low: float = 0.0, high: float = math.inf) -> pd.Series:
    """Mean over strengths above `low` and up to `high` by seed.

    NaN for a seed that lacks a run, since its mean would be over other strengths.
    """
    strengths = difference.columns.astype(float)
    return difference.loc[:, (strengths > low) & (strengths <= high)].mean(axis=1, skipna=False)


def at_equal_strength(first: pd.DataFrame, second: pd.DataFrame, low: float = 0.0, high: float = math.inf) -> pd.Series:
    """Test accuracy of one curve's runs minus that of another's, mean over strengths, by seed."""
    return over_strengths(accuracy(first, "test") - accuracy(second, "test"), low, high).dropna()


def at_own_best(runs: pd.DataFrame) -> pd.Series:
    """Test accuracy of a curve's runs at the strength that its validation accuracy chooses, by seed."""
    return at_strength(accuracy(runs, "test"), best_strength(runs))


def best_against_best(first: pd.DataFrame, second: pd.DataFrame) -> pd.Series:
    """Test accuracy of one curve's runs minus that of another's, each at its own best strength, by seed."""
    return paired_difference(at_own_best(first), at_own_best(second))


def distance(runs: pd.DataFrame, reference: pd.DataFrame) -> pd.Series:
    """How far a curve's training accuracy lies from a reference's at equal strength, mean over strengths, by seed."""
    return over_strengths((accuracy(runs, "train") - accuracy(reference, "train")).abs())


def num_diverged(runs: pd.DataFrame) -> int:
    """How many of these runs diverged."""
    return int(runs["status"].eq("diverged").sum())


def summarise(runs: pd.DataFrame, axis: str = STRENGTH, name: str = "rho") -> pd.DataFrame:
    """A curve as numbers: one row a strength, with mean and 95 % interval over seeds of the accuracy on each split.

    Columns: NAME, seeds, diverged, best ("yes" at the strength with the best validation accuracy; only where the curve
    goes over a strength), and for each split SPLIT, SPLIT_low, SPLIT_high.

    Args:
        runs: the runs of one curve.
        axis: the column of `runs` that the curve goes over.
        name: what it is called in the result.
    """
    tables = {split: accuracy(runs, split, axis) for split in SPLITS}
    best = best_strength(runs) if axis == STRENGTH else math.nan
    rows = []
    for strength in sorted(runs[axis].unique()):
        row = {
            name: strength,
            "seeds": int(tables["test"][strength].count()),
            "diverged": num_diverged(runs[runs[axis] == strength]),
        }
        if axis == STRENGTH:
            row["best"] = "yes" if strength == best else ""
        for split, table in tables.items():
            row |= interval_columns(split, table[strength])
        rows.append(row)
    return pd.DataFrame(rows)


def interval_columns(name: str, values: pd.Series) -> dict[str, float]:
    """The columns NAME, NAME_low and NAME_high of a table of numbers."""
    found = confidence_interval(values)
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
