"""Fixed-sequence testing: what is tested, in which order, and when it ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.calibration.bounds import BOUNDS, Bound, mean_bound, p_value
from exitify.calibration.calibrate import Outputs, loss_of, prepare_risk
from exitify.calibration.risk import LEAST, RISKS, SEARCH_SHARE, Steps, best_provable, proven, require_provable, to_test
from exitify.calibration.thresholds import NEVER, Recorded
from exitify.errors import CalibrationError
from tests.calibration.simulated import PLAN, population


def steps_with(*losses: list[float]) -> Steps:
    return Steps([np.array([0.5])] * len(losses), np.linspace(0.9, 0.1, len(losses)), np.array(losses))


def test_a_setting_after_one_that_fails_is_not_proven() -> None:
    good, bad = [0.0] * 200, [1.0] * 200
    assert proven(steps_with(good, good, bad, good), 0.05, 0.95, "clopper-pearson", "disagreement") == 2
    assert proven(steps_with(bad, good), 0.05, 0.95, "clopper-pearson", "disagreement") == 0
    assert proven(steps_with(good, good), 0.05, 0.95, "clopper-pearson", "disagreement") == 2


@given(st.integers(0, 10_000), st.sampled_from(BOUNDS), st.floats(0.01, 0.2), st.floats(0.6, 0.99))
def test_all_before_the_first_p_value_that_is_too_large_are_proven(seed: int, bound: Bound, rate: float, confidence: float) -> None:
    generator = np.random.default_rng(seed)
    losses = (generator.random((6, 100)) < generator.uniform(0, 0.15, (6, 1))).astype(float)
    values = [p_value(row, rate, bound, confidence=confidence) for row in losses]
    expected = next((i for i, value in enumerate(values) if value > 1 - confidence), 6)
    assert proven(steps_with(*losses.tolist()), rate, confidence, bound, "disagreement") == expected


def test_the_best_provable_rate_is_the_first_settings() -> None:
    generator = np.random.default_rng(0)
    steps = steps_with(*(generator.random((3, 300)) < np.array([[0.03], [0.01], [0.1]])).astype(float).tolist())
    found = best_provable(steps, 0.95, "clopper-pearson", "disagreement")
    assert found == mean_bound(steps.losses[0], "clopper-pearson", confidence=0.95)  # not the second's, though that is smaller
    assert proven(steps, found + 1e-6, 0.95, "clopper-pearson", "disagreement") >= 1
    assert proven(steps, found - 1e-6, 0.95, "clopper-pearson", "disagreement") == 0


def test_settings_are_judged_on_samples_and_priced_on_others() -> None:
    reach, fee = np.array([0.2, 1.0]), np.array([0.1])
    found_on = Recorded(np.array([[0.9, 0.1]]), np.zeros((2, 2)), reach, fee)
    judged_on = Recorded(np.array([[0.9, 0.9, 0.1]]), np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), reach, fee)
    steps = to_test([np.array([NEVER]), np.array([0.5])], found_on, judged_on)
    assert steps.losses.tolist() == [[0, 0, 0], [1, 0, 0]]
    assert steps.cost.tolist() == pytest.approx([1.0, (0.3 + 1.1) / 2])
    assert to_test([], found_on, judged_on).losses.shape == (0, 3)


def test_the_two_losses_are_what_they_are_called() -> None:
    said = np.array([[0, 1, 1, 0], [0, 1, 0, 1]])  # an exit, then the network
    outputs = Outputs(np.eye(2, dtype=np.float32)[said], np.array([0, 0, 0, 1]))
    assert loss_of(outputs, "disagreement").tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert loss_of(outputs, "accuracy").tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    outputs = Outputs(outputs.logits, np.array([1, 1, 1, 0]))
    assert loss_of(outputs, "accuracy").tolist() == [[0, 0, -1, -1], [0, 0, 0, 0]]


def test_under_a_mask_losses_are_against_the_whole_network() -> None:
    logits = np.eye(2, dtype=np.float32)[np.array([[0, 1], [1, 1]])]
    whole = np.eye(2, dtype=np.float32)[np.array([0, 0])]
    outputs = Outputs(logits, np.array([0, 0]), mask=(True,), whole=whole)
    for risk_of in RISKS:
        assert loss_of(outputs, risk_of).tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("risk_of", RISKS)
def test_no_sample_finds_thresholds_and_tests_them(risk_of: str) -> None:
    outputs = population(0, 500)
    trial = prepare_risk(outputs, PLAN, risk_of, seed=7)  # type: ignore[arg-type]
    order = np.random.default_rng(7).permutation(500)
    searched = round(SEARCH_SHARE * 500)
    np.testing.assert_array_equal(trial.test.logits, outputs.logits[:, order[searched:]])
    assert trial.found_on.confidence.shape == (2, searched)
    assert trial.judged_on.confidence.shape == (2, 500 - searched) == (2, trial.steps.losses.shape[1])
    assert set(np.unique(trial.steps.losses)) <= {LEAST[risk_of], 0.0, 1.0}  # type: ignore[index]


def test_of_proven_settings_the_cheapest_is_taken_and_none_that_costs_more_than_it_saves() -> None:
    trial = prepare_risk(population(0, 500), PLAN, "disagreement")
    assert trial.cheapest(0).tolist() == [NEVER, NEVER]
    for count in (1, 5, len(trial.steps.thresholds)):
        cost = trial.steps.cost[:count]
        expected = trial.steps.thresholds[int(cost.argmin())].tolist() if cost.min() < 1 else [NEVER, NEVER]
        assert trial.cheapest(count).tolist() == expected


@pytest.mark.parametrize("share", [1.0, 0.7])
def test_the_number_that_a_refusal_names_is_enough(share: float) -> None:
    with pytest.raises(CalibrationError, match=r"100 samples cannot prove a disagreement of at most 0\.01 at 0\.95") as caught:
        require_provable(100, 0.01, 0.95, "clopper-pearson", "disagreement", share=share)
    enough = int(caught.value.hint.split()[3].rstrip(";"))
    require_provable(enough - round((1 - share) * enough), 0.01, 0.95, "clopper-pearson", "disagreement")
    with pytest.raises(CalibrationError):
        require_provable(round(0.98 * share * enough), 0.01, 0.95, "clopper-pearson", "disagreement")


def test_where_nothing_can_be_proven_at_all_no_rate_is_named() -> None:
    with pytest.raises(CalibrationError) as caught:
        require_provable(2, 0.01, 0.9999, "betting", "disagreement")
    assert caught.value.hint.endswith("; ask for less")
