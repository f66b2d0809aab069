"""The stated noise holds what it says, on simulated timings of which everything is known; no clock is asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exitify.benchmark.noise import BLOCK, agree, balanced_order, compare, median_interval, student

RATIO = 0.7


class Machine:
    """A machine on which a network takes 1 and the contender 0.7, times what disturbs them.

    load: Standard deviation of the logarithm of what a load of the network is faster or slower by. unlike: How many times that of the contender.
    """

    def __init__(self, rng: np.random.Generator, *, load: float = 0.01, unlike: float = 1.0, heavy: bool = False) -> None:
        self.rng, self.load, self.unlike, self.heavy = rng, load, unlike, heavy

    def run(self, rounds: int = 5, samples: int = 500) -> list[NDArray[np.float64]]:
        """The contender's times, the baseline's and its second copy's."""
        rng = self.rng
        steps = np.arange(rounds * samples)
        slow = 1 + 0.5 * np.sin(steps / 130 + rng.uniform(0, 6)) ** 2 + 1e-4 * steps  # clocks and heat: alike for all
        slow += np.cumsum(rng.normal(0, 0.002, len(steps))).clip(-0.2)
        times = []
        for base, spread in ((RATIO, self.load * self.unlike), (1.0, self.load), (1.0, self.load)):
            draw = rng.standard_t(3, rounds) / math.sqrt(3) if self.heavy else rng.standard_normal(rounds)
            clean = base * np.exp(rng.normal(0, 0.05, len(steps))) * slow
            spikes = np.where(rng.random(len(steps)) < 0.002, rng.exponential(20, len(steps)), 0)
            times.append((clean + spikes).reshape(rounds, samples) * np.exp(spread * draw)[:, None])
        return times


def share_that_agrees(machine: Machine, runs: int, **size: int) -> float:
    """How often a second run lies within the noise that the first one states."""
    agreed = 0
    for _ in range(runs):
        first, second = (compare(*machine.run(**size)) for _ in range(2))
        agreed += agree(first.ratio, second.ratio, first.noise)
    return agreed / runs


@pytest.mark.parametrize("rounds", [2, 3, 5])
@pytest.mark.parametrize("unlike", [0.3, 1.0, 3.0])
def test_a_repeated_run_lies_within_the_stated_noise_in_95_of_100(rounds: int, unlike: float) -> None:
    """Whether loads of the contender differ less or more than the network's. 300 runs at 0.95 give 0.917 or more in all but 1 of 100."""
    machine = Machine(np.random.default_rng(rounds), unlike=unlike)
    assert share_that_agrees(machine, 300, rounds=rounds, samples=150) >= 0.92


def test_it_also_does_where_some_loads_are_far_off() -> None:
    assert share_that_agrees(Machine(np.random.default_rng(0), heavy=True), 300, samples=150) >= 0.92


def test_one_round_is_worth_what_its_two_copies_say() -> None:
    assert share_that_agrees(Machine(np.random.default_rng(1)), 300, rounds=1) >= 0.92


def test_blocks_alone_would_promise_too_much() -> None:
    """Why there are rounds: a load shifts all of its blocks, so that their interval hardly ever holds the next run."""
    machine = Machine(np.random.default_rng(2))
    held = 0
    for _ in range(200):
        first, second = (compare(*machine.run(rounds=1)) for _ in range(2))
        held += first.interval[0] <= second.ratio <= first.interval[1]
    assert held / 200 < 0.6


def test_the_noise_is_of_the_size_of_what_runs_differ_by() -> None:
    """Or it would be true and say nothing: within a few times of what two runs differ by."""
    machine = Machine(np.random.default_rng(3))
    found = [compare(*machine.run()) for _ in range(60)]
    spread = np.log([one.ratio for one in found]).std()
    assert 2 * spread < np.median([one.noise for one in found]) < 8 * spread


def test_drift_that_slows_all_alike_moves_no_ratio() -> None:
    rng = np.random.default_rng(4)
    slow = np.exp(np.cumsum(rng.normal(0, 0.01, (3, 400)), axis=1))
    found = compare(RATIO * slow, slow, slow)
    assert found.ratio == pytest.approx(RATIO, rel=1e-12)
    assert found.noise == pytest.approx(0, abs=1e-9)


