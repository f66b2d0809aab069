"""The search for thresholds, one an exit, over recorded outputs.

It is not separable: which samples reach an exit depends on every earlier threshold. So one threshold at a time is set to
its best value given the others, for a price on errors, until nothing changes; prices from high to low give a path of
ever cheaper settings, and the caller takes the cheapest one that keeps its promise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEVER = np.inf
"""The threshold of an exit that is never taken."""


@dataclass(frozen=True)
class Recorded:
    """What every exit said of every sample.

    confidence: `(K, N)`, higher is surer, of the K early exits.
    loss: `(K + 1, N)`, what it costs to answer with exit k; the last row is the full network's.
    reach_cost: `(K + 1,)`, cost of a run that ends at k when all K exits are tried on the way.
    try_cost: `(K,)`, what trying exit k adds to a run that goes on.
    """

    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]
    reach_cost: NDArray[np.float64]
    try_cost: NDArray[np.float64]

    def select(self, rows: NDArray[np.integer]) -> Recorded:
        """The same for these samples only."""
        return Recorded(self.confidence[:, rows], self.loss[:, rows], self.reach_cost, self.try_cost)

    def without(self, k: int) -> Recorded:
        """The same network with exit k removed: it is no longer tried, so later exits are reached for less."""
        reach = self.reach_cost - np.where(np.arange(len(self.reach_cost)) >= k, self.try_cost[k], 0.0)
        drop = lambda rows: np.delete(rows, k, axis=0)  # noqa: E731
        return Recorded(drop(self.confidence), drop(self.loss), np.delete(reach, k), np.delete(self.try_cost, k))


def exits_taken(confidence: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return for each sample the first exit whose confidence reaches its threshold; K when none does."""
    takes = np.vstack([confidence >= thresholds[:, None], np.ones((1, confidence.shape[1]), bool)])
    return takes.argmax(axis=0)


def judge(recorded: Recorded, thresholds: NDArray[np.float64]) -> tuple[float, float]:
    """Return mean loss and mean cost under these thresholds."""
    taken = exits_taken(recorded.confidence, thresholds)
    return float(recorded.loss[taken, np.arange(len(taken))].mean()), float(recorded.reach_cost[taken].mean())


def optimise(recorded: Recorded, price: float, start: NDArray[np.float64], rounds: int = 30) -> NDArray[np.float64]:
    """Return thresholds that no single change improves, for the objective cost + price * loss.

    Args:
        recorded: K exits, N samples.
        price: What a unit of loss is worth, in units of cost.
        start: `(K,)` thresholds to begin with.
    """
    count, samples = recorded.confidence.shape
    objective = recorded.reach_cost[:, None] + price * recorded.loss
    thresholds = start.copy()
    for _ in range(rounds):
        before = thresholds.copy()
        for k in range(count):
            waits = (recorded.confidence[:k] < thresholds[:k, None]).all(axis=0)
            later = thresholds.copy()
            later[: k + 1] = NEVER
            fallback = objective[exits_taken(recorded.confidence, later), np.arange(samples)]
            thresholds[k] = _best_threshold(recorded.confidence[k, waits], (objective[k] - fallback)[waits])
        if np.array_equal(before, thresholds):
            break
    return thresholds


def _best_threshold(confidence: NDArray[np.float64], gain: NDArray[np.float64]) -> float:
    """The threshold for which the gains of the samples at or above it sum to the least; `NEVER` when none is below zero."""
    if not len(confidence):
        return float(NEVER)
    order = np.argsort(-confidence, kind="stable")
    ranked, total = confidence[order], np.cumsum(gain[order])
    total[:-1][ranked[:-1] == ranked[1:]] = np.inf  # equal confidences leave together
    best = int(total.argmin())
    if total[best] >= 0:
        return float(NEVER)
    following = ranked[best + 1] if best + 1 < len(ranked) else ranked[best]
    return float((ranked[best] + following) / 2)


def price_path(recorded: Recorded, steps: int = 60) -> Iterator[NDArray[np.float64]]:
    """Yield thresholds from the safest (errors priced highest) to the cheapest, each started from the one before."""
    scale = float(recorded.reach_cost[-1])
    thresholds = np.full(len(recorded.confidence), NEVER)
    for price in np.geomspace(3000.0, 0.3, steps):
        thresholds = optimise(recorded, price * scale, thresholds)
        yield thresholds
