"""From what was learnt and audited to new heads and thresholds that are worth a trial. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exitify.adapt.prior import Shares, expected_shares, rare_classes, shift_of
from exitify.adapt.settings import Guards
from exitify.adapt.update import Classifier
from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import ExitSetting, Profile, SegmentTimes
from exitify.artifact.memory import Memory
from exitify.calibration.bounds import upper_bound
from exitify.calibration.calibrate import Outputs, disagreement_of, excess_error, exit_settings, recorded_outputs
from exitify.calibration.segment_times import shares_of_time
from exitify.calibration.thresholds import NEVER, Recorded, exits_taken, judge, price_path
from exitify.plan import Plan

Heads = tuple[Classifier, ...]
Rows = tuple[Sequence[NDArray[np.float32]], NDArray[np.float32]]
"""Features by exit, `(N, width)`, and the network's own logits, `(N, classes)`."""

PRICES = 30
CARES = (0.3, 1.0, 3.0)
"""How much an error in the artifact's memory counts beside one in the audits where thresholds are searched: each is tried."""
LITTLE = 1e-3
"""What the cost of remembered samples counts beside that of audits: hardly any of them will come."""
WORTHWHILE = 0.98
"""New heads must cost less than this share of those in use."""
SURENESS = 0.9
ERRORS = 1.28
"""How sure an estimate from the audits must be within its limit, and how many standard errors that is."""
SLACK = 0.005
"""How many more answers may differ from the network's than with the factory's heads, where the profile's promise does not say."""


@dataclass(frozen=True)
class Ruling:
    """Heads and when they answer.

    heads: One an exit of the plan. thresholds: `(K,)`, `NEVER` for exits that are off. left: What was left for rare classes; 1 is the
    factory's. rare: Classes that were rare when it was found; expected: What was then believed of the next answer, `(classes,)`; none where
    nothing was.
    """

    heads: Heads
    thresholds: NDArray[np.float64]
    left: float = 1.0
    rare: NDArray[np.bool_] | None = None
    expected: Shares | None = None

    def differs(self, factory: Factory, rows: Rows) -> NDArray[np.float64]:
        """1 where the answer is other than the network's own, for each row, else 0."""
        answers, outputs = factory.answers(self.heads, self.thresholds, rows)
        return (answers != outputs.labels).astype(float)


@dataclass(frozen=True)
class Factory:
    """What the artifact itself says: the heads, the profile and its promise, which the device holds on to."""

    plan: Plan
    profile: Profile
    ruling: Ruling
    temperatures: NDArray[np.float64]
    memory: Memory | None
    times: SegmentTimes | None = None

    @classmethod
    def of(cls, artifact: Artifact, profile: str, times: SegmentTimes | None = None) -> Factory:
        """The artifact's heads under one of its profiles.

        Args:
            times: How long segments take here; without them, multiply-adds stand for time.

        Raises:
            UnknownProfile: there is none of that name.
        """
        found, tensors = artifact.profile(profile), artifact.classifiers()
        points = artifact.plan.exits
        heads = tuple(Classifier(tensors[point.weight], tensors[point.bias]) for point in points)  # type: ignore[arg-type]
        settings = [found.exits[point.name] for point in points]
        thresholds = np.array([setting.threshold if setting.enabled else NEVER for setting in settings])
        temperatures = np.array([*(setting.temperature for setting in settings), found.final_temperature])
        return cls(artifact.plan, found, Ruling(heads, thresholds), temperatures, None if "1" in found.skip else artifact.memory, times)

    @property
    def is_proven(self) -> bool:
        """Whether the profile promises a rate at a confidence, which the device must then prove."""
        return self.profile.promise.kind == "risk"

    @property
    def limit(self) -> float:
        """Of answers that differ from the network's: of all, where that was promised; else of how many more they may be."""
        promise = self.profile.promise
        return promise.limit if promise.kind in ("risk", "max-drop") else SLACK

    def outputs(self, heads: Heads, rows: Rows) -> Outputs:
        """What every exit says with these heads; the network's own answer stands for the label."""
        features, full = rows
        said = np.empty((len(heads) + 1, *full.shape), np.float32)
        for k, (head, z) in enumerate(zip(heads, features)):
            np.matmul(z, head.weight.T, out=said[k])
            said[k] += head.bias
        said[-1] = full
        return Outputs(said, full.argmax(axis=1), mask=self.plan.mask(self.profile.skip))

    def answers(self, heads: Heads, thresholds: NDArray[np.float64], rows: Rows) -> tuple[NDArray[np.intp], Outputs]:
        """What these heads answer under these thresholds, `(N,)`, and all that every exit says."""
        outputs = self.outputs(heads, rows)
        taken = exits_taken(outputs.confidence(self.temperatures, self.profile.policy), thresholds)
        found: NDArray[np.intp] = outputs.logits.argmax(axis=2)[taken, np.arange(len(taken))]
        return found, outputs

    def searchable(self, outputs: Outputs, loss: NDArray[np.float64]) -> Recorded:
        """What thresholds are found on."""
        recorded = recorded_outputs(outputs, self.temperatures, self.plan, self.profile.policy, loss)
        if self.times is None:
            return recorded
        reach, heads = shares_of_time(self.plan, self.times, outputs.mask)
        return replace(recorded, reach_cost=reach, try_cost=heads)

    def settings(self, ruling: Ruling) -> dict[str, ExitSetting]:
        """A ruling's thresholds as a session takes them."""
        return exit_settings(self.plan, ruling.thresholds, self.temperatures)

    def shifted(self, heads: Heads, shift: NDArray[np.float32]) -> Heads:
        """Heads with a shift of their logits at their temperature, in their biases."""
        return tuple(Classifier(head.weight, head.bias + np.float32(t) * shift) for head, t in zip(heads, self.temperatures))


