"""Upper bounds on a rate: exact, and kept as often as they say."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.calibration.bounds import binomial_tail, samples_needed, upper_bound

RATES = [1e-6, 0.001, 0.02, 0.3, 0.5, 0.9, 0.999]
COUNTS = [(0, 1), (1, 1), (0, 50), (3, 50), (50, 50), (49, 50), (12, 1000), (600, 1000), (150, 20_000)]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("successes", "trials"), COUNTS)
def test_the_tail_is_scipys(successes: int, trials: int, rate: float) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")
    assert binomial_tail(successes, trials, rate) == pytest.approx(stats.binom.cdf(successes, trials, rate), rel=1e-9, abs=1e-300)


def test_the_tail_is_an_exact_sum() -> None:
    rate = Fraction(3, 10)
    exact = sum(math.comb(20, k) * rate**k * (1 - rate) ** (20 - k) for k in range(5))
    assert binomial_tail(4, 20, 0.3) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(("successes", "rate", "tail"), [(0, 0.0, 1.0), (3, 0.0, 1.0), (9, 1.0, 0.0), (10, 1.0, 1.0)])
def test_the_tail_at_the_ends_of_the_rate(successes: int, rate: float, tail: float) -> None:
    assert binomial_tail(successes, 10, rate) == tail


@given(st.integers(1, 300), st.data())
def test_more_successes_are_likelier_and_a_higher_rate_is_less_likely(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials - 1))
    low, high = sorted(data.draw(st.lists(st.floats(0.001, 0.999), min_size=2, max_size=2)))
    tail = binomial_tail(successes, trials, low)
    assert 0.0 <= tail <= 1.0
    assert tail <= binomial_tail(successes + 1, trials, low) + 1e-12
    assert binomial_tail(successes, trials, high) <= tail + 1e-12


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(("successes", "trials"), COUNTS)
def test_the_bound_is_scipys_clopper_pearson(successes: int, trials: int, confidence: float) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")
    expected = stats.beta.ppf(confidence, successes + 1, trials - successes) if successes < trials else 1.0
    assert upper_bound(successes, trials, confidence) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("confidence", [0.01, 0.2])
def test_the_bound_is_clopper_pearsons_below_the_observed_rate_too(confidence: float) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")
    assert upper_bound(30, 100, confidence) == pytest.approx(stats.beta.ppf(confidence, 31, 70), rel=1e-8)
    assert upper_bound(30, 100, confidence) < 0.3


def test_the_rule_of_three() -> None:
    assert upper_bound(0, 300, 0.95) == pytest.approx(3 / 300, rel=0.01)


def test_nothing_is_known_when_all_samples_failed() -> None:
    assert upper_bound(7, 7, 0.95) == 1.0


@given(st.integers(2, 500), st.floats(0.5, 0.999), st.data())
def test_the_bound_rises_with_failures_and_confidence_and_falls_with_samples(trials: int, confidence: float, data: st.DataObject) -> None:
    failures = data.draw(st.integers(0, trials - 2))
    bound = upper_bound(failures, trials, confidence)
    assert failures / trials < bound < 1.0
    assert bound < upper_bound(failures + 1, trials, confidence)
    assert bound < upper_bound(failures, trials, (1 + confidence) / 2)
    assert upper_bound(failures, 2 * trials, confidence) < bound


@given(st.integers(1, 400), st.floats(0.5, 0.999), st.data())
def test_the_bound_is_the_rate_at_which_so_few_failures_would_just_be_surprising(trials: int, confidence: float, data: st.DataObject) -> None:
    failures = data.draw(st.integers(0, trials - 1))
    assert binomial_tail(failures, trials, upper_bound(failures, trials, confidence)) == pytest.approx(1 - confidence, rel=1e-6)


@given(st.fractions(Fraction(1, 500), Fraction(9, 10), max_denominator=500), st.fractions(Fraction(1, 2), Fraction(999, 1000), max_denominator=1000))
def test_the_samples_needed_are_the_fewest(rate: Fraction, confidence: Fraction) -> None:
    needed = samples_needed(float(rate), float(confidence))
    # Exact arithmetic: n samples without a failure prove it when (1 - rate)^n <= 1 - confidence. At a tie floats may ask for one more.
    assert (1 - rate) ** needed <= (1 - confidence) * (1 + Fraction(1, 10**12))
    assert (1 - rate) ** (needed - 1) > (1 - confidence) * (1 - Fraction(1, 10**12))


@pytest.mark.parametrize(("rate", "confidence", "needed"), [(0.02, 0.95, 149), (0.01, 0.95, 299), (0.05, 0.99, 90), (0.5, 0.75, 2)])
def test_the_samples_needed_are_those_of_the_tables(rate: float, confidence: float, needed: int) -> None:
    assert samples_needed(rate, confidence) == needed
    assert upper_bound(0, needed, confidence) <= rate * (1 + 1e-12)
    assert upper_bound(0, needed - 1, confidence) > rate


@pytest.mark.parametrize("rate", [0.004, 0.02, 0.1])
def test_the_true_rate_is_below_the_bound_as_often_as_promised(rate: float) -> None:
    draws = 4000
    failures = np.random.default_rng(0).binomial(400, rate, draws)
    bounds = {count: upper_bound(int(count), 400, 0.95) for count in np.unique(failures)}
    held = np.mean([bounds[count] >= rate for count in failures])
    # Clopper and Pearson cover at least 95 %; of 4,000 draws three standard errors are 1.0 %.
    assert held >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / draws)
