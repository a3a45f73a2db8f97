"""From paired numbers to a verdict: differences over seeds, their 95 % interval, and one rule for all findings.

The rule, with d the paired difference in the direction that the finding claims and m the smallest effect that matters:

    shows           the interval lies above 0 and the mean of d is at least m
    opposite        the interval lies below 0 and the mean of d is at most -m
    does not show   the interval lies inside (-m, m)
    undecided       anything else, and always with fewer than three seeds: two can agree by chance
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from twofold.errors import TwofoldError
from twofold.lab.figures.scales import Scale

SHOWS, DOES_NOT_SHOW, OPPOSITE, UNDECIDED = "shows", "does not show", "opposite", "undecided"
CONFIDENCE = 0.95
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its Student-t interval; NaN where there are too few seeds for one."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Verdict:
    """What the numbers say about one finding.

    Attributes:
        finding: what is claimed, mostly by the paper.
        figure: the figure's name.
        rule: how the finding is judged.
        effect: mean paired difference in the direction of the claim, in the rule's unit.
        low, high: its 95 % interval.
        verdict: "shows", "does not show", "opposite" or "undecided".
        seeds: pairs behind the effect.
        diverged: diverged runs that the effect rests on: without one of them it would be another.
        scale: the scale that was run.
        data: the data set.
    """

    finding: str
    figure: str
    rule: str
    effect: float
    low: float
    high: float
    verdict: str
    seeds: int
    diverged: int
    scale: str
    data: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; a number that does not exist is None."""
        numbers = {name: _rounded(getattr(self, name)) for name in ("effect", "low", "high")}
        return {**asdict(self), **numbers}


def confidence_interval(values: Iterable[float]) -> Interval:
    """The mean of `values` and its two-sided 95 % Student-t interval.

    mean -+ t_(0.975, n - 1) s / sqrt(n), s the standard deviation with n - 1; values that are NaN are left out.

    Example:
        >>> confidence_interval([1.0, 2.0, 3.0])
        Interval(mean=2.0, low=-0.48413771175033..., high=4.48413771175033..., count=3)
    """
    numbers = np.asarray(list(values), dtype=float)
    numbers = numbers[~np.isnan(numbers)]
    count = len(numbers)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(numbers.mean())
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1) * numbers.std(ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half, count)


def rule_for(effect: str, smallest: float) -> str:
    """The rule at the top of this file for readers, with what an effect is and the smallest that matters."""
    return (
        f"Every effect is {effect}, positive in the direction that the finding claims, with a 95 % Student-t interval "
        f"over seeds. The smallest effect that matters is {smallest:g}. "
        f"Shows: the interval lies above 0 and the effect is at least {smallest:g}. "
        f"Opposite: the interval lies below 0 and the effect is at most -{smallest:g}. "
        f"Does not show: the interval lies inside -{smallest:g} to {smallest:g}. "
        "Undecided: anything else, and always with fewer than three seeds."
    )


def paired_difference(first: pd.Series, second: pd.Series) -> pd.Series:
    """first - second for the seeds (the index of both) that have both numbers."""
    return (first - second).dropna()


def decide(difference: Interval, smallest: float) -> str:
    """The verdict by the rule at the top of this file.

    Args:
        difference: interval of the paired difference, positive in the direction that the finding claims.
        smallest: the smallest effect that matters, in the same unit; positive.

    Raises:
        TwofoldError: `smallest` is not positive.
    """
    if not smallest > 0:
        raise TwofoldError(f"The smallest effect that matters must be positive, not {smallest!r}.")
    if difference.count < FEWEST_SEEDS:
        return UNDECIDED
    if difference.low > 0 and difference.mean >= smallest:
        return SHOWS
    if difference.high < 0 and difference.mean <= -smallest:
        return OPPOSITE
    if -smallest < difference.low and difference.high < smallest:
        return DOES_NOT_SHOW
    return UNDECIDED


@dataclass(frozen=True)
class Finding:
    """A claim that one paired effect decides.

    Attributes:
        text: what is claimed.
        rule: how the effect is computed.
        effect: runs of one data set -> the effect by seed, positive in the direction of the claim.
        smallest: the smallest effect that matters, in the same unit.
        scales: scales at which it is asked; None means all.
        condition: runs -> another effect by seed. Where the finding shows, its interval must lie above 0, or else the
            finding is undecided, and does not show if it lies below 0. None sets no condition.
    """

    text: str
    rule: str
    effect: Callable[[pd.DataFrame], pd.Series]
    smallest: float = 1.0
    scales: tuple[str, ...] | None = None
    condition: Callable[[pd.DataFrame], pd.Series] | None = None

    def decide(self, runs: pd.DataFrame, effect: Interval) -> str:
        """The verdict on these runs, whose effect is known."""
        verdict = decide(effect, self.smallest)
        if verdict != SHOWS or self.condition is None:
            return verdict
        condition = confidence_interval(self.condition(runs))
        if condition.low > 0:
            return SHOWS
        return DOES_NOT_SHOW if condition.high < 0 else UNDECIDED


def judge(findings: Sequence[Finding], table: pd.DataFrame, scale: Scale, figure: str) -> list[Verdict]:
    """Decide every finding that the scale asks, on every data set in the table."""
    found = []
    for data, runs in table.groupby("data.name"):
        for finding in findings:
            if finding.scales is not None and scale.name not in finding.scales:
                continue
            interval = confidence_interval(finding.effect(runs))
            verdict = Verdict(
                finding=finding.text,
                figure=figure,
                rule=finding.rule,
                effect=interval.mean,
                low=interval.low,
                high=interval.high,
                verdict=finding.decide(runs, interval),
                seeds=interval.count,
                diverged=_diverged_behind(finding, runs),
                scale=scale.name,
                data=str(data),
            )
            found.append(verdict)
    return found


def _diverged_behind(finding: Finding, runs: pd.DataFrame) -> int:
    asked = [finding.effect] if finding.condition is None else [finding.effect, finding.condition]
    found = [ask(runs) for ask in asked]
    return sum(
        any(not ask(runs.drop(index)).equals(one) for ask, one in zip(asked, found, strict=True))
        for index in runs.index[runs["status"].eq("diverged")]
    )


def _rounded(value: float) -> float | None:
    """Four decimals say all that a percentage over seeds can, and are the same on every rerun."""
    return None if math.isnan(value) else round(value, 4) + 0.0
