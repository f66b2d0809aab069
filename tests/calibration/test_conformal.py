"""Prediction sets: the quantile by its definition, the kinds, and the coverage that they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.artifact.manifest import Conformal
from exitify.calibration.calibrate import calibrate, conformal_of, record_outputs, settle_max_drop, split_for_sets
from exitify.calibration.conformal import FEWEST, KINDS, ROUNDING, Kind, conformal_quantiles, fit_conformal, prediction_sets, quantile, samples_needed
from exitify.calibration.temperature import log_softmax
from exitify.errors import CalibrationError
from exitify.runtime.session import Session
from tests import digits
from tests.calibration.simulated import PLAN, population, taken

# --- the quantile


@given(st.integers(1, 60), st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.5]), st.integers(0, 10_000), st.booleans())
def test_the_quantile_is_the_least_score_that_enough_samples_do_not_exceed(count: int, alpha: float, seed: int, ties: bool) -> None:
    scores = np.random.default_rng(seed).random(count)
    scores = scores.round(1) if ties else scores
    enough = [score for score in scores if (scores <= score).sum() >= (count + 1) * (1 - alpha) - 1e-9]
    assert quantile(scores, alpha) == (min(enough) if enough else 1.0)


@pytest.mark.parametrize(("count", "alpha", "rank"), [(19, 0.05, 19), (20, 0.05, 20), (99, 0.1, 90), (100, 0.1, 91), (9, 0.5, 5), (99, 0.01, 99)])
def test_the_rank_of_the_tables(count: int, alpha: float, rank: int) -> None:
    assert quantile(np.arange(1.0, count + 1) / 1000, alpha) == rank / 1000


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1, 0.3])
def test_the_quantile_is_numpys_without_interpolation_and_the_next_lower_one_of_its_higher(alpha: float) -> None:
    scores = np.random.default_rng(0).random(537)
    level = math.ceil(538 * (1 - alpha)) / 537
    assert quantile(scores, alpha) == np.quantile(scores, level, method="inverted_cdf")
    above = np.sort(scores)[np.searchsorted(np.sort(scores), quantile(scores, alpha)) + 1]
    assert np.quantile(scores, level, method="higher") == above


@pytest.mark.parametrize(("alpha", "needed"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.3, 3), (0.5, 1)])
def test_as_many_samples_are_needed_as_leave_a_class_out(alpha: float, needed: int) -> None:
    assert samples_needed(alpha) == needed
    assert quantile(np.zeros(needed), alpha) == 0.0
    assert quantile(np.zeros(needed - 1), alpha) == 1.0


def test_of_no_samples_the_set_is_whole() -> None:
    assert quantile(np.zeros(0), 0.1) == 1.0


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_one_more_sample_exceeds_the_quantile_as_often_as_alpha_says(alpha: float) -> None:
    """Without ties the chance is exactly floor((N + 1) alpha) / (N + 1), whatever the distribution."""
    draws, count = 20_000, 39
    scores = np.random.default_rng(0).standard_exponential((draws, count + 1))
    exceeds = [row[-1] > quantile(row[:-1], alpha) for row in scores]
    exact = math.floor((count + 1) * alpha + 1e-9) / (count + 1)
    assert np.mean(exceeds) == pytest.approx(exact, abs=4 * math.sqrt(alpha / draws))


# --- the kinds


def example(samples: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Scores of three exits, and where each sample leaves: most at the first, few at the second."""
    generator = np.random.default_rng(0)
    return generator.random((3, samples)), generator.choice(3, samples, p=[0.7, 0.04, 0.26])


def test_general_is_one_quantile_of_every_sample_where_it_leaves() -> None:
    scores, leaves = example()
    found = conformal_quantiles(scores, leaves, 0.1, "general")
    assert found.tolist() == [quantile(np.array([scores[k, i] for i, k in enumerate(leaves)]), 0.1)] * 3


def test_per_exit_is_of_all_samples_at_each_exit() -> None:
    scores, leaves = example()
    assert conformal_quantiles(scores, leaves, 0.1, "per_exit").tolist() == [quantile(row, 0.1) for row in scores]


def test_strict_is_of_those_alone_that_leave_there() -> None:
    scores, leaves = example()
    expected = [quantile(np.array([scores[k, i] for i, at in enumerate(leaves) if at == k]), 0.1) for k in range(3)]
    assert conformal_quantiles(scores, leaves, 0.1, "strict").tolist() == expected


def test_gated_is_strict_but_general_where_few_leave() -> None:
    scores, leaves = example()
    assert (leaves == 1).sum() < FEWEST < (leaves == 2).sum()
    strict, general, gated = (conformal_quantiles(scores, leaves, 0.1, kind).tolist() for kind in ("strict", "general", "gated"))
    assert gated == [strict[0], general[1], strict[2]]
    assert general[1] != strict[1]


