"""Temperatures, and the error that they are there to shrink."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.calibration.temperature import calibration_errors, diverges, expected_calibration_error, fit_temperature, log_softmax
from exitify.errors import CalibrationError


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Sample by sample, with nothing of ours."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        scaled = [value / temperature for value in row]
        largest = max(scaled)
        total += largest + np.log(sum(np.exp(value - largest) for value in scaled)) - scaled[label]
    return total / len(labels)


def drawn(seed: int, samples: int = 400, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from the softmax of them: the right temperature is 1."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2.0, (samples, classes))
    noise = generator.gumbel(size=logits.shape)  # the largest of logit + Gumbel noise is a draw from the softmax
    return logits, (logits + noise).argmax(axis=1)


@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_is_where_a_general_minimiser_finds_the_least_likelihood_loss(seed: int, scale: float) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy comes with scikit-learn")
    logits, labels = drawn(seed)
    found = optimize.minimize_scalar(
        lambda log_t: negative_log_likelihood(scale * logits, labels, np.exp(log_t)), bounds=(np.log(0.05), np.log(20)), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    # A minimum is flat: its place is known to the square root of the precision of the values, hence 1e-5.
    assert fit_temperature(scale * logits, labels) == pytest.approx(np.exp(found.x), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_no_temperature_on_a_grid_fits_better(seed: int) -> None:
    logits, labels = drawn(seed, samples=150)
    best = negative_log_likelihood(logits, labels, fit_temperature(logits, labels))
    assert best <= min(negative_log_likelihood(logits, labels, t) for t in np.geomspace(0.05, 20, 100)) + 1e-12


@pytest.mark.parametrize("true", [0.25, 1.0, 4.0])
def test_the_temperature_that_logits_were_scaled_by_comes_back(true: float) -> None:
    logits, labels = drawn(0, samples=20_000)
    assert fit_temperature(logits * true, labels) == pytest.approx(true, rel=0.03)  # 20,000 labels tell it to about 1 %


def test_the_temperature_does_not_depend_on_what_is_added_to_a_row() -> None:
    logits, labels = drawn(1)
    shifted = logits + np.random.default_rng(0).normal(0, 1000, (len(logits), 1))
    assert fit_temperature(shifted, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-9)


def test_the_temperature_is_the_same_from_float32() -> None:
    logits, labels = drawn(2)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-5)


def test_a_head_that_is_always_right_gets_the_low_end() -> None:
    logits, _ = drawn(0)
    assert fit_temperature(logits, logits.argmax(axis=1)) == pytest.approx(0.05)


def test_a_head_that_is_always_wrong_gets_the_high_end() -> None:
    logits, _ = drawn(0)
    assert fit_temperature(logits, logits.argmin(axis=1)) == pytest.approx(20)


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6), st.integers(1, 30))
def test_the_temperature_is_finite_and_in_its_range(seed: int, scale: float, samples: int) -> None:
    generator = np.random.default_rng(seed)
    logits, labels = generator.normal(0, scale, (samples, 4)), generator.integers(0, 4, samples)
    assert 0.05 * (1 - 1e-9) <= fit_temperature(logits, labels) <= 20 * (1 + 1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits, labels = drawn(0)
    logits[3, 1] = bad
    with pytest.raises(CalibrationError, match="logits are not finite") as caught:
        fit_temperature(logits, labels)
    assert "exitify train" in caught.value.hint


def test_log_softmax_does_not_overflow() -> None:
    result = log_softmax(np.array([[1000.0, 0.0], [-1000.0, -1000.0]]))
    assert result == pytest.approx(np.array([[0.0, -1000.0], [-np.log(2), -np.log(2)]]))


def two_classes(confidences: list[float]) -> np.ndarray:
    """Probabilities whose answer is class 0, this sure."""
    return np.array([[confidence, 1 - confidence] for confidence in confidences])


def test_the_calibration_error_is_what_a_hand_computes() -> None:
    # Sorted by confidence, two bins of three: (.6, .7, .7) with one right, (.8, .9, .9) with three right.
    probabilities = two_classes([0.9, 0.6, 0.7, 0.8, 0.7, 0.9])
    labels = np.array([0, 1, 0, 0, 1, 0])
    by_hand = (abs(2.0 / 3 - 1 / 3) * 3 + abs(2.6 / 3 - 1.0) * 3) / 6
    assert expected_calibration_error(probabilities, labels, bins=2) == pytest.approx(by_hand)


def test_the_calibration_error_with_one_bin_is_the_gap_of_the_means() -> None:
    assert expected_calibration_error(two_classes([0.9, 0.9, 0.9, 0.9]), np.array([0, 0, 0, 1]), bins=1) == pytest.approx(0.15)


def test_fewer_samples_than_bins_make_a_bin_each() -> None:
    assert expected_calibration_error(two_classes([0.9, 0.6]), np.array([0, 1])) == pytest.approx((0.1 + 0.6) / 2)


def test_the_right_temperature_has_the_smaller_calibration_error() -> None:
    logits, labels = drawn(0, samples=5000)
    overconfident = 4 * logits
    before = expected_calibration_error(np.exp(log_softmax(overconfident)), labels)
    after = expected_calibration_error(np.exp(log_softmax(overconfident / fit_temperature(overconfident, labels))), labels)
    assert after < 0.03 < before


@pytest.mark.parametrize(("label", "at"), [(5, 7), (-1, 0), (70, 399)])
def test_a_label_outside_the_classes_is_refused_by_the_first_of_them(label: int, at: int) -> None:
    logits, labels = drawn(0)
    labels[at:] = label
    with pytest.raises(CalibrationError, match=f"the label {label} of sample {at} is none of the network's 5 classes") as caught:
        fit_temperature(logits, labels)
    assert "0 to 4" in caught.value.hint


def test_a_temperature_at_an_end_of_its_range_diverges() -> None:
    logits, labels = drawn(0)
    assert diverges(fit_temperature(logits, logits.argmax(axis=1)))
    assert diverges(fit_temperature(logits, logits.argmin(axis=1)))
    assert not diverges(fit_temperature(logits, labels))
    assert not diverges(0.06)


def test_each_half_is_judged_at_the_temperature_of_the_other() -> None:
    logits, labels = drawn(0, samples=600)
    logits = np.stack([3 * logits, 0.4 * logits])
    first, second = np.array_split(np.random.default_rng(4).permutation(600), 2)
    for number, found in enumerate(calibration_errors(logits, labels, seed=4)):
        p = np.zeros((600, 5))
        for judged, fitted in ((first, second), (second, first)):
            p[judged] = np.exp(log_softmax(logits[number, judged] / fit_temperature(logits[number, fitted], labels[fitted])))
        before = expected_calibration_error(np.exp(log_softmax(logits[number])), labels)
        assert found.tolist() == pytest.approx([before, expected_calibration_error(p, labels)])
        assert found[1] < found[0]
