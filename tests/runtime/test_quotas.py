"""Quotas: they add up, keep the budget, and no ratio that keeps it spends more."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.errors import DataError
from exitify.runtime.quotas import geometric_quotas

growing = st.lists(st.floats(0.01, 1), min_size=1, max_size=6).map(lambda steps: np.cumsum(steps).tolist())


def mean_cost(counts, costs) -> float:
    return float(np.dot(counts, costs)) / sum(counts)


@given(growing, st.floats(0, 1.2), st.integers(1, 300))
def test_quotas_add_up_and_keep_the_budget(costs, where, samples):
    budget = costs[0] + where * (costs[-1] - costs[0])
    counts = geometric_quotas(costs, budget, samples)
    assert (len(counts), sum(counts), min(counts) >= 0) == (len(costs), samples, True)
    assert mean_cost(counts, costs) <= budget + 1e-12


@pytest.mark.parametrize("samples", [1, 7, 100, 5000])
@pytest.mark.parametrize("budget", [0.31, 0.5, 0.77, 1.0])
def test_no_ratio_that_keeps_the_budget_spends_more(samples, budget):
    """Against ten thousand ratios, tried one by one."""
    costs = [0.3, 0.5, 0.7, 1.1]
    best = 0.0
    for ratio in np.exp(np.linspace(-15, 15, 10_001)):
        ends = np.floor(samples * np.cumsum(ratio ** np.arange(4)) / (ratio ** np.arange(4)).sum() + 0.5)
        spent = mean_cost(np.diff([0, *ends[:-1], samples]), costs)
        best = max(best, spent if spent <= budget else 0.0)
    assert best - 1e-9 <= mean_cost(geometric_quotas(costs, budget, samples), costs) <= budget + 1e-12


@given(st.floats(0.35, 1.05))
def test_the_shares_of_many_samples_grow_by_one_ratio_and_spend_the_budget(budget):
    costs = [0.3, 0.5, 0.7, 1.1]
    counts = np.array(geometric_quotas(costs, budget, 10**7), float)
    if counts.min() > 10**4:
        ratios = counts[1:] / counts[:-1]
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-2)
    assert mean_cost(counts, costs) == pytest.approx(budget, abs=1e-5)


def test_all_leave_at_one_end_where_the_budget_is_at_one_end():
    costs = [0.25, 0.5, 1.0]
    assert geometric_quotas(costs, 0.25, 9) == [9, 0, 0]
    assert geometric_quotas(costs, 1.0, 9) == [0, 0, 9]
    assert geometric_quotas(costs, 40.0, 9) == [0, 0, 9]
    assert geometric_quotas([1.0], 1.0, 3) == [3]
    assert geometric_quotas(costs, 7 / 12, 3) == [1, 1, 1]


@pytest.mark.parametrize("budget", [0.2499, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_that_can(budget):
    with pytest.raises(DataError, match=r"the first exit takes 0.25\n  hint: give 0.25 or more"):
        geometric_quotas([0.25, 1.0], budget, 4)
    with pytest.raises(DataError, match=r"the first exit takes 0.3333\n  hint: give 0.3334 or more"):
        geometric_quotas([1 / 3, 1.0], 0.3333, 4)
