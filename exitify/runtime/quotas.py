"""How many samples of a batch leave at each exit so that their answers cost no more than a budget on average."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from exitify.errors import DataError

_STEEPEST = 60.0
"""Logarithm of the largest ratio between two exits' quotas: beyond it all samples leave at one end."""


def geometric_quotas(costs: Sequence[float], budget: float, samples: int) -> list[int]:
    """How many samples leave at each exit: their shares grow or shrink from exit to exit by one ratio (Huang et al. 2018, MSDNet, budgeted batch).

    Of all ratios the largest whose cost is within the budget: what goes deeper is answered better. Shares are rounded along their sum, so that
    counts add up; MSDNet takes a fixed list of ratios, and finds thresholds for them on other samples.

    Args:
        costs: Of an answer at each exit, all heads on the way counted, growing, as shares of the network. budget: Mean cost that is allowed.
        samples: In the batch.

    Returns:
        Counts, one a cost, that sum to `samples`.

    Raises:
        DataError: the budget is no number, or below what the first exit costs.
    """
    if not math.isfinite(budget) or budget < costs[0]:
        raise DataError(f"no answer costs {budget:g} of the network: the first exit takes {costs[0]:.4g}", f"give {_above(costs[0]):.4g} or more")
    low, high = -_STEEPEST, _STEEPEST
    if _mean_cost(_counts(high, len(costs), samples), costs) <= budget:
        low = high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_cost(_counts(middle, len(costs), samples), costs) <= budget else (low, middle)
    return _counts(low, len(costs), samples)


def _counts(log_ratio: float, exits: int, samples: int) -> list[int]:
    exponents = log_ratio * np.arange(exits)
    shares = np.exp(exponents - exponents.max())
    left = np.floor(samples * np.cumsum(shares) / shares.sum() + 0.5).astype(int)
    left[-1] = samples
    return [int(count) for count in np.diff(left, prepend=0)]


def _mean_cost(counts: Sequence[int], costs: Sequence[float]) -> float:
    return sum(count * cost for count, cost in zip(counts, costs)) / sum(counts)


def _above(cost: float) -> float:
    """The cost, rounded up to what its message shows."""
    step = 10.0 ** (math.floor(math.log10(cost)) - 3) if cost > 0 else 0.0
    return math.ceil(cost / step - 1e-9) * step if step else 0.0
