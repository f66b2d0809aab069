"""Which exits to have, and their thresholds: the search behind `--exits auto` with data.

What a run costs adds up over samples once thresholds are fixed: each sample pays for the exit that it takes and for the heads
tried on the way. So, for a price on errors, the best threshold of one exit given all others is found exactly (`thresholds.optimise`),
and exits that do not pay for their heads go off by themselves. That stops in a local optimum; here many partial choices are
kept side by side, from the first exit to the last, each completed by the best choice known so far (beam search with rollouts).
Of at most `EXACT_EXITS` exits every combination is tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitify.calibration.thresholds import NEVER, Recorded, exits_taken, judge, optimise, price_path, prices
from exitify.errors import CalibrationError

EXACT_EXITS = 3
"""Up to so many exits are searched exhaustively."""

EXACT_LEVELS = 100
"""Thresholds an exit that the exhaustive search tries, spread over the ranked confidences: all of them for as many samples."""

WIDTH, OPTIONS = 48, 6
"""How many partial choices the beam keeps, and how many thresholds of the next exit each is continued with, beside none."""

PRICES = prices()


@dataclass(frozen=True)
class Found:
    """The best thresholds found.

    thresholds: `(K,)`, `NEVER` for exits not chosen. loss, cost: Means over the samples.
    bound: No thresholds within the limit cost less (or, of a limited cost, lose less) than this; one could only by knowing of
        each sample which exit is right.
    is_exact: Whether every combination was tried.
    """

    thresholds: NDArray[np.float64]
    loss: float
    cost: float
    bound: float
    is_exact: bool

    @property
    def chosen(self) -> NDArray[np.intp]:
        """Which exits are on."""
        return np.flatnonzero(self.thresholds < NEVER)


@dataclass(frozen=True)
class Limit:
    """What must hold: a mean loss, or a mean cost, of at most so much; the other is made as small as can be."""

    loss: float | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        if (self.loss is None) == (self.cost is None):
            raise CalibrationError("a search needs one limit", "on the loss or on the cost")

    def holds(self, loss: Any, cost: Any) -> Any:
        """Whether a choice with these means is within the limit; of arrays, which."""
        return loss <= self.loss + 1e-12 if self.loss is not None else cost <= (self.cost or 0.0) + 1e-12

    def aim(self, loss: Any, cost: Any) -> Any:
        """What is to be small."""
        return cost if self.loss is not None else loss


def search(recorded: Recorded, limit: Limit, *, most_exits: int | None = None) -> Found:
    """Return the cheapest thresholds within a mean loss, or the best within a mean cost.

    Args:
        recorded: K exits, N samples. limit: What must hold on these samples.
        most_exits: How many may be on; None is all.

    Raises:
        CalibrationError: nothing is within the limit, not even the network without exits.
    """
    count = len(recorded.confidence)
    most = count if most_exits is None else min(most_exits, count)
    is_exact = count <= EXACT_EXITS
    choices = _every_choice(recorded, limit, most) if is_exact else _promising(recorded, limit, most)
    best, least, values = None, np.inf, (0.0, 0.0)
    nothing = np.full(count, NEVER)
    for thresholds in (nothing, *choices):
        loss, cost = judge(recorded, thresholds)
        if limit.holds(loss, cost) and limit.aim(loss, cost) < least - 1e-12:
            best, least, values = thresholds, limit.aim(loss, cost), (loss, cost)
    if best is None:
        cheapest = min(judge(recorded, thresholds)[1] for thresholds in (nothing, *choices))
        raise CalibrationError("no choice of exits is within the limit", f"the least mean cost found is {cheapest:.3f} of the network's")
    return Found(best, *values, lower_bound(recorded, limit), is_exact)


def lower_bound(recorded: Recorded, limit: Limit) -> float:
    """What no choice within the limit undercuts.

    The limit is priced (weak duality), and each sample then leaves where cost and priced loss are least, paying for no head but
    that one's: no thresholds know so well.
    """
    if limit.loss is not None:
        return float(least_costs(recorded, np.array([limit.loss]))[0])
    scale = PRICES * recorded.reach_cost[-1]
    return float(((_priced_omnisciently(recorded) - (limit.cost or 0.0)) / scale).max())  # a loss may be below that of the whole network


def least_costs(recorded: Recorded, losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """What no thresholds with these mean losses cost less than, `(S,)` as `losses`; by `lower_bound`."""
    priced = _priced_omnisciently(recorded)[:, None] - (PRICES * recorded.reach_cost[-1])[:, None] * losses
    return np.maximum(priced.max(axis=0), 0.0)


def _priced_omnisciently(recorded: Recorded) -> NDArray[np.float64]:
    """Mean of cost + price * loss at each price, where each sample leaves at its best exit."""
    cost = recorded.reach_cost.copy()
    cost[:-1] += recorded.try_cost
    best = [(cost[:, None] + price * recorded.loss).min(axis=0) for price in PRICES * recorded.reach_cost[-1]]
    return np.array([np.average(row, weights=recorded.weight) for row in best])


def _edge(held: list[bool], limit: Limit) -> int:
    """The last price, from high to low, whose errors are few enough; or the first whose cost is low enough."""
    within = [i for i, holds in enumerate(held) if holds]
    return (max(within) if limit.loss is not None else min(within)) if within else 0


# --- few exits: all combinations ------------------------------------------------------------------------------------


def levels(confidence: NDArray[np.float64], most: int = EXACT_LEVELS) -> NDArray[np.float64]:
    """Thresholds to try on one exit: between neighbouring confidences, at most so many, and `NEVER` first."""
    values = np.unique(confidence)[::-1]
    middles = np.append((values[:-1] + values[1:]) / 2, values[-1:])
    if len(middles) > most:
        middles = middles[np.linspace(0, len(middles) - 1, most).round().astype(int)]
    return np.concatenate(([NEVER], middles))


def _every_choice(recorded: Recorded, limit: Limit, most: int) -> list[NDArray[np.float64]]:
    """For each combination of the earlier exits' thresholds the best one of the last exit."""
    count = len(recorded.confidence)
    if count == 0:
        return []
    found: list[NDArray[np.float64]] = []
    best = np.inf
    for earlier in _combinations([levels(confidence) for confidence in recorded.confidence[:-1]]):
        for thresholds in _last_level(recorded, limit, earlier):
            if (thresholds < NEVER).sum() > most:
                continue
            loss, cost = judge(recorded, thresholds)
            if limit.holds(loss, cost) and limit.aim(loss, cost) < best:
                best = limit.aim(loss, cost)
                found.append(thresholds)
    return found


