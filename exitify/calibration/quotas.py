"""Thresholds from quotas: how many samples are to leave at each exit, in a geometric row (MSDNet's budgeted batch)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from exitify.calibration.thresholds import NEVER, Recorded

RATIOS = np.arange(39, 0, -1) / 20
"""What each exit's quota is of the one before, from the deepest to the shallowest."""


def geometric_shares(ratio: float, exits: int) -> NDArray[np.float64]:
    """Shares of the samples that are to leave at each exit, `(exits,)`, the network's own the last: proportional to ratio^k.

    Source: Huang et al. 2018, MSDNet, arXiv:1703.09844, section 5; the public code's 39 ratios 1/20 to 39/20.
    """
    powers = ratio ** np.arange(1.0, exits + 1)
    return powers / powers.sum()


def quota_thresholds(confidence: NDArray[np.float64], quotas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return thresholds `(K,)` with which each exit, in turn, takes its quota of the samples that have not left before.

    The threshold is the confidence of the floor(N quota)-th of those, surest first; whoever is as sure leaves too, so that with ties
    more may leave than the quota. An exit whose quota is less than a sample, or more than are left, is off.

    Args:
        confidence: `(K, N)`, higher is surer. quotas: `(K + 1,)`, shares of all N.
    """
    count = confidence.shape[1]
    thresholds = np.full(len(confidence), NEVER)
    stays = np.ones(count, bool)
    for k, (sure, quota) in enumerate(zip(confidence, quotas)):
        wanted = int(count * quota)
        if not 0 < wanted <= stays.sum():
            continue
        thresholds[k] = np.sort(sure[stays])[-wanted]
        stays &= sure < thresholds[k]
    return thresholds


def quota_path(recorded: Recorded) -> Iterator[NDArray[np.float64]]:
    """Yield the thresholds of each ratio, from the most that stay to the end to the fewest."""
    for ratio in RATIOS:
        yield quota_thresholds(recorded.confidence, geometric_shares(float(ratio), len(recorded.confidence) + 1))
