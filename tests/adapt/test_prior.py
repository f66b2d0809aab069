"""Label shift: what the classes a device sees say of an answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.adapt.prior import SeenClasses, expected_shares, rare_classes, seen_shares, shift_of
from exitify.adapt.update import softmax


@given(st.integers(2, 40), st.integers(0, 10_000), st.floats(0.01, 1.0))
def test_shifted_logits_are_bayes_rule(classes: int, seed: int, left: float) -> None:
    random = np.random.default_rng(seed)
    logits, shares = random.standard_normal(classes) * 3, random.dirichlet(np.ones(classes))
    expected = expected_shares(shares, left)
    alike = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(softmax(logits + shift_of(expected)), alike * expected / (alike * expected).sum(), rtol=1e-4, atol=1e-7)
    assert expected.sum() == pytest.approx(1.0)
    if left < 0.99:
        np.testing.assert_allclose(seen_shares(expected, left), shares, atol=1e-9)
    assert expected.min() >= left / classes - 1e-12


def test_the_shift_makes_a_classifier_of_alike_classes_right_where_one_is_rare() -> None:
    """Two bells, one a hundredth as frequent as the other: with the shift the probabilities are those of the world, without they are not."""
    random = np.random.default_rng(0)
    labels = (random.random(200_000) < 0.01).astype(int)
    x = random.normal(size=len(labels)) + 2.0 * labels
    logits = np.stack([np.zeros_like(x), 2.0 * x - 2.0], axis=1)  # of bells at 0 and 2, alike frequent
    shift = shift_of(np.array([0.99, 0.01]))
    sure = softmax(logits + shift)[:, 1] > 0.5
    assert labels[sure].mean() > 0.5
    assert labels[softmax(logits)[:, 1] > 0.5].mean() < 0.2
    assert softmax(logits + shift)[:, 1].mean() == pytest.approx(0.01, rel=0.1)


def test_what_is_long_ago_counts_less() -> None:
    seen = SeenClasses(3, half_life=100)
    assert np.array_equal(seen.shares, np.full(3, 1 / 3))
    for _ in range(1000):
        seen.add(0)
    assert rare_classes(seen.shares).tolist() == [False, True, True]
    for _ in range(100):
        seen.add(1)
    assert seen.shares == pytest.approx([0.5, 0.5, 0.0], abs=2e-3)
    again = SeenClasses(3, 100, seen.counts)
    again.add(2)
    seen.add(2)
    assert np.array_equal(again.shares, seen.shares)


def test_nothing_believed_is_no_shift() -> None:
    assert np.array_equal(shift_of(expected_shares(np.array([1.0, 0.0]), 1.0)), np.zeros(2, np.float32))
