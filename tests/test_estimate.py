"""Intervals and exact tests against published and independently computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from advplug.estimate import Estimate, mean, median, paired_difference, paired_p_value, rate


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (15, 148, 0.0624, 0.1605), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval_equals_newcombes_table(k, n, low, high):
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3."""
    found = rate(k, n)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400), st.data())
def test_wilson_agrees_with_scipy_and_holds_its_value(n, data):
    k = data.draw(st.integers(0, n))
    found = rate(k, n)
    reference = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert found.low <= found.value <= found.high


@given(st.integers(1, 200), st.data())
def test_a_rate_and_that_of_the_opposite_are_mirrored_and_more_images_narrow_them(n, data):
    k = data.draw(st.integers(0, n))
    one, other, many = rate(k, n), rate(n - k, n), rate(10 * k, 10 * n)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-12)
    assert many.high - many.low < one.high - one.low


def test_a_rate_of_nothing_is_no_rate():
    assert rate(0, 0) is None


def test_an_expected_count_is_a_rate_like_any_other():
    found = rate(2.5, 10, spread=0.125)
    assert found is not None
    assert (found.value, found.n, found.spread) == (0.25, 10, 0.125)
    assert rate(2, 10).low < found.low < rate(3, 10).low
    assert rate(2, 10).high < found.high < rate(3, 10).high


def test_the_mean_of_students_sleep_data():
    """Student 1908 (Biometrika 6:1), the second drug against the first; the interval is the one that R prints."""
    found = mean([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=5e-8)
    assert found.n == 10


def test_the_mean_of_few_values():
    assert mean([]) is None
    assert mean([3]) == Estimate(3.0, None, None, 1)
    two = mean(np.array([0, 1]))
    assert two is not None
    assert (two.value, two.high - 0.5, 0.5 - two.low, two.n) == pytest.approx((0.5, 6.353102, 6.353102, 2))


@given(st.integers(0, 40), st.integers(0, 40))
def test_paired_p_value_is_the_exact_one_sided_sign_test(first, second):
    expected = 1.0 if first + second == 0 else stats.binomtest(first, first + second, alternative="greater").pvalue
    assert paired_p_value(first, second) == pytest.approx(expected, rel=1e-9)


def test_paired_p_value_counts_the_ways_that_pairs_can_fall():
    for n in range(10):
        ones = [bits.bit_count() for bits in range(2**n)]
        for first in range(n + 1):
            assert paired_p_value(first, n - first) == sum(k >= first for k in ones) / 2**n


def test_paired_p_value_of_thousands_of_pairs():
    for first in (2060, 1940):
        expected = stats.binomtest(first, 4000, alternative="greater").pvalue
        assert paired_p_value(first, 4000 - first) == pytest.approx(expected, rel=1e-9)


def test_paired_difference_by_hand():
    """Bonett & Price 2012: adjusted Wald with one pair added to each discordant count."""
    ours, theirs = np.array([1, 1, 1, 0, 0, 1, 1, 1, 0, 1.0]), np.array([0, 0, 1, 0, 1, 1, 0, 1, 0, 1.0])
    up, down, n = (3 + 1) / 12, (1 + 1) / 12, 10
    half = stats.norm.ppf(0.975) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    found = paired_difference(ours, theirs)
    assert found is not None
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half))
    assert found.n == 10


def test_a_difference_of_one_pair_ends_at_one():
    won, lost = (paired_difference(np.array([a]), np.array([1.0 - a])) for a in (1.0, 0.0))
    assert won is not None
    assert lost is not None
    assert (won.value, won.high, won.n) == (1, 1, 1)
    assert (lost.value, lost.low, lost.n) == (-1, -1, 1)
    assert (won.low, lost.high) == pytest.approx((-0.7335, 0.7335), abs=5e-5)
    assert paired_difference(np.array([]), np.array([])) is None


def test_paired_interval_covers_what_it_should():
    """True difference 0.2 with correlated pairs: about 95 of 100 intervals hold it."""
    draws, held = np.random.default_rng(0), 0
    for _ in range(2000):
        u = draws.random(80)
        ours, theirs = (u < 0.7).astype(float), ((u + draws.normal(0, 0.1, 80)) % 1 < 0.5).astype(float)
        found = paired_difference(ours, theirs)
        assert found is not None
        held += found.low <= 0.2 <= found.high
    assert 0.93 <= held / 2000 <= 0.98


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60))
def test_median_lies_in_its_interval(values):
    found = median(values)
    assert found is not None
    assert found.value == pytest.approx(np.median(values))
    assert (found.low is None) == (len(values) < 6)
    if found.low is not None:
        assert found.low <= found.value <= found.high


def test_median_interval_uses_the_right_order_statistics():
    """n = 20: the 6th and 15th values give at least 95 % (Conover, Practical Nonparametric Statistics, 3.2)."""
    found = median(np.arange(1, 21))
    assert found is not None
    assert (found.low, found.high, found.n) == (6, 15, 20)
    for n in range(6, 200):
        below = int((stats.binom.cdf(np.arange(n), n, 0.5) <= 0.025).sum())
        found = median(np.arange(1, n + 1))
        assert found is not None
        assert (found.low, found.high) == (below, n + 1 - below)


FEW = st.lists(st.floats(-5, 5).map(lambda v: round(v, 3)), min_size=2, max_size=30)


@given(FEW, st.sampled_from([-2.0, 0.5]), st.sampled_from([0.0, 3.0]))
def test_intervals_move_with_their_values(values, scale, shift):
    """In any unit, from any zero and the other way round."""
    for of in (mean, median):
        one, other = of(values), of(scale * np.array(values) + shift)
        moved = [None if v is None else scale * v + shift for v in (one.value, one.low, one.high)]
        low, high = moved[1:] if scale > 0 else moved[:0:-1]
        assert (other.value, other.n) == (pytest.approx(moved[0], abs=1e-9), one.n)
        assert [other.low, other.high] == [None if v is None else pytest.approx(v, abs=1e-9) for v in (low, high)]


@given(st.lists(st.tuples(st.sampled_from([0, 0.25, 1]), st.sampled_from([0, 0.5, 1])), min_size=1, max_size=30))
def test_a_difference_the_other_way_round_is_its_opposite(pairs):
    ours, theirs = np.array(pairs, dtype=float).T
    one, other = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert one.value == pytest.approx(np.mean(ours - theirs))
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert -1 <= one.low <= one.high <= 1


def test_no_values_have_no_median():
    assert median([]) is None
