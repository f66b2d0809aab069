"""The search for thresholds against brute force, and what it promises of itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.calibration.thresholds import (
    NEVER,
    Recorded,
    common_path,
    exits_taken,
    finer_price_path,
    judge,
    optimise,
    patience_path,
    price_path,
    stricter_first,
)

PRICES = np.geomspace(300, 0.3, 12)


def problem(seed: int, exits: int, samples: int, *, ties: bool = False, latest: float = 0.95) -> Recorded:
    """Random outputs in which surer samples are right more often and later exits more often still, the last always."""
    generator = np.random.default_rng(seed)
    skill = np.sort(generator.uniform(0.3, 1.0, exits))
    confidence = generator.random((exits, samples)) * skill[:, None]
    if ties:
        confidence = np.round(confidence, 1)
    loss = (generator.random((exits, samples)) > confidence + 0.2).astype(float)
    reach = np.append(np.sort(generator.uniform(0.05, latest, exits)), 1.0)
    return Recorded(confidence, np.vstack([loss, np.zeros((1, samples))]), reach, generator.uniform(0.001, 0.1, exits))


def taken_by_loop(confidence: np.ndarray, thresholds: np.ndarray) -> list[int]:
    taken = []
    for sample in range(confidence.shape[1]):
        for exit_number in range(confidence.shape[0]):
            if confidence[exit_number, sample] >= thresholds[exit_number]:
                taken.append(exit_number)
                break
        else:
            taken.append(confidence.shape[0])
    return taken


def judged_by_loop(recorded: Recorded, thresholds: np.ndarray) -> tuple[float, float]:
    """Mean loss and cost, sample by sample; a head is paid for where it is enabled and the sample comes by."""
    loss = cost = 0.0
    exits, samples = recorded.confidence.shape
    for sample in range(samples):
        spent, left = 0.0, exits
        for number in range(exits):
            if thresholds[number] == NEVER:
                continue
            spent += recorded.try_cost[number]
            if recorded.confidence[number, sample] >= thresholds[number]:
                left = number
                break
        loss += recorded.loss[left, sample]
        cost += spent + recorded.reach_cost[left]
    return loss / samples, cost / samples


def objective(recorded: Recorded, price: float, thresholds: np.ndarray) -> float:
    loss, cost = judged_by_loop(recorded, thresholds)
    return cost + price * loss


def candidates(confidence: np.ndarray) -> list[float]:
    """One threshold for each set of samples that a threshold can let out."""
    return [*np.unique(confidence), NEVER]


def brute_force(recorded: Recorded, price: float) -> float:
    """The least objective over all thresholds."""
    choices = [candidates(row) for row in recorded.confidence]
    judged = [judge(recorded, np.array(thresholds)) for thresholds in itertools.product(*choices)]  # held against a loop below
    return min(cost + price * loss for loss, cost in judged)


def never(recorded: Recorded) -> np.ndarray:
    return np.full(len(recorded.confidence), NEVER)


# --- which exit is taken, and what it costs

numbers = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1)


@given(st.integers(1, 4), st.integers(1, 8), st.data())
def test_a_sample_leaves_at_the_first_exit_that_is_sure_enough(exits: int, samples: int, data: st.DataObject) -> None:
    confidence = np.array(data.draw(st.lists(st.lists(numbers, min_size=samples, max_size=samples), min_size=exits, max_size=exits)))
    thresholds = np.array(data.draw(st.lists(numbers | st.just(NEVER), min_size=exits, max_size=exits)))
    assert exits_taken(confidence, thresholds).tolist() == taken_by_loop(confidence, thresholds)


@pytest.mark.parametrize("seed", range(5))
def test_heads_are_paid_for_by_every_sample_that_comes_by_and_only_where_enabled(seed: int) -> None:
    recorded = problem(seed, exits=3, samples=40)
    generator = np.random.default_rng(seed)
    for switched_off in itertools.product([False, True], repeat=3):
        thresholds = np.where(switched_off, NEVER, generator.random(3) * 0.8)
        assert judge(recorded, thresholds) == pytest.approx(judged_by_loop(recorded, thresholds))


def test_no_exit_costs_the_full_network_and_nothing_else() -> None:
    recorded = problem(0, exits=3, samples=10)
    assert judge(recorded, never(recorded)) == (0.0, recorded.reach_cost[-1])


def test_selected_samples_are_judged_like_those_alone() -> None:
    recorded = problem(0, exits=2, samples=30)
    rows, thresholds = np.array([3, 17, 4]), np.array([0.4, 0.5])
    alone = Recorded(recorded.confidence[:, rows], recorded.loss[:, rows], recorded.reach_cost, recorded.try_cost)
    assert judge(recorded.select(rows), thresholds) == pytest.approx(judged_by_loop(alone, thresholds))


# --- the search


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_one_threshold_is_as_good_as_brute_force(seed: int, ties: bool) -> None:
    recorded = problem(seed, exits=1, samples=25, ties=ties)
    for price in PRICES:
        found = optimise(recorded, price, never(recorded))
        assert objective(recorded, price, found) == pytest.approx(brute_force(recorded, price), abs=1e-12)


def test_two_thresholds_along_the_path_are_hardly_ever_worse_than_brute_force() -> None:
    """One at a time may end where only a change of both would help: rarely, and then by little (the full network costs 1)."""
    gaps = []
    for seed in range(12):
        recorded, thresholds = problem(seed, exits=2, samples=20), np.full(2, NEVER)
        for price in PRICES:
            thresholds = optimise(recorded, price, thresholds)
            gaps.append(objective(recorded, price, thresholds) - brute_force(recorded, price))
    assert min(gaps) >= -1e-12
    assert np.mean(np.array(gaps) > 1e-9) <= 0.05
    assert max(gaps) <= 0.1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_change_of_a_single_threshold_improves_what_was_found(seed: int, ties: bool) -> None:
    recorded = problem(seed, exits=3, samples=30, ties=ties)
    for price in (30.0, 3.0, 1.0):
        found = optimise(recorded, price, never(recorded))
        best = objective(recorded, price, found)
        for number in range(3):
            for threshold in candidates(recorded.confidence[number]):
                other = found.copy()
                other[number] = threshold
                assert objective(recorded, price, other) >= best - 1e-12


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1000), st.lists(numbers | st.just(NEVER), min_size=3, max_size=3))
def test_the_search_never_ends_worse_than_it_began(seed: int, price: float, start: list[float]) -> None:
    recorded = problem(seed, exits=3, samples=20)
    found = optimise(recorded, price, np.array(start))
    assert objective(recorded, price, found) <= objective(recorded, price, np.array(start)) + 1e-9


def test_the_start_is_left_alone() -> None:
    recorded, start = problem(0, exits=2, samples=20), np.array([0.3, NEVER])
    optimise(recorded, 1.0, start)
    assert start.tolist() == [0.3, NEVER]


def test_equal_confidences_leave_together() -> None:
    """The best set would be the first sample alone; its twin, just as sure and wrong, would leave with it."""
    confidence = np.array([[0.9, 0.9, 0.2]])
    loss = np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    recorded = Recorded(confidence, loss, np.array([0.1, 1.0]), np.array([0.01]))
    assert optimise(recorded, 100.0, never(recorded)).tolist() == [NEVER]
    (threshold,) = optimise(recorded, 1.0, never(recorded))
    assert exits_taken(confidence, np.array([threshold])).tolist() == [0, 0, 1]


def test_a_threshold_lies_between_the_samples_that_leave_and_those_that_stay() -> None:
    confidence = np.array([[0.9, 0.8, 0.4, 0.3]])
    loss = np.array([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    recorded = Recorded(confidence, loss, np.array([0.1, 1.0]), np.array([0.01]))
    assert optimise(recorded, 100.0, never(recorded)).tolist() == [pytest.approx(0.6)]


@pytest.mark.parametrize("least", [0.7, 0.0])
def test_neighbours_without_a_number_between_them_are_told_apart(least: float) -> None:
    """The middle of two neighbouring floats is one of them: it must not be the lower."""
    upper = np.nextafter(least, 1)
    for surer in (upper, np.nextafter(upper, 1)):
        confidence = np.array([[surer, np.nextafter(surer, 0)]])
        recorded = Recorded(confidence, np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([0.1, 1.0]), np.array([0.01]))
        found = optimise(recorded, 100.0, never(recorded))
        assert exits_taken(confidence, found).tolist() == [0, 1]


@pytest.mark.parametrize("exits", [1, 3])
def test_an_exit_that_does_not_pay_for_its_head_is_off(exits: int) -> None:
    recorded = problem(0, exits=exits, samples=50)
    dear = Recorded(recorded.confidence, recorded.loss, recorded.reach_cost, np.full(exits, 1.5))  # dearer than the whole network
    for price in PRICES:
        assert optimise(dear, price, never(dear)).tolist() == [NEVER] * exits


def test_only_the_exit_that_pays_is_on() -> None:
    """The second exit costs a head and saves nothing."""
    samples = 40
    confidence = np.tile(np.linspace(0, 1, samples), (2, 1))
    loss = np.vstack([confidence[0] < 0.5, confidence[0] < 0.5, np.zeros(samples)]).astype(float)
    recorded = Recorded(confidence, loss, np.array([0.2, 0.99, 1.0]), np.array([0.02, 0.02]))
    thresholds = optimise(recorded, 100.0, never(recorded))
    assert thresholds[0] == pytest.approx(0.5, abs=1 / samples)
    assert thresholds[1] == NEVER


def test_a_head_that_few_samples_reach_is_worth_it_only_for_those() -> None:
    """Where all have left before, a later exit is off: nobody comes by, and it could not save anything."""
    confidence = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    recorded = Recorded(confidence, np.zeros((3, 3)), np.array([0.1, 0.5, 1.0]), np.array([0.01, 0.01]))
    thresholds = optimise(recorded, 1.0, never(recorded))
    assert exits_taken(confidence, thresholds).tolist() == [0, 0, 0]
    assert thresholds[1] == NEVER


# --- the path


@pytest.mark.parametrize("seed", range(10))
def test_with_one_exit_a_higher_price_never_means_more_loss_nor_less_cost(seed: int) -> None:
    """Where the optimum is exact this is so for any two prices. With more exits a local optimum may break it by a little."""
    recorded = problem(seed, exits=1, samples=60, latest=0.5)
    losses, costs = zip(*(judge(recorded, thresholds) for thresholds in price_path(recorded)), strict=True)
    assert np.all(np.diff(losses) >= -1e-12)
    assert np.all(np.diff(costs) <= 1e-12)
    assert losses[0] < losses[-1]
    assert costs[-1] < costs[0]


@pytest.mark.parametrize("exits", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_each_step_of_the_path_is_at_its_price_no_worse_than_the_step_before(seed: int, exits: int) -> None:
    recorded = problem(seed, exits=exits, samples=60)
    prices = np.geomspace(3000.0, 0.3, 60) * recorded.reach_cost[-1]
    path = [never(recorded), *price_path(recorded)]
    assert len(path) == 61
    for price, before, now in zip(prices, path, path[1:], strict=False):
        assert objective(recorded, price, now) <= objective(recorded, price, before) + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_the_path_begins_without_loss_and_ends_cheap(seed: int) -> None:
    recorded = problem(seed, exits=3, samples=60)
    path = list(price_path(recorded))
    assert judge(recorded, path[0])[0] == 0.0
    assert judge(recorded, path[-1])[1] < min(0.7, judge(recorded, path[0])[1])


def test_prices_follow_the_units_of_the_costs() -> None:
    recorded = problem(1, exits=2, samples=40)
    in_other_units = Recorded(recorded.confidence, recorded.loss, recorded.reach_cost * 8.0, recorded.try_cost * 8.0)
    for one, other in zip(price_path(recorded), price_path(in_other_units), strict=True):
        assert one.tolist() == other.tolist()


def test_the_path_is_the_same_each_time() -> None:
    recorded = problem(2, exits=3, samples=50)
    assert [t.tolist() for t in price_path(recorded)] == [t.tolist() for t in price_path(recorded)]


def test_a_risk_is_tried_on_stricter_settings_first_and_finely_between_the_paths_own() -> None:
    path = [np.array([NEVER, NEVER]), np.array([0.9, NEVER]), np.array([0.9, NEVER]), np.array([0.7, 0.8]), np.array([0.5, 0.6])]
    settings = list(stricter_first(path))
    firsts = [setting[0] for setting in settings]
    assert firsts == sorted(firsts, reverse=True)
    assert firsts[0] == pytest.approx(0.998)
    tried = [tuple(setting) for setting in settings]
    assert len(tried) == 10 + 1 + 3 + 1 + 3 + 1
    assert [tried.index(own) for own in ((0.9, NEVER), (0.7, 0.8), (0.5, 0.6))] == [10, 14, 18]
    assert tried[16] == pytest.approx((0.6, 0.7))
    assert all(np.isinf(setting[1]) for setting in settings[:14])


def test_stricter_settings_move_towards_the_highest_that_a_score_can_be() -> None:
    path = [np.array([-0.4, NEVER]), np.array([-0.8, -0.2])]
    steps = list(stricter_first(path, 0.0))
    assert steps[0].tolist() == pytest.approx([-0.4 * 0.02, NEVER])
    assert steps[9].tolist() == pytest.approx([-0.4 * 0.8, NEVER])
    assert [step[0] for step in steps] == sorted((step[0] for step in steps), reverse=True)
    assert max(step[0] for step in steps) < 0.0


def test_a_finer_path_holds_the_paths_own_settings_and_three_between_each_two() -> None:
    recorded = problem(0, 3, 200)
    coarse, fine = list(price_path(recorded)), list(finer_price_path(recorded))
    assert len(fine) == 4 * len(coarse)
    assert all(np.array_equal(one, other) for one, other in zip(fine[3::4], coarse, strict=True))
    for i, (before, after) in enumerate(itertools.pairwise(coarse)):
        both = (before < NEVER) & (after < NEVER)
        for j, share in enumerate((0.25, 0.5, 0.75)):
            step = fine[4 * (i + 1) + j]
            assert step[both] == pytest.approx((1 - share) * before[both] + share * after[both])
            assert np.array_equal(step[~both], before[~both])


def test_patience_asks_for_fewer_and_fewer_that_agree() -> None:
    assert [thresholds.tolist() for thresholds in patience_path(problem(0, 3, 10))] == [[3.0] * 3, [2.0] * 3, [1.0] * 3]


def test_a_common_threshold_falls_from_one_to_nothing_past_a_half() -> None:
    path = list(common_path(problem(0, 2, 10)))
    assert [thresholds[0] for thresholds in path] == pytest.approx([1 - i / 60 for i in range(61)])
    assert all(thresholds[0] == thresholds[1] for thresholds in path)
    assert path[30].tolist() == [0.5, 0.5]