@dataclass(frozen=True)
class Proposal:
    """What a review found.

    in_use: What was in use. ruling: New heads and thresholds, None for none.
    cost, cost_now: Mean cost on the audits, in full networks, of these and of those in use.
    differs, differs_now: The shares of answers other than the network's. rare_drop: On the memory, by classes that are rarely seen.
    forgotten: Names of exits whose learning heads have forgotten too much of the memory. epoch: Of the learner, when it was begun.
    """

    in_use: Ruling
    ruling: Ruling | None
    cost: float
    cost_now: float
    differs: float
    differs_now: float
    rare_drop: float
    forgotten: tuple[str, ...]
    epoch: int = 0


def propose(factory: Factory, learnt: Heads, in_use: Ruling, shares: Shares, rows: Rows, guards: Guards, aim: float) -> Proposal:
    """The cheapest heads and thresholds that, as far as audits and memory tell, keep the profile's promise.

    On the audits: as few answers may differ from the network's that they are likely to be at most `aim` times a promised rate;
    without one, as few as with the factory's heads and thresholds, and hardly more within the estimate's error. On the memory: classes
    that are rarely seen are as often right but for `rare_drop`, and the others as `_Remembered.judge` says. Without a memory that is not
    known, and half of what was seen is believed.

    Args:
        learnt: Without any shift. in_use: To be cheaper than. shares: Of the classes, as seen. rows: Audited.
    """
    now = factory.outputs(in_use.heads, rows)
    differs_now, cost_now = judge(factory.searchable(now, disagreement_of(now, smooth=False)), in_use.thresholds)
    differed = factory.ruling.differs(factory, rows)
    memory, rare = factory.memory, rare_classes(shares)
    remembered = _Remembered(factory, memory) if memory is not None else None
    forgotten = remembered.forgotten(learnt, guards.forgetting) if remembered else ()
    best = Proposal(in_use, None, cost_now, cost_now, differs_now, differs_now, 0.0, forgotten)
    for left in guards.left_for_rare if remembered else (0.5,):
        expected = expected_shares(shares, left)
        heads = factory.shifted(learnt, shift_of(expected))
        outputs = factory.outputs(heads, rows)
        search, other = factory.searchable(outputs, disagreement_of(outputs)), disagreement_of(outputs, smooth=False)
        audited, everyone = search.confidence, np.arange(other.shape[1])
        searches = [remembered.beside(search, heads, rare, care) for care in CARES] if remembered else [search]
        for thresholds in (found for one in searches for found in price_path(one, PRICES)):
            leaves = exits_taken(audited, thresholds)
            cost, differs = float(search.cost(thresholds)[leaves].mean()), other[leaves, everyone]
            if cost >= best.cost or cost > WORTHWHILE * cost_now or not _keeps(factory, differs, differed, aim):
                continue
            drop, is_kept = remembered.judge(heads, thresholds, rare, guards.rare_drop) if remembered else (0.0, True)
            if is_kept:
                best = Proposal(
                    in_use, Ruling(heads, thresholds, left, rare, expected), cost, cost_now, float(differs.mean()), differs_now, drop, forgotten
                )
    return best