def _combinations(options: list[NDArray[np.float64]]) -> Iterator[NDArray[np.float64]]:
    if not options:
        yield np.empty(0)
        return
    for first in options[0]:
        for rest in _combinations(options[1:]):
            yield np.concatenate(([first], rest))


def _last_level(recorded: Recorded, limit: Limit, earlier: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """The earlier thresholds with no last exit, and with the best one there is given them."""
    last = len(earlier)
    without = np.append(earlier, NEVER)
    yield without
    taken = exits_taken(recorded.confidence, without)
    waits = taken > last
    everyone = np.arange(len(taken))
    weight = np.ones(len(taken)) if recorded.weight is None else recorded.weight
    cost_off = recorded.cost(without)
    loss = float((recorded.loss[taken, everyone] * weight).sum())
    cost = float((cost_off[taken] * weight).sum()) + float(recorded.try_cost[last] * weight[waits].sum())
    order = np.flatnonzero(waits)[np.argsort(-recorded.confidence[last, waits], kind="stable")]
    ranked = recorded.confidence[last, order]
    losses = loss + np.cumsum((recorded.loss[last, order] - recorded.loss[-1, order]) * weight[order])
    costs = cost + np.cumsum((recorded.reach_cost[last] - recorded.reach_cost[-1]) * weight[order])
    ends = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], len(ranked) > 0))
    total = weight.sum()
    allowed = ends[limit.holds(losses[ends] / total, costs[ends] / total)]
    if len(allowed):
        i = int(allowed[limit.aim(losses[allowed], costs[allowed]).argmin()])
        yield np.append(earlier, (ranked[i] + ranked[i + 1]) / 2 if i + 1 < len(ranked) else ranked[i])


# --- many exits: a beam ---------------------------------------------------------------------------------------------


