"""Bounds on a mean: what their equations say, and kept as often as they say."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.calibration.bounds import BOUNDS, MOST_STAKED, Bound, binomial_tail, least_rate, mean_bound, p_value, samples_needed, upper_bound
from exitify.errors import CalibrationError

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


# --- three bounds with one signature

OTHERS: list[Bound] = ["bentkus", "betting"]


def coins(seed: int, rate: float, count: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < rate).astype(float)


@pytest.mark.parametrize("rate", [0.005, 0.05, 0.4])
def test_of_how_often_something_happens_the_p_value_is_the_binomial_tail(rate: float) -> None:
    losses = coins(0, 0.03, 400)
    assert p_value(losses, rate, "clopper-pearson") == binomial_tail(int(losses.sum()), 400, rate)
    assert mean_bound(losses, "clopper-pearson", confidence=0.9) == pytest.approx(upper_bound(int(losses.sum()), 400, 0.9), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_bentkus_is_the_smaller_of_the_two_equations(seed: int, rate: float) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")
    losses = np.random.default_rng(seed).random(150) * 0.2  # any numbers between 0 and 1, not coins alone
    mean = min(losses.mean(), rate)
    divergence = mean * math.log(mean / rate) + (1 - mean) * math.log((1 - mean) / (1 - rate))
    hoeffding = math.exp(-150 * divergence)
    bentkus = math.e * stats.binom.cdf(math.ceil(losses.sum()), 150, rate)
    assert p_value(losses, rate, "bentkus") == pytest.approx(min(1.0, hoeffding, bentkus), rel=1e-9)


def test_either_equation_can_be_the_smaller_one() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")
    none_of_few, many = np.zeros(50), coins(0, 0.05, 2000)
    assert p_value(none_of_few, 0.1, "bentkus") == pytest.approx(0.9**50)  # Hoeffding; Bentkus is e times as much
    by_bentkus = math.e * stats.binom.cdf(many.sum(), 2000, 0.1)
    assert p_value(many, 0.1, "bentkus") == pytest.approx(by_bentkus, rel=1e-6)


def money_of_a_better(losses: np.ndarray, rate: float, confidence: float) -> float:
    """The most that it ever becomes; one sample at a time, as the paper writes it."""
    count, money, most = len(losses), 1.0, 1.0
    mean, variance = 0.5, 0.25
    total, squares = 0.5, 0.25
    for i, loss in enumerate(losses, 1):
        stake = min(math.sqrt(2 * math.log(1 / (1 - confidence)) / (count * variance)), MOST_STAKED / (1 - rate))
        money *= 1 + stake * (rate - loss)
        most = max(most, money)
        total += loss
        mean = total / (i + 1)
        squares += (loss - mean) ** 2
        variance = squares / (i + 1)
    return most


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rate", "confidence"), [(0.02, 0.95), (0.1, 0.9), (0.6, 0.99)])
def test_the_betting_p_value_is_one_over_the_most_money(seed: int, rate: float, confidence: float) -> None:
    losses = np.random.default_rng(seed).beta(0.2, 4.0, 300)
    assert p_value(losses, rate, "betting", confidence=confidence) == pytest.approx(1 / money_of_a_better(losses, rate, confidence), rel=1e-9)


@given(st.integers(0, 10_000), st.sampled_from(BOUNDS), st.floats(0.5, 0.99))
def test_a_higher_rate_is_refuted_more_easily(seed: int, bound: Bound, confidence: float) -> None:
    losses = coins(seed, 0.1, 80)
    found = [p_value(losses, rate, bound, confidence=confidence) for rate in np.linspace(0.001, 0.999, 40)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(found))
    assert 0.0 <= found[-1] <= found[0] <= 1.0


@given(st.integers(1, 200), st.floats(0.001, 0.999), st.data())
def test_of_coins_clopper_pearson_refutes_whatever_bentkus_does(count: int, rate: float, data: st.DataObject) -> None:
    losses = np.arange(count) < data.draw(st.integers(0, count))
    assert p_value(losses, rate, "clopper-pearson") <= p_value(losses, rate, "bentkus") + 1e-12


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_upper_bound_is_where_the_p_value_is_what_confidence_leaves(bound: Bound, confidence: float) -> None:
    losses = coins(1, 0.03, 500)
    found = mean_bound(losses, bound, confidence=confidence)
    assert losses.mean() < found < 0.2
    assert p_value(losses, found + 1e-9, bound, confidence=confidence) <= 1 - confidence
    assert p_value(losses, found - 1e-6, bound, confidence=confidence) > 1 - confidence


@pytest.mark.parametrize("bound", BOUNDS)
def test_nothing_is_known_of_no_samples_or_when_all_are_lost(bound: Bound) -> None:
    assert mean_bound(np.zeros(0), bound, confidence=0.95) == 1.0
    assert mean_bound(np.ones(30), bound, confidence=0.95) == 1.0


@pytest.mark.parametrize("bound", OTHERS)
def test_losses_that_may_be_negative_are_moved_into_their_range(bound: Bound) -> None:
    drop = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 600, p=[0.02, 0.95, 0.03])
    moved = (drop + 1) / 2
    assert p_value(drop, 0.05, bound, least=-1.0) == p_value(moved, (0.05 + 1) / 2, bound)
    assert mean_bound(drop, bound, confidence=0.9, least=-1.0) == pytest.approx(2 * mean_bound(moved, bound, confidence=0.9) - 1, abs=1e-9)


@pytest.mark.parametrize("losses", [[0.0, 0.5], [0.0, 1.0 + 1e-9], [-1.0, 0.0]])
def test_clopper_pearson_is_refused_for_anything_but_coins(losses: list[float]) -> None:
    with pytest.raises(CalibrationError, match="neither 0 nor 1") as caught:
        p_value(np.array(losses), 0.5, "clopper-pearson")
    assert "--bound betting" in caught.value.hint


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_a_true_rate_is_refuted_no_more_often_than_confidence_allows(bound: Bound, rate: float) -> None:
    draws = 2000
    refuted = [p_value(losses, rate, bound) <= 0.05 for losses in (np.random.default_rng(0).random((draws, 200)) < rate).astype(float)]
    assert np.mean(refuted) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


@pytest.mark.parametrize("bound", OTHERS)
def test_a_true_drop_is_refuted_no_more_often_than_confidence_allows(bound: Bound) -> None:
    draws = 2000
    drops = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], (draws, 300), p=[0.02, 0.94, 0.04])  # a drop of 0.02
    refuted = [p_value(losses, 0.02, bound, least=-1.0) <= 0.05 for losses in drops]
    assert np.mean(refuted) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_betting_proves_a_small_drop_where_bentkus_cannot() -> None:
    """The mean of numbers from -1 to 1 that are almost all 0: only a bound that sees how little they vary can tell."""
    drop = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 2000, p=[0.005, 0.99, 0.005])
    assert mean_bound(drop, "betting", confidence=0.95, least=-1.0) < 0.01
    assert mean_bound(drop, "bentkus", confidence=0.95, least=-1.0) > 0.04


@pytest.mark.parametrize(
    ("bound", "least", "rate"), [("bentkus", 0.0, 0.05), ("betting", 0.0, 0.05), ("betting", -1.0, 0.05), ("bentkus", -1.0, 0.2)]
)
def test_the_samples_that_a_bound_needs_are_the_fewest_without_a_loss(bound: Bound, least: float, rate: float) -> None:
    needed = samples_needed(rate, 0.95, bound, least=least)
    proves = [p_value(np.zeros(count), rate, bound, least=least) <= 0.05 for count in range(1, needed + 40)]
    last_that_does_not = max(i for i, enough in enumerate(proves, 1) if not enough)
    assert last_that_does_not + 1 == needed


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_least_rate_is_what_so_many_samples_prove_without_a_loss(bound: Bound) -> None:
    found = least_rate(200, 0.95, bound)
    assert samples_needed(found + 1e-9, 0.95, bound) <= 200 < samples_needed(found - 1e-4, 0.95, bound)


def test_the_search_for_how_many_are_needed_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitify.calibration.bounds.MOST_SAMPLES", 1000)
    assert samples_needed(1e-9, 0.95, "bentkus", least=-1.0) == 1024
