"""Statistics against what a slow count over everything gives, and numbers worked out by hand."""

import itertools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from clip_pgs.study.statistics import MIN_SEEDS, holm, mean_with_interval, sign_flip_p

DIFFERENCES = {
    "all up": [0.02, 0.05, 0.01, 0.08, 0.03, 0.04],
    "one down": [0.02, 0.05, -0.01, 0.08, 0.03, 0.04],
    "ties": [0.02, 0.02, -0.02, 0.02, 0.0, 0.02, 0.01],
    "two": [0.1, 0.3],
    "all equal": [0.1] * 6,
    "nothing": [0.0] * 6,
}


@pytest.mark.parametrize("differences", DIFFERENCES.values(), ids=DIFFERENCES)
def test_p_counts_the_patterns_of_signs_that_are_as_extreme(differences):
    seen = abs(sum(differences))
    patterns = list(itertools.product([1, -1], repeat=len(differences)))
    extreme = [
        signs
        for signs in patterns
        if abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= seen - 1e-12
    ]
    assert sign_flip_p(differences) == pytest.approx(len(extreme) / len(patterns))


@pytest.mark.parametrize("stored", ["exact", "single", "rounded"])
@pytest.mark.parametrize(
    ("steps", "size"),
    [
        ([8, -1, 3, 5, 0, 12, 12, -4, 7], 300),
        ([1, 2, 3, -6], 300),
        ([1, -1, 2, 2, 3, 1, 0], 7),
        ([5, 5, -5, 1], 10_000),
        ([3, -2, 1, 1, 4, -3, 2, 2], 50_000),
    ],
)
def test_patterns_of_equal_means_are_equal_however_scores_are_stored(steps, size, stored):
    sums = [
        sum(Fraction(sign * step, size) for sign, step in zip(signs, steps, strict=True))
        for signs in itertools.product([1, -1], repeat=len(steps))
    ]
    seen = abs(Fraction(sum(steps), size))
    num_extreme = sum(abs(each) >= seen for each in sums)
    scores = [(Fraction(1, 3), Fraction(1, 3) + Fraction(step, size)) for step in steps]
    kind = np.float32 if stored == "single" else float
    differences = [float(kind(float(new))) - float(kind(float(old))) for old, new in scores]
    if stored == "rounded":
        differences = [round(difference, 7) for difference in differences]
    assert sign_flip_p(differences) == num_extreme / len(sums)


@pytest.mark.parametrize("num", [2, 5, 9, 12])
def test_p_is_that_of_scipy_where_no_patterns_tie(num):
    differences = np.random.default_rng(num).normal(0.02, 0.05, num)
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=2**num
    )
    assert sign_flip_p(list(differences)) == pytest.approx(expected.pvalue)


def test_p_of_many_seeds_counts_drawn_patterns():
    # Of 24 signs as many are up as down with this share, and all other sums are further from 0.
    even = math.comb(24, 12) / 2**24
    differences = [0.01] * 13 + [-0.01] * 11
    assert sign_flip_p(differences) == pytest.approx(1 - even, abs=0.003)
    assert sign_flip_p(differences) == sign_flip_p(differences)
    assert sign_flip_p([0.01] * 24) <= 2e-6


def test_six_seeds_are_the_fewest_that_can_give_a_p_below_0_05():
    differences = [0.01 * (number + 1) for number in range(MIN_SEEDS)]
    assert sign_flip_p(differences) == pytest.approx(2 / 64)
    assert sign_flip_p(differences[1:]) == pytest.approx(2 / 32)
    assert sign_flip_p(differences[:1]) == 1


def test_holm_by_hand():
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2 and 0.04 x 1, each at least the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_interval_lies_around_the_mean_of_its_values():
    values = [0.1, 0.15, 0.12, 0.3, 0.18, 0.11]
    found = mean_with_interval(values)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert min(values) < found.low < found.mean < found.high < max(values)
    # The tail is above: so is the longer side of a corrected interval.
    assert found.high - found.mean > found.mean - found.low
    moved = mean_with_interval([value - 0.05 for value in values])
    assert (moved.low, moved.high) == pytest.approx((found.low - 0.05, found.high - 0.05), abs=2e-3)
    assert found.low > 0
    other = mean_with_interval([-0.2, 0.3, 0.1])
    assert other.low < 0 < other.high


def test_the_interval_of_many_values_is_the_normal_one():
    values = statistics.NormalDist(1.0, 2.0).samples(400, seed=0)
    found = mean_with_interval(values)
    half = 1.96 * statistics.stdev(values) / 20
    assert (found.low, found.high) == pytest.approx(
        (found.mean - half, found.mean + half), abs=0.03
    )


SAME = {
    "one value": [0.3],
    "equal values": [0.3] * 6,
    "equal but for single precision": [float(np.float32(0.1 * n)) / n for n in range(1, 7)],
    "rounded to seven digits": [
        value + 1e-7 * (place % 2) for place, value in enumerate([0.3] * 6)
    ],
}


@pytest.mark.parametrize("values", SAME.values(), ids=SAME)
def test_where_there_is_no_interval_words_say_why(values):
    found = mean_with_interval(values)
    assert (found.low, found.high) == (None, None)
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert found.remark