def _keeps(factory: Factory, differs: NDArray[np.float64], differed: NDArray[np.float64], aim: float) -> bool:
    if factory.is_proven:
        return upper_bound(int(differs.sum()), len(differs), SURENESS) <= aim * factory.limit
    more = differs - differed
    return bool(more.mean() <= 0 and more.mean() + ERRORS * more.std() / np.sqrt(len(more)) <= factory.limit)


class _Remembered:
    """The artifact's memory as outputs, and what the factory's heads make of it."""

    def __init__(self, factory: Factory, memory: Memory) -> None:
        self.factory, self.labels = factory, memory.labels.astype(np.int64)
        self.rows: Rows = [memory.features[point.name].astype(np.float32) for point in factory.plan.exits], memory.logits.astype(np.float32)
        self.right = self._right(factory.ruling.heads, factory.ruling.thresholds)

    def beside(self, search: Recorded, heads: Heads, rare: NDArray[np.bool_], care: float) -> Recorded:
        """Audits, and of the memory the rare classes: these count by their errors alone, `care` times as much."""
        outputs = self.factory.outputs(heads, self.rows)
        of_rare = np.flatnonzero(rare[self.labels])
        labelled = replace(outputs, labels=self.labels)
        ours = self.factory.searchable(outputs, excess_error(labelled, self.factory.temperatures)).select(of_rare)
        audited, held = search.loss.shape[1], len(of_rare)
        little = np.full(held, LITTLE * audited / max(held, 1))
        confidence = np.concatenate([search.confidence, ours.confidence], axis=1)
        loss = np.concatenate([search.loss, ours.loss * (care / LITTLE)], axis=1)
        return Recorded(confidence, loss, search.reach_cost, search.try_cost, np.concatenate([np.ones(audited), little]))

    def judge(self, heads: Heads, thresholds: NDArray[np.float64], rare: NDArray[np.bool_], most: float) -> tuple[float, bool]:
        """By how much answers to rare classes are right less often than the factory's; and whether these and the others are right often enough.

        Rare classes may lose `most`. So may the others where a rate is promised. Where accuracy is, they may lose half the limit: the factory's
        thresholds were found on these very samples, which flatters them by some tenths of a point.
        """
        lost = self.right.astype(float) - self._right(heads, thresholds)
        of_rare = rare[self.labels]
        drop, others = float(lost[of_rare].mean()) if of_rare.any() else 0.0, lost[~of_rare]
        if not len(others):
            return drop, drop <= most
        return drop, drop <= most and float(others.mean()) <= (most if self.factory.is_proven else 0.5 * self.factory.limit)

    def forgotten(self, learnt: Heads, limit: float) -> tuple[str, ...]:
        """Exits whose heads alone are right less often than the factory's, by more than the limit."""
        after, before = (self.factory.outputs(heads, self.rows).logits.argmax(axis=2) == self.labels for heads in (learnt, self.factory.ruling.heads))
        drops = before.mean(axis=1) - after.mean(axis=1)
        return tuple(point.name for point, drop in zip(self.factory.plan.exits, drops) if drop > limit)

    def _right(self, heads: Heads, thresholds: NDArray[np.float64]) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = self.factory.answers(heads, thresholds, self.rows)[0] == self.labels
        return right