def _promising(recorded: Recorded, limit: Limit, most: int) -> list[NDArray[np.float64]]:
    """Choices from coordinate search at all prices, and from beams at those prices around which the limit is met."""
    scale = float(recorded.reach_cost[-1])
    path = [_at_most(recorded, price * scale, thresholds, most) for price, thresholds in zip(PRICES, price_path(recorded))]
    held = [limit.holds(*judge(recorded, thresholds)) for thresholds in path]
    edge = _edge(held, limit)
    found = list(path)
    for i in range(max(edge - 2, 0), min(edge + 3, len(path))):
        incumbent = path[i]
        for _ in range(3):
            better = _beam(recorded, float(PRICES[i] * scale), incumbent, most)
            found += better
            values = [_priced(recorded, float(PRICES[i] * scale), thresholds) for thresholds in (incumbent, *better)]
            if int(np.argmin(values)) == 0:
                break
            incumbent = better[int(np.argmin(values)) - 1]
    within = sorted((thresholds for thresholds in found if limit.holds(*judge(recorded, thresholds))), key=lambda t: limit.aim(*judge(recorded, t)))
    return [*found, *(_to_the_limit(recorded, limit, thresholds) for thresholds in within[:4])]


def _priced(recorded: Recorded, price: float, thresholds: NDArray[np.float64]) -> float:
    loss, cost = judge(recorded, thresholds)
    return cost + price * loss


def _at_most(recorded: Recorded, price: float, thresholds: NDArray[np.float64], most: int) -> NDArray[np.float64]:
    """The thresholds with exits off, one after the other that are missed least, until no more than so many are on."""
    while (thresholds < NEVER).sum() > most:
        kept = [_only(recorded, price, thresholds, int(k)) for k in np.flatnonzero(thresholds < NEVER)]
        thresholds = min(kept, key=lambda found: _priced(recorded, price, found))
    return thresholds


def _only(recorded: Recorded, price: float, thresholds: NDArray[np.float64], without: int) -> NDArray[np.float64]:
    """The best thresholds of the exits that are on, less one, and of no other."""
    on = np.flatnonzero((thresholds < NEVER) & (np.arange(len(thresholds)) != without))
    found = np.full(len(thresholds), NEVER)
    found[on] = optimise(of_exits(recorded, on), price, thresholds[on])
    return found


def of_exits(recorded: Recorded, exits: NDArray[np.intp]) -> Recorded:
    """The recording of these exits alone."""
    rows = np.append(exits, len(recorded.confidence))
    return Recorded(recorded.confidence[exits], recorded.loss[rows], recorded.reach_cost[rows], recorded.try_cost[exits], recorded.weight)


def _beam(recorded: Recorded, price: float, incumbent: NDArray[np.float64], most: int) -> list[NDArray[np.float64]]:
    """Whole choices, from the first exit to the last; what is not decided yet is as in the incumbent."""
    count, samples = recorded.confidence.shape
    weight = np.ones(samples) if recorded.weight is None else recorded.weight
    leaving = (recorded.reach_cost[:, None] + price * recorded.loss) * weight
    later = _later(recorded, leaving, weight, incumbent)
    states = [(float(later[0].sum()), 0.0, np.full(count, NEVER), np.arange(samples))]
    for k in range(count):
        children: list[tuple[float, float, NDArray[np.float64], NDArray[np.intp]]] = []
        for _, paid, thresholds, waits in states:
            children.append((paid + float(later[k + 1, waits].sum()), paid, thresholds, waits))
            if (thresholds < NEVER).sum() >= most or not len(waits):
                continue
            order = waits[np.argsort(-recorded.confidence[k, waits], kind="stable")]
            ranked = recorded.confidence[k, order]
            left = np.cumsum(leaving[k, order])
            stays = np.append(np.cumsum(later[k + 1, order][::-1])[::-1][1:], 0.0)
            fee = float(recorded.try_cost[k] * weight[waits].sum())
            ends = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], True))
            value = left[ends] + stays[ends]
            for i in ends[_best_apart(value, OPTIONS)]:
                chosen = thresholds.copy()
                chosen[k] = (ranked[i] + ranked[i + 1]) / 2 if i + 1 < len(ranked) else ranked[i]
                now = paid + fee + float(left[i])
                children.append((now + float(stays[i]), now, chosen, order[i + 1 :]))
        states = sorted(children, key=lambda child: child[0])[:WIDTH]
    found = []
    for _, _, thresholds, _ in states[:8]:
        on = np.flatnonzero(thresholds < NEVER)
        polished = np.full(count, NEVER)
        polished[on] = optimise(of_exits(recorded, on), price, thresholds[on]) if len(on) else NEVER
        found += [thresholds, polished]
    return found


