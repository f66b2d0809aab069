"""The search for thresholds, one an exit, over recorded outputs.

It is not separable: which samples reach an exit depends on every earlier threshold. So one threshold at a time is set to
its best value given the others, for a price on errors, until nothing changes; prices from high to low give a path of
ever cheaper settings, and the caller takes the cheapest one that keeps its promise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

NEVER = np.inf
"""The threshold of an exit that is not taken, and therefore not run."""


@dataclass(frozen=True)
class Recorded:
    """What every exit said of every sample.

    confidence: `(K, N)`, higher is surer, of the K early exits.
    loss: `(K + 1, N)`, what it costs to answer with exit k; the last row is the full network's.
    reach_cost: `(K + 1,)`, cost of computing what exit k reads, no head counted; the last is the full network's.
    try_cost: `(K,)`, what running exit k's head adds for every sample that comes by.
    weight: `(N,)`, how much a sample counts; none where all count alike.
    head_cost: `(K,)`, where each head reads the one before it: what of `try_cost` a run also pays for exits that are off on the way
        to one that is on. None where heads do not read each other.
    """

    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]
    reach_cost: NDArray[np.float64]
    try_cost: NDArray[np.float64]
    weight: NDArray[np.float64] | None = None
    head_cost: NDArray[np.float64] | None = None

    def select(self, rows: NDArray[np.integer]) -> Recorded:
        """The same for these samples only."""
        weight = None if self.weight is None else self.weight[rows]
        return replace(self, confidence=self.confidence[:, rows], loss=self.loss[:, rows], weight=weight)

    def cost(self, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Cost of a run that ends at each exit, `(K + 1,)`: the heads that are run on the way counted."""
        on = thresholds < NEVER
        off_cost = 0.0 if self.head_cost is None else np.where(np.arange(len(on)) < np.flatnonzero(on).max(initial=-1), self.head_cost, 0.0)
        tried = np.cumsum(np.where(on, self.try_cost, off_cost))
        total: NDArray[np.float64] = self.reach_cost + np.append(tried, tried[-1:].sum())
        return total