def test_a_few_interruptions_move_the_ratio_no_further_than_its_noise() -> None:
    quiet = np.ones((3, 500))
    hit = quiet.copy()
    hit[1, 120:130] = 400.0  # two blocks' worth of one round, four hundred times as slow
    assert compare(hit, quiet, quiet).ratio == 1.0


def test_the_second_copy_says_what_noise_is_when_the_contender_happens_to_agree_with_itself() -> None:
    quiet = np.ones((3, 200))
    again = quiet * np.array([1.02, 0.98, 1.02])[:, None]
    found = compare(RATIO * quiet, quiet, again)
    assert found.rounds == pytest.approx((RATIO, RATIO, RATIO))
    assert found.noise > 0.03


def test_the_noise_is_never_less_than_what_the_network_differs_from_itself_by() -> None:
    quiet = np.ones((20, 100))
    assert compare(RATIO * quiet, quiet, quiet * 1.03).noise >= 0.03 - 1e-12


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(2, 400))
def test_the_ratio_lies_in_its_interval_and_among_its_rounds_whatever_was_timed(seed: int, rounds: int, samples: int) -> None:
    times = np.random.default_rng(seed).lognormal(size=(3, rounds, samples))
    found = compare(*times)
    edge = 1e-9
    assert found.interval[0] * (1 - edge) <= found.ratio <= found.interval[1] * (1 + edge)
    assert min(found.rounds) * (1 - edge) <= found.ratio <= max(found.rounds) * (1 + edge)
    assert math.log1p(found.noise) >= math.log(found.interval[1] / found.ratio) - edge
    assert math.log1p(found.noise) >= math.log(found.ratio / found.interval[0]) - edge


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_the_unit_of_time_is_no_matter(seed: int, factor: float) -> None:
    times = np.random.default_rng(seed).lognormal(size=(3, 2, 120))
    one, other = compare(*times), compare(*(times * factor))
    assert other.ratio == pytest.approx(one.ratio)
    assert other.noise == pytest.approx(one.noise)


@pytest.mark.parametrize("count", [6, 9, 12, 20, 41])
def test_the_interval_holds_the_median_of_any_distribution(count: int) -> None:
    rng = np.random.default_rng(count)
    held = 0
    for _ in range(1000):
        low, high = median_interval(rng.pareto(1.2, count))
        held += low <= 2 ** (1 / 1.2) - 1 <= high
    assert held / 1000 >= 0.93


@pytest.mark.parametrize(("count", "expected"), [(1, (0, 0)), (2, (0, 1)), (5, (0, 4)), (8, (0, 7)), (9, (1, 7)), (20, (5, 14)), (100, (39, 60))])
def test_the_interval_is_between_the_tables_order_statistics(count: int, expected: tuple[int, int]) -> None:
    """Those of the sign test's tables; below six values the lowest and the highest."""
    assert median_interval(np.random.default_rng(0).permutation(count).astype(float)) == expected


def test_students_points_are_the_tables() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the other source of the table: pip install scipy")
    for freedom in (*range(1, 40), 100, 1000):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=2e-4)


@settings(max_examples=60)
@given(st.lists(st.sampled_from([1.0, 2.0, 5.0, 9.0]), min_size=1, max_size=420), st.integers(0, 99))
def test_every_block_has_the_same_mix_of_costs(costs: list[float], seed: int) -> None:
    values = np.array(costs)
    order = balanced_order(values, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(values)))
    blocks = np.array_split(values[order], max(1, len(values) // BLOCK))
    for cost in set(costs):
        counts = [int((block == cost).sum()) for block in blocks]
        assert max(counts) - min(counts) <= 1 + (len(set(map(len, blocks))) > 1)


def test_samples_of_one_cost_are_shuffled() -> None:
    orders = [balanced_order(np.ones(100), np.random.default_rng(seed)).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_agreement_is_alike_in_both_directions() -> None:
    assert agree(1.0, 1.0499, 0.05)
    assert agree(1.0, 1 / 1.0499, 0.05)
    assert not agree(1.0, 1.06, 0.05)
    assert not agree(1.0, 0.94, 0.05)