def _later(recorded: Recorded, leaving: NDArray[np.float64], weight: NDArray[np.float64], incumbent: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each sample pays from exit k on when it comes by there and the incumbent decides, `(K + 1, N)`."""
    count, samples = recorded.confidence.shape
    later = np.empty((count + 1, samples))
    later[count] = leaving[count]
    for k in reversed(range(count)):
        later[k] = later[k + 1]
        if incumbent[k] < NEVER:
            takes = recorded.confidence[k] >= incumbent[k]
            later[k] = np.where(takes, leaving[k], later[k + 1]) + recorded.try_cost[k] * weight
    return later


def _best_apart(value: NDArray[np.float64], most: int) -> NDArray[np.intp]:
    """Places of the least value in each of so many stretches."""
    parts = np.array_split(np.arange(len(value)), min(most, len(value)))
    return np.array([part[value[part].argmin()] for part in parts], np.intp)


def _to_the_limit(recorded: Recorded, limit: Limit, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The thresholds moved, one at a time, to the best that the limit allows, until none moves: prices alone leave some of it unused."""
    best = thresholds.copy()
    least = limit.aim(*judge(recorded, best))
    for _ in range(5):
        before = least
        for k in np.flatnonzero(best < NEVER):
            for value in levels(recorded.confidence[k], 200):
                tried = best.copy()
                tried[k] = value
                loss, cost = judge(recorded, tried)
                if limit.holds(loss, cost) and limit.aim(loss, cost) < least - 1e-12:
                    best, least = tried, limit.aim(loss, cost)
        if least >= before - 1e-12:
            break
    return best


# --- what each exit is worth ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worth:
    """What an exit does for the mean.

    leaves: Share of the samples that take it. comes_by: Share that its head is run for.
    saves: Mean cost that those who leave would have paid further on. costs: Mean cost of running its head.
    """

    leaves: float
    comes_by: float
    saves: float
    costs: float


def worths(recorded: Recorded, thresholds: NDArray[np.float64]) -> list[Worth]:
    """What each exit does under these thresholds, the others left as they are; zeros where it is off."""
    taken = exits_taken(recorded.confidence, thresholds)
    weight = np.ones(len(taken)) if recorded.weight is None else recorded.weight
    total = weight.sum()
    found = []
    for k, threshold in enumerate(thresholds):
        if threshold >= NEVER:
            found.append(Worth(0.0, 0.0, 0.0, 0.0))
            continue
        without = thresholds.copy()
        without[k] = NEVER
        leaves, comes_by = taken == k, taken >= k
        further = recorded.cost(without)[exits_taken(recorded.confidence, without)]
        now = recorded.cost(without)[k]
        saved = float(((further - now) * weight)[leaves].sum() / total)
        fee = float(recorded.try_cost[k] * weight[comes_by].sum() / total)
        found.append(Worth(float(weight[leaves].sum() / total), float(weight[comes_by].sum() / total), saved, fee))
    return found


def best_added(recorded: Recorded, thresholds: NDArray[np.float64], limit: Limit, exits: Iterable[int]) -> dict[int, Worth]:
    """Of exits that are off, what each would do where it saves most within the limit, the others left as they are.

    Within a cost it is where it saves most without more loss.
    """
    taken = exits_taken(recorded.confidence, thresholds)
    everyone = np.arange(len(taken))
    weight = np.ones(len(taken)) if recorded.weight is None else recorded.weight
    total = weight.sum()
    cost = recorded.cost(thresholds)
    loss = float((recorded.loss[taken, everyone] * weight).sum() / total)
    allowed = max(limit.loss, loss) if limit.loss is not None else loss
    found: dict[int, Worth] = {}
    for k in exits:
        waits = np.flatnonzero(taken > k)
        order = waits[np.argsort(-recorded.confidence[k, waits], kind="stable")]
        saved = np.cumsum((cost[taken[order]] - cost[k]) * weight[order]) / total
        lost = loss + np.cumsum((recorded.loss[k, order] - recorded.loss[taken[order], order]) * weight[order]) / total
        ranked = recorded.confidence[k, order]
        fits = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], len(ranked) > 0) & (lost <= allowed + 1e-12) & (saved > 0))
        if not len(fits):
            found[k] = Worth(0.0, 0.0, 0.0, 0.0)
            continue
        i = int(fits[saved[fits].argmax()])
        comes_by = float(weight[waits].sum() / total)
        found[k] = Worth(float(weight[order[: i + 1]].sum() / total), comes_by, float(saved[i]), float(recorded.try_cost[k]) * comes_by)
    return found