def exits_taken(confidence: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return for each sample the first exit whose confidence reaches its threshold; K when none does."""
    takes = np.vstack([confidence >= thresholds[:, None], np.ones((1, confidence.shape[1]), bool)])
    taken: NDArray[np.intp] = takes.argmax(axis=0)
    return taken


def judge(recorded: Recorded, thresholds: NDArray[np.float64]) -> tuple[float, float]:
    """Return mean loss and mean cost under these thresholds."""
    taken = exits_taken(recorded.confidence, thresholds)
    loss, cost = recorded.loss[taken, np.arange(len(taken))], recorded.cost(thresholds)[taken]
    return float(np.average(loss, weights=recorded.weight)), float(np.average(cost, weights=recorded.weight))


def optimise(recorded: Recorded, price: float, start: NDArray[np.float64], rounds: int = 30) -> NDArray[np.float64]:
    """Return thresholds that no change of a single one improves, for the objective cost + price * loss.

    An exit is switched on only where what it saves pays for its head, which every sample that comes by runs.

    Args:
        recorded: K exits, N samples.
        price: What a unit of loss is worth, in units of cost.
        start: `(K,)` thresholds to begin with.
    """
    count, samples = recorded.confidence.shape
    everyone = np.arange(samples)
    weight = np.ones(samples) if recorded.weight is None else recorded.weight
    thresholds = start.copy()
    for _ in range(rounds):
        before = thresholds.copy()
        for k in range(count):
            waits = (recorded.confidence[:k] < thresholds[:k, None]).all(axis=0)
            without, with_it = thresholds.copy(), thresholds.copy()
            without[k], with_it[k] = NEVER, 0.0
            cost, cost_with = recorded.cost(without), recorded.cost(with_it)
            fee = float(cost_with[-1] - cost[-1])  # the same for all later exits
            cost[k] = cost_with[k] - fee
            objective = cost[:, None] + price * recorded.loss
            without[:k] = NEVER
            fallback = objective[exits_taken(recorded.confidence, without), everyone]
            gain = ((objective[k] - fallback) * weight)[waits]
            thresholds[k] = _best_threshold(recorded.confidence[k, waits], gain, fee * float(weight[waits].sum()))
        if np.array_equal(before, thresholds):
            break
    return thresholds


def _best_threshold(confidence: NDArray[np.float64], gain: NDArray[np.float64], fee: float) -> float:
    """The threshold for which the gains of the samples at or above it sum to the least.

    `NEVER` when that sum does not undercut minus the fee for running the head at all.
    """
    if not len(confidence):
        return float(NEVER)
    order = np.argsort(-confidence, kind="stable")
    ranked, total = confidence[order], np.cumsum(gain[order])
    total[:-1][ranked[:-1] == ranked[1:]] = np.inf  # equal confidences leave together
    best = int(total.argmin())
    if total[best] + fee >= 0:
        return float(NEVER)
    if best + 1 == len(ranked):
        return float(ranked[best])
    middle = (ranked[best] + ranked[best + 1]) / 2
    return float(middle if middle > ranked[best + 1] else ranked[best])  # between neighbouring floats there is no middle


def prices(steps: int = 60) -> NDArray[np.float64]:
    """What an error may be worth, in units of the full network's cost, from high to low."""
    return np.geomspace(3000.0, 0.3, steps)


def price_path(recorded: Recorded, steps: int = 60) -> Iterator[NDArray[np.float64]]:
    """Yield thresholds from the safest (errors priced highest) to the cheapest, each started from the one before.

    The prices, in units of the full network's cost, are the same for every recording, so that paths over different
    samples can be compared step by step.
    """
    scale = float(recorded.reach_cost[-1])
    thresholds = np.full(len(recorded.confidence), NEVER)
    for price in prices(steps):
        thresholds = optimise(recorded, price * scale, thresholds)
        yield thresholds


def finer_price_path(recorded: Recorded) -> Iterator[NDArray[np.float64]]:
    """Yield the price path with three steps on the way from each of its settings to the next: a limit falls between prices."""
    before: NDArray[np.float64] | None = None
    for thresholds in price_path(recorded):
        yield from between(thresholds if before is None else before, thresholds)
        yield thresholds
        before = thresholds


def between(before: NDArray[np.float64], after: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield three settings on the way from one to another; an exit that only one of them has on stays as it is before."""
    both = (after < NEVER) & (before < NEVER)
    for share in (0.25, 0.5, 0.75):
        yield np.where(both, before + share * (np.where(both, after, 0.0) - np.where(both, before, 0.0)), before)


def patience_path(recorded: Recorded) -> Iterator[NDArray[np.float64]]:
    """Yield what asks K exits in a row to agree, then K - 1, … 1: the same for every exit, and all of them are run."""
    count = len(recorded.confidence)
    for agreed in range(count, 0, -1):
        yield np.full(count, float(agreed))


def common_path(recorded: Recorded, steps: int = 60) -> Iterator[NDArray[np.float64]]:
    """Yield one threshold for all exits, from 1 down to 0 in equal steps, 1/2 among them: for scores that all exits share out."""
    for threshold in np.linspace(1.0, 0.0, steps + 1):
        yield np.full(len(recorded.confidence), threshold)


def stricter_first(path: Iterable[NDArray[np.float64]], highest: float = 1.0) -> Iterator[NDArray[np.float64]]:
    """Yield a path's distinct settings, finely: stricter ones than its first, then each with steps on the way to the next.

    A search cannot tell settings apart that make no error on its own samples, and jumps between those that do; a test on
    other samples can. A setting is made stricter by moving its thresholds towards the highest that a score can be.
    """
    before: NDArray[np.float64] | None = None
    for thresholds in path:
        on = thresholds < NEVER
        if not on.any() or (before is not None and np.array_equal(before, thresholds)):
            continue
        if before is None:
            for share in np.geomspace(0.02, 0.8, 10):
                yield np.where(on, highest - (highest - thresholds) * share, NEVER)
        else:
            yield from between(before, thresholds)
        yield thresholds
        before = thresholds
