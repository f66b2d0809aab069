"""What a profile does with samples: who leaves where, what that costs, and whether the answers are right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exitify.artifact.manifest import Profile, SegmentTimes
from exitify.calibration.calibrate import Outputs
from exitify.calibration.segment_times import run_times
from exitify.calibration.thresholds import exits_taken
from exitify.plan import Plan
from exitify.report.evidence import Evidence, only
from exitify.runtime.policies import softmax


@dataclass(frozen=True)
class Behaviour:
    """A profile over N samples. Exits are numbers in the plan's order, K the network's own.

    taken: `(N,)`, where each leaves. answers: `(N,)`, the class it is given. labels: `(N,)`.
    full: `(N,)`, what the whole network answers, nothing left out. sureness: `(N,)`, the policy's score where it leaves; at the
    network's own exit the largest probability. probability: `(N,)`, of the answer.
    macs: `(K + 1,)`, of a run that ends at each exit, heads on the way counted, as shares of the full network's; NaN where none can end.
    ms: `(K + 1,)`, the same in milliseconds; None where segments were not timed.
    """

    taken: NDArray[np.intp]
    answers: NDArray[np.intp]
    labels: NDArray[np.int64]
    full: NDArray[np.intp]
    sureness: NDArray[np.float64]
    probability: NDArray[np.float64]
    macs: NDArray[np.float64]
    ms: NDArray[np.float64] | None

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each answer is the label, `(N,)`."""
        return np.asarray(self.answers == self.labels)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.mean())

    @property
    def full_accuracy(self) -> float:
        """The same of the whole network's."""
        return float((self.full == self.labels).mean())

    @property
    def drop_error(self) -> float:
        """Standard error of the difference of both, which are of the same samples."""
        lost = (self.full == self.labels).astype(float) - self.right
        return float(lost.std() / np.sqrt(len(lost)))

    @property
    def disagreement(self) -> float:
        """Share of answers other than the whole network's."""
        return float((self.answers != self.full).mean())

    @property
    def mean_macs(self) -> float:
        """Mean multiply-adds of an answer, as a share of the full network's."""
        return float(self.macs[self.taken].mean())

    @property
    def most_macs(self) -> float:
        """The same of the longest way, past every head that runs."""
        return float(np.nanmax(self.macs))

    def mean_ms(self) -> float:
        """Mean milliseconds of an answer, by times of segments; where these were measured."""
        assert self.ms is not None
        return float(self.ms[self.taken].mean())

    def shares(self, rows: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Share of the samples, or of these rows, that leave at each exit, `(K + 1,)`; zeros of none."""
        taken = self.taken if rows is None else self.taken[rows]
        return np.bincount(taken, minlength=len(self.macs)) / max(len(taken), 1)


def behaviour(plan: Plan, profile: Profile, evidence: Evidence, times: SegmentTimes | None = None) -> Behaviour:
    """What a profile does with the samples that the evidence is of.

    Args:
        times: Of the segments, for milliseconds.
    """
    outputs, temperatures = evidence.outputs, evidence.temperatures
    enabled = [k for k, point in enumerate(plan.exits) if profile.exits[point.name].enabled]
    settings = [profile.exits[plan.exits[k].name] for k in enabled]
    kept = only(outputs, enabled)
    confidence = kept.confidence(temperatures[enabled], profile.policy, [setting.gate for setting in settings])
    found = exits_taken(confidence, np.array([setting.threshold for setting in settings]))
    everyone, last = np.arange(len(found)), len(plan.exits)
    own_exit = softmax(outputs.logits[last], float(temperatures[-1])).max(axis=1)
    sureness = np.vstack([confidence, own_exit])[found, everyone]
    taken = np.array([*enabled, last])[found]
    logits = outputs.logits[taken, everyone]
    probability = softmax(logits / temperatures[taken][:, None]).max(axis=1)
    return Behaviour(
        taken, logits.argmax(axis=1), outputs.labels, outputs.full.argmax(axis=1), sureness, probability, *costs(plan, profile, outputs, times)
    )


def costs(plan: Plan, profile: Profile, outputs: Outputs, times: SegmentTimes | None) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """What a run that ends at each exit costs under a profile, `(K + 1,)`: multiply-adds as shares of the network's, and milliseconds."""
    reach = plan.macs_at(profile.enabled, outputs.mask or None)
    macs = np.array([reach.get(name, np.nan) for name in plan.exit_names]) / plan.full_macs
    if times is None:
        return macs, None
    found = run_times(plan, times, profile.enabled, outputs.mask)
    return macs, np.array([found.get(name, np.nan) for name in plan.exit_names])


def exit_accuracy(outputs: Outputs) -> NDArray[np.float64]:
    """How often each exit is right when all samples are answered there, `(K + 1,)`."""
    return np.asarray((outputs.logits.argmax(axis=2) == outputs.labels).mean(axis=1))