@pytest.mark.parametrize(("few", "kept"), [(FEWEST - 1, False), (FEWEST, True)])
def test_twenty_samples_are_enough_for_an_exit_of_its_own(few: int, kept: bool) -> None:
    scores = np.random.default_rng(1).random((2, 200))
    leaves = (np.arange(200) >= few).astype(int)
    gated, strict = (conformal_quantiles(scores, leaves, 0.1, kind)[0] for kind in ("gated", "strict"))
    assert (gated == strict) == kept


def test_gated_asks_for_more_where_twenty_prove_nothing() -> None:
    """At alpha 0.01 an exit of 50 samples has the whole set by itself."""
    scores = np.random.default_rng(1).random((2, 500))
    leaves = (np.arange(500) >= 50).astype(int)
    assert conformal_quantiles(scores, leaves, 0.01, "strict")[0] == 1.0
    assert conformal_quantiles(scores, leaves, 0.01, "gated")[0] == conformal_quantiles(scores, leaves, 0.01, "general")[0] < 1.0


def test_an_exit_that_nobody_leaves_at_has_the_whole_set() -> None:
    scores = np.random.default_rng(0).random((3, 100))
    strict = conformal_quantiles(scores, np.zeros(100, int), 0.1, "strict")
    assert strict[1:].tolist() == [1.0, 1.0]
    assert prediction_sets(np.array([1.0, 0.0, 0.0]), strict[1]).all()


# --- sets


def test_a_set_holds_the_classes_up_to_the_quantile() -> None:
    p = np.array([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04]])
    assert prediction_sets(p, 0.75).tolist() == [[True, True, False], [True, False, False]]
    assert prediction_sets(p, 0.05).tolist() == [[False] * 3, [False] * 3]  # sure of none


@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.sampled_from([0.05, 0.1, 0.3]))
def test_of_the_samples_themselves_as_many_are_held_as_the_quantile_says_even_in_float32(seed: int, kind: Kind, alpha: float) -> None:
    generator = np.random.default_rng(seed)
    p = generator.dirichlet(np.ones(4), (2, 60))
    labels, leaves = generator.integers(0, 4, 60), generator.integers(0, 2, 60)
    made = fit_conformal(p, labels, leaves, ("exit1", "final"), alpha, kind)
    quantiles = np.array([*made.quantiles.values()])
    per_sample = p[leaves, np.arange(60)].astype(np.float32)
    held = prediction_sets(per_sample, quantiles[leaves, None])[np.arange(60), labels]
    if kind == "general" or kind == "strict":
        assert held.mean() >= 1 - alpha - 1e-9
    assert (made.alpha, made.kind, made.samples, tuple(made.quantiles)) == (alpha, kind, 60, ("exit1", "final"))


@pytest.mark.parametrize("kind", ["general", "strict", "gated"])
@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_sets_miss_the_true_class_as_often_as_promised(kind: Kind, alpha: float) -> None:
    """Over 60 calibration sets, each judged on 2,000 others; one set of 400 alone is off by a point or so."""
    everyone = population(0, 20_000)
    settings = settle_max_drop(population(1, 600), PLAN, 0.1)
    leaves = taken(everyone, settings)
    p = np.exp(log_softmax(everyone.logits / settings.temperatures[:, None, None]))
    coverage = []
    for seed in range(60):
        order = np.random.default_rng(seed).permutation(20_000)
        rows, judged = order[:400], order[400:2400]
        made = conformal_of(everyone.select(rows), PLAN, settings, alpha, kind)
        quantiles = np.array([*made.quantiles.values()])[leaves[judged], None]
        coverage.append(prediction_sets(p[leaves[judged], judged], quantiles)[np.arange(2000), everyone.labels[judged]].mean())
    assert 1 - alpha - 0.005 <= np.mean(coverage) <= 1 - alpha + 0.015  # strict has few samples an exit, and rounds up at each


def test_strict_sets_hold_at_each_exit_what_general_ones_hold_over_all() -> None:
    everyone = population(0, 20_000)
    settings = settle_max_drop(population(1, 600), PLAN, 0.1)
    leaves = taken(everyone, settings)
    p = np.exp(log_softmax(everyone.logits / settings.temperatures[:, None, None]))[leaves, np.arange(20_000)]
    calibration = np.arange(0, 20_000, 4)
    at_exits = {}
    for kind in ("general", "strict"):
        quantiles = np.array([*conformal_of(everyone.select(calibration), PLAN, settings, 0.1, kind).quantiles.values()])  # type: ignore[arg-type]
        held = prediction_sets(p, quantiles[leaves, None])[np.arange(20_000), everyone.labels]
        at_exits[kind] = [held[leaves == k].mean() for k in range(3)]
    assert max(abs(share - 0.9) for share in at_exits["strict"]) < 0.02
    assert max(abs(share - 0.9) for share in at_exits["general"]) > 0.03


