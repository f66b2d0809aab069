"""Evidence that stays true however often one looks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.adapt.betting import Bet


def evidence_over(numbers: np.ndarray, bet: Bet) -> np.ndarray:
    found = []
    for number in numbers:
        bet.add(float(number))
        found.append(bet.evidence)
    return np.array(found)


@pytest.mark.parametrize(("limit", "above"), [(0.02, False), (0.02, True), (0.2, False), (0.5, True)])
def test_what_is_not_so_is_proven_as_seldom_as_it_says_however_often_one_looks(limit: float, above: bool) -> None:
    random, needed, runs = np.random.default_rng(0), 20.0, 1500
    wrong = sum(evidence_over(random.random(600) < limit, Bet(limit, above=above)).max() >= needed for _ in range(runs))
    assert wrong / runs <= 1 / needed + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert wrong > 0, "a test that never fails proves nothing about its level"


def test_what_is_so_is_proven_soon() -> None:
    random = np.random.default_rng(1)
    for rate, above, within in ((0.005, False, 700), (0.05, True, 800)):
        looks = [np.argmax(evidence_over(random.random(3000) < rate, Bet(0.02, above=above)) >= 100) for _ in range(40)]
        assert 0 < np.median(looks) < within


@given(st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=60), st.floats(0.0, 0.9), st.booleans())
def test_evidence_is_what_the_bets_have_become(numbers: list[float], limit: float, above: bool) -> None:
    bet = Bet(limit, low=-1.0, above=above)
    for number in numbers:
        bet.add(number)
    money = []
    for stake in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75):
        mine = 1.0
        for number in numbers:
            mine *= 1 + stake * ((number - limit) / (limit + 1) if above else (limit - number) / (1 - limit))
        money.append(mine)
    assert bet.evidence == pytest.approx(np.mean(money), rel=1e-9)
    assert bet.mean == pytest.approx(np.mean(numbers))


def test_a_limit_of_everything_or_nothing_is_never_refuted() -> None:
    for bet, number in ((Bet(1.0), 0.0), (Bet(0.0, above=True), 1.0)):
        bet.add(number)
        assert bet.evidence == pytest.approx(1.0)


def test_a_watch_sees_a_change_after_a_long_calm_and_seldom_one_that_is_none() -> None:
    random = np.random.default_rng(2)
    calm = random.random(5000) < 0.005
    watch, plain = Bet(0.02, above=True, watch=True), Bet(0.02, above=True)
    assert evidence_over(calm, watch).max() < 1000
    evidence_over(calm, plain)
    after = random.random(2000) < 0.06
    assert 0 < np.argmax(evidence_over(after, watch) >= 1000) < 800
    assert evidence_over(after[:800], plain).max() < 1000, "the money of the calm is lost"


def test_a_watch_that_is_only_just_calm_raises_no_more_alarms_than_it_says() -> None:
    random, needed = np.random.default_rng(3), 100.0
    alarms, samples = 0, 0
    for _ in range(60):
        watch = Bet(0.05, above=True, watch=True)
        for number in random.random(1000) < 0.05:
            watch.add(float(number))
            samples += 1
            if watch.evidence >= needed:
                alarms, watch = alarms + 1, Bet(0.05, above=True, watch=True)
    assert alarms <= samples / needed
