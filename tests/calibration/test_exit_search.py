"""The search for exits: all combinations of few, near the best of many, within its limit, and never below its bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitify.calibration.exit_search import Found, Limit, best_added, levels, lower_bound, search, worths
from exitify.calibration.thresholds import NEVER, Recorded, exits_taken, judge
from exitify.errors import CalibrationError


def recording(exits: int, samples: int, seed: int, fee: float = 0.02) -> Recorded:
    """Exits that are right the more often the later they come, and surer where they are right."""
    generator = np.random.default_rng(seed)
    hardness = generator.random(samples)
    reach = np.sort(generator.uniform(0.1, 0.9, exits))
    wrong = np.array([hardness > share + generator.normal(0, 0.15, samples) for share in np.append(reach, 1.0)], float)
    confidence = np.clip(1 - 0.6 * hardness - 0.3 * wrong[:-1] * generator.random((exits, samples)), 0, 1)
    return Recorded(confidence, wrong - wrong[-1], np.append(reach, 1.0), np.full(exits, fee))


def brute_force(recorded: Recorded, limit: Limit, most: int | None = None) -> float:
    """The least there is, over every combination of thresholds that tells samples apart."""
    best = np.inf
    for thresholds in itertools.product(*(levels(confidence, 10_000) for confidence in recorded.confidence)):
        chosen = np.array(thresholds)
        loss, cost = judge(recorded, chosen)
        if limit.holds(loss, cost) and (most is None or (chosen < NEVER).sum() <= most):
            best = min(best, limit.aim(loss, cost))
    return best


def aim(found: Found, limit: Limit) -> float:
    return limit.aim(found.loss, found.cost)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(3, 12), st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.2]), st.sampled_from([0.0, 0.02, 0.1]))
def test_up_to_three_exits_the_search_finds_what_brute_force_finds(exits, samples, seed, allowed, fee):
    recorded = recording(exits, samples, seed, fee)
    limit = Limit(loss=allowed)
    found = search(recorded, limit)
    assert found.is_exact
    assert found.cost == pytest.approx(brute_force(recorded, limit), abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(3, 10), st.integers(0, 10_000), st.floats(0.3, 1.0))
def test_within_a_cost_the_search_loses_as_little_as_brute_force(exits, samples, seed, budget):
    recorded = recording(exits, samples, seed)
    limit = Limit(cost=budget)
    least = brute_force(recorded, limit)
    if np.isinf(least):
        with pytest.raises(CalibrationError, match="no choice of exits is within the limit\n  hint: the least mean cost found is"):
            search(recorded, limit)
    else:
        assert search(recorded, limit).loss == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_of_many_exits_the_beam_is_within_two_percent_of_brute_force(seed):
    recorded = recording(5, 9, seed)
    limit = Limit(loss=0.12)
    found = search(recorded, limit)
    assert not found.is_exact
    assert found.cost <= 1.02 * brute_force(recorded, limit)


@pytest.mark.parametrize("most", [0, 1, 2, 5])
def test_no_more_exits_are_chosen_than_allowed(most):
    recorded = recording(8, 300, 3)
    found = search(recorded, Limit(loss=0.02), most_exits=most)
    assert len(found.chosen) <= most
    assert most == 0 or found.cost < 1


def test_more_exits_allowed_are_never_worse():
    recorded = recording(8, 300, 4)
    costs = [search(recorded, Limit(loss=0.02), most_exits=most).cost for most in range(9)]
    assert all(more <= fewer + 1e-3 for fewer, more in itertools.pairwise(costs))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(5, 60), st.integers(0, 10_000), st.booleans())
def test_nothing_within_the_limit_is_below_the_bound_and_the_search_keeps_the_limit(exits, samples, seed, of_cost):
    recorded = recording(exits, samples, seed)
    limit = Limit(cost=0.95) if of_cost else Limit(loss=0.05)
    try:
        found = search(recorded, limit)
    except CalibrationError:
        return
    assert limit.holds(*judge(recorded, found.thresholds))
    assert judge(recorded, found.thresholds) == pytest.approx((found.loss, found.cost))
    assert found.bound == lower_bound(recorded, limit)
    assert found.bound <= aim(found, limit) + 1e-9


def test_an_exit_that_does_not_pay_for_its_head_is_not_chosen():
    recorded = recording(4, 500, 5, fee=2.0)
    found = search(recorded, Limit(loss=0.05))
    assert not len(found.chosen)
    assert (found.loss, found.cost) == (0.0, 1.0)


def test_what_exits_save_less_what_they_cost_is_what_the_mean_falls_by():
    recorded = recording(1, 400, 6)
    found = search(recorded, Limit(loss=0.05))
    (worth,) = worths(recorded, found.thresholds)
    assert 1 - found.cost == pytest.approx(worth.saves - worth.costs)
    assert worth.comes_by == 1.0
    assert worth.leaves == pytest.approx((exits_taken(recorded.confidence, found.thresholds) == 0).mean())


def test_switching_off_an_exit_changes_the_mean_by_what_it_is_said_to_be_worth():
    recorded = recording(5, 400, 7)
    found = search(recorded, Limit(loss=0.03))
    assert len(found.chosen) >= 2
    for k, worth in enumerate(worths(recorded, found.thresholds)):
        without = found.thresholds.copy()
        without[k] = NEVER
        assert judge(recorded, without)[1] - found.cost == pytest.approx(worth.saves - worth.costs if found.thresholds[k] < NEVER else 0.0)


def test_what_an_unused_exit_would_do_is_told_without_changing_the_others():
    recorded = recording(6, 400, 8)
    found = search(recorded, Limit(loss=0.02), most_exits=2)
    off = [k for k in range(6) if k not in found.chosen]
    limit = Limit(loss=0.02)
    added = best_added(recorded, found.thresholds, limit, off)
    assert sorted(added) == off
    for k, worth in added.items():
        best = 0.0
        for threshold in levels(recorded.confidence[k], 10_000):
            tried = found.thresholds.copy()
            tried[k] = threshold
            loss, cost = judge(recorded, tried)
            if limit.holds(loss, cost) and threshold < NEVER:
                best = max(best, found.cost - cost + worth.costs)
        assert worth.saves == pytest.approx(best) or (worth.leaves == 0 and best <= recorded.try_cost[k])


def test_an_unused_exit_is_not_said_to_save_by_answers_that_the_limit_forbids():
    recorded = Recorded(np.full((1, 50), 0.9), np.stack([np.ones(50), np.zeros(50)]), np.array([0.1, 1.0]), np.array([0.01]))
    found = search(recorded, Limit(loss=0.01))
    assert not len(found.chosen)
    assert best_added(recorded, found.thresholds, Limit(loss=0.01), [0])[0].leaves == 0


def test_weighted_samples_count_as_often_as_they_weigh():
    recorded = recording(3, 40, 9)
    twice = Recorded(np.tile(recorded.confidence, 2), np.tile(recorded.loss, 2), recorded.reach_cost, recorded.try_cost)
    weighted = Recorded(recorded.confidence, recorded.loss, recorded.reach_cost, recorded.try_cost, np.full(40, 2.0))
    limit = Limit(loss=0.05)
    assert search(weighted, limit).cost == pytest.approx(search(twice, limit).cost)


def test_a_limit_is_on_one_thing():
    for limits in ({}, {"loss": 0.1, "cost": 0.5}):
        with pytest.raises(CalibrationError, match="a search needs one limit"):
            Limit(**limits)