# --- calibrate


def test_sets_rest_on_samples_that_nothing_else_was_found_on() -> None:
    fitted, held = split_for_sets(1000, 0.05, 3)
    assert len(held) == 300
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(1000))
    assert split_for_sets(1000, 0.05, 3)[1].tolist() == held.tolist()
    assert split_for_sets(1000, None, 3)[1].tolist() == []


def test_calibrate_puts_sets_into_the_profile_and_says_how_many_samples_they_have() -> None:
    artifact, samples = digits.trained_artifact(), digits.samples_of("calibration")
    made = calibrate(artifact, samples, max_drop=0.01, alpha=0.05, conformal="general").profile("default")
    assert made.conformal is not None
    assert made.promise.samples == 350
    assert "Prediction sets rest on 150 other samples." in made.promise.note
    fitted, held = split_for_sets(500, 0.05, 0)
    outputs = record_outputs(artifact, samples)
    settings = settle_max_drop(outputs.select(fitted), artifact.plan, 0.01)
    assert made.conformal == conformal_of(outputs.select(held), artifact.plan, settings, 0.05, "general")
    assert made.promise.accuracy == settings.promise.accuracy
    without = calibrate(artifact, samples, max_drop=0.01).profile("default")
    assert without.conformal is None
    assert without.promise.samples == 500


def test_a_session_answers_with_the_sets_that_were_calibrated() -> None:
    calibrated = calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.01, alpha=0.1)
    sets = calibrated.profile("default").conformal
    assert sets is not None
    samples = digits.samples_of("test")
    answers = [Session(calibrated).run(x) for x in samples.inputs(slice(0, 30))]
    for answer in answers:
        expected = np.flatnonzero(prediction_sets(answer.probabilities, sets.quantiles[answer.exit]))
        assert sorted(answer.prediction_set or ()) == expected.tolist()


def test_a_promise_of_time_has_sets_too() -> None:
    made = calibrate(digits.trained_artifact(), digits.samples_of("calibration"), budget_ms=1e4, alpha=0.1).profile("default")
    assert made.conformal is not None
    assert (made.conformal.samples, made.promise.samples) == (150, 350)


def test_too_few_samples_for_alpha_are_refused_with_the_number_that_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitify.calibration.calibrate.record_outputs", lambda *_, **__: pytest.fail("recorded"))
    samples = digits.samples_of("calibration").subset(range(327))
    with pytest.raises(CalibrationError, match=r"98 samples are too few for prediction sets .* 0\.01") as caught:
        calibrate(digits.trained_artifact(), samples, max_drop=0.01, alpha=0.01)
    assert "they need 99 of their own: give at least 330 in all" in caught.value.hint
    assert len(split_for_sets(330, 0.01, 0)[1]) == 99


def test_fewer_than_fifty_samples_beside_the_sets_are_refused() -> None:
    with pytest.raises(CalibrationError, match="70 samples are too few") as caught:
        calibrate(digits.trained_artifact(), digits.samples_of("calibration").subset(range(70)), max_drop=0.01, alpha=0.1)
    assert "at least 72" in caught.value.hint
    assert calibrate(digits.trained_artifact(), digits.samples_of("calibration").subset(range(72)), max_drop=0.01, alpha=0.1).profile("default")


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_an_alpha_that_is_no_share_is_refused(alpha: float) -> None:
    with pytest.raises(CalibrationError, match="is no share of answers"):
        calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.01, alpha=alpha)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no conformal 'loose'") as caught:
        calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.01, alpha=0.1, conformal="loose")  # type: ignore[arg-type]
    assert "general, per_exit, strict, gated" in caught.value.hint


def test_quantiles_of_probabilities_at_each_exits_temperature() -> None:
    """The rounding aside, a quantile is the score of a sample."""
    outputs = population(2, 500)
    settings = settle_max_drop(population(1, 600), PLAN, 0.1)
    made = conformal_of(outputs, PLAN, settings, 0.1, "per_exit")
    assert isinstance(made, Conformal)
    for number, found in enumerate(made.quantiles.values()):
        p = np.exp(log_softmax(outputs.logits[number] / settings.temperatures[number]))[np.arange(500), outputs.labels]
        assert np.abs(1 - p + ROUNDING - found).min() < 1e-12
