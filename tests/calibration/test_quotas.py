"""MSDNet's quotas: the worked example by hand, and the public solver's loop over samples, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.calibration.calibrate import settle_budget
from exitify.calibration.quotas import RATIOS, geometric_shares, quota_path, quota_thresholds
from exitify.calibration.thresholds import NEVER, Recorded, exits_taken
from tests.calibration.simulated import PLAN, population


def one_sample_at_a_time(confidence: np.ndarray, quotas: np.ndarray) -> list[float]:
    """Each exit goes through the samples, surest first, and counts those that have not left before, until its quota is full."""
    exits, count = confidence.shape
    left = [False] * count
    thresholds = []
    for k in range(exits):
        wanted = math.floor(count * quotas[k])
        threshold, counted = NEVER, 0
        for i in sorted(range(count), key=lambda i: -confidence[k, i]):
            if left[i]:
                continue
            counted += 1
            if counted == wanted:
                threshold = float(confidence[k, i])
                break
        left = [gone or confidence[k, i] >= threshold for i, gone in enumerate(left)]
        thresholds.append(threshold)
    return thresholds


def test_shares_are_a_geometric_row() -> None:
    shares = geometric_shares(0.5, 3)
    assert shares.tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])  # 1/2, 1/4, 1/8 over their sum
    assert geometric_shares(1.0, 4).tolist() == [0.25] * 4
    assert geometric_shares(1.5, 3)[2] / geometric_shares(1.5, 3)[1] == pytest.approx(1.5)


def test_the_ratios_are_the_public_codes_from_the_deepest() -> None:
    assert RATIOS.tolist() == pytest.approx([i / 20 for i in range(39, 0, -1)])


def test_the_example_that_a_hand_computes() -> None:
    """Eight samples, quotas of 2, 3 and the rest: exit 1 takes its two surest, exit 2 its three surest of the other six."""
    first = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    second = np.array([0.95, 0.99, 0.2, 0.6, 0.9, 0.8, 0.7, 0.1])  # the surest two have left already
    thresholds = quota_thresholds(np.array([first, second]), np.array([0.25, 0.375, 0.375]))
    assert thresholds.tolist() == [0.8, 0.7]
    assert exits_taken(np.array([first, second]), thresholds).tolist() == [0, 0, 2, 2, 1, 1, 1, 2]


def test_a_quota_below_one_sample_switches_an_exit_off() -> None:
    confidence = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]])
    assert quota_thresholds(confidence, np.array([0.3, 0.4, 0.3])).tolist() == [NEVER, 0.9]


def test_a_quota_that_too_few_are_left_for_switches_an_exit_off() -> None:
    """All are equally sure of exit 1, so that all leave there, whatever its quota."""
    confidence = np.array([[0.5] * 4, [0.9, 0.8, 0.7, 0.6]])
    assert quota_thresholds(confidence, np.array([0.25, 0.5, 0.25])).tolist() == [0.5, NEVER]


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 40), st.sampled_from(RATIOS.tolist()), st.booleans())
def test_thresholds_are_the_solvers(seed: int, exits: int, samples: int, ratio: float, ties: bool) -> None:
    generator = np.random.default_rng(seed)
    confidence = generator.random((exits, samples))
    confidence = confidence.round(1) if ties else confidence
    shares = geometric_shares(ratio, exits + 1)
    assert quota_thresholds(confidence, shares).tolist() == one_sample_at_a_time(confidence, shares)


@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from(RATIOS.tolist()))
def test_without_ties_each_exit_takes_its_quota(seed: int, exits: int, ratio: float) -> None:
    confidence = np.random.default_rng(seed).random((exits, 200))
    shares = geometric_shares(ratio, exits + 1)
    taken = exits_taken(confidence, quota_thresholds(confidence, shares))
    assert np.bincount(taken, minlength=exits + 1)[:-1].tolist() == [int(200 * share) for share in shares[:-1]]


def test_the_path_goes_from_the_deepest_to_the_shallowest() -> None:
    generator = np.random.default_rng(0)
    recorded = Recorded(generator.random((3, 400)), np.zeros((4, 400)), np.array([0.25, 0.5, 0.75, 1.0]), np.zeros(3))
    depth = [exits_taken(recorded.confidence, thresholds).mean() for thresholds in quota_path(recorded)]
    assert len(depth) == 39
    assert depth == sorted(depth, reverse=True)


@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_a_budget_is_kept_by_quotas_as_by_prices(budget: float) -> None:
    outputs = population(0, 600)
    for search in ("quotas", "coordinate"):
        promise = settle_budget(outputs, PLAN, budget, search=search).promise  # type: ignore[arg-type]
        assert promise.kept
        assert budget - 0.1 <= promise.mean_macs_share <= budget
