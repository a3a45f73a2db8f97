import math
import statistics

import pandas as pd
import pytest
from scipy import stats

from twofold.errors import TwofoldError
from twofold.lab.figures.verdicts import (
    DOES_NOT_SHOW,
    OPPOSITE,
    SHOWS,
    UNDECIDED,
    Interval,
    Verdict,
    confidence_interval,
    decide,
    paired_difference,
)


def test_interval_is_student_t():
    values = [3.1, 2.7, 3.9, 3.3, 2.2]
    found = confidence_interval(values)
    # 2.776445 is the 97.5 % point of Student's t with 4 degrees of freedom
    half = 2.776445105 * statistics.stdev(values) / math.sqrt(5)
    assert found.mean == pytest.approx(statistics.mean(values))
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))
    assert found.count == 5


def test_interval_agrees_with_a_paired_t_test():
    first = pd.Series([71.2, 69.8, 70.9, 72.4], index=[100, 101, 102, 103])
    second = pd.Series([70.1, 69.9, 69.0, 70.8], index=[103, 102, 101, 100])
    found = confidence_interval(paired_difference(first, second))
    reference = stats.ttest_rel(first, second.sort_index()).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))


def test_interval_with_too_few_values():
    assert confidence_interval([]).count == 0
    assert math.isnan(confidence_interval([]).mean)
    one = confidence_interval([4.0, math.nan])
    assert (one.mean, one.count) == (4.0, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_pairs_are_by_seed_and_need_both():
    first = pd.Series([5.0, 6.0, math.nan], index=[100, 101, 102])
    second = pd.Series([1.0, 2.0, 3.0], index=[101, 102, 103])
    assert paired_difference(first, second).to_dict() == {101: 5.0}


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [
        (3.0, 1.0, 5.0, SHOWS),
        (1.0, 0.1, 1.9, SHOWS),
        (0.9, 0.1, 1.7, UNDECIDED),  # above 0, but it may matter or not
        (0.5, 0.1, 0.9, DOES_NOT_SHOW),  # above 0 and too small to matter
        (0.0, -0.9, 0.9, DOES_NOT_SHOW),
        (3.0, -0.1, 6.1, UNDECIDED),
        (0.0, -1.0, 1.0, UNDECIDED),
        (-0.9, -1.7, -0.1, UNDECIDED),
        (-3.0, -5.0, -1.0, OPPOSITE),
        (math.nan, math.nan, math.nan, UNDECIDED),
    ],
)
def test_decisions(mean, low, high, expected):
    assert decide(Interval(mean, low, high, 5), smallest=1.0) == expected
    scaled = Interval(10 * mean, 10 * low, 10 * high, 5)
    assert decide(scaled, smallest=10.0) == expected


def test_the_rule_is_symmetric():
    mirror = {SHOWS: OPPOSITE, OPPOSITE: SHOWS}
    for mean in (-2.5, -1.0, -0.3, 0.0, 0.3, 1.0, 2.5):
        for half in (0.1, 0.6, 1.4, 3.0):
            verdict = decide(Interval(mean, mean - half, mean + half, 5), 1.0)
            mirrored = decide(Interval(-mean, -mean - half, -mean + half, 5), 1.0)
            assert mirrored == mirror.get(verdict, verdict)


def test_fewer_than_three_seeds_decide_nothing():
    agreeing = confidence_interval([5.0, 5.0])
    assert agreeing.low > 0
    assert decide(agreeing, 1.0) == UNDECIDED
    assert decide(confidence_interval([5.0, 5.0, 5.0]), 1.0) == SHOWS


@pytest.mark.parametrize("smallest", [0.0, -1.0, math.nan])
def test_smallest_effect_must_be_positive(smallest):
    with pytest.raises(TwofoldError, match="positive"):
        decide(Interval(1.0, 0.5, 1.5, 5), smallest)


def test_verdict_as_json_values():
    verdict = Verdict("f", 1, "r", math.nan, -0.00001, 1.23456, UNDECIDED, 1, 0, "smoke", "mnist1d")
    values = verdict.to_dict()
    assert (values["effect"], values["low"], values["high"]) == (None, 0.0, 1.2346)
    assert math.copysign(1, values["low"]) == 1
