"""How a device learns, and what keeps that from doing harm: the settings of the guard rails. docs/specialization.md says why they are there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from exitify.adapt.update import Sgd
from exitify.errors import DataError


@dataclass(frozen=True)
class Guards:
    """The guard rails.

    gate: Nothing is learnt from an answer whose probability is less than this.
    most_drift: How far a head may move from the artifact's own, over that one's size.
    left_for_rare: What is left for all classes alike whatever was seen, in [0, 1]; each of these is tried.
    rare_drop: On the artifact's memory, by how much answers may be right less often for classes that are rarely seen, or for the others.
    forgetting: On the artifact's memory, by how much a head that learns may be right less often, before it goes back.
    audit: Share of inputs that go on to the network's end to see what it says. audit_first: At answer n it is at least this over n.
    audit_trial: The share while new heads are on trial.
    audits_kept: Audited runs that thresholds are found on.
    review_every: Answers between two looks at what was learnt, at first; later half as many as there were until then.
    trust_factory: Whether a promised rate is taken to hold for what this device sees. If not, no exit is taken until one is proven here, and
        until then all inputs are audited.
    aim: New thresholds are likely to have at most this share of the disagreement that a `risk` profile allows, so that it can be proven.
    trial_error: The chance to take new heads into use that break the promise, all trials of a state together.
    alarm_error: Of a false alarm, for each audited input, where the promise is only just kept.
    """

    gate: float = 0.5
    most_drift: float = 0.5
    left_for_rare: tuple[float, ...] = (0.6, 0.4, 0.3, 0.2, 0.1)
    rare_drop: float = 0.01
    forgetting: float = 0.03
    audit: float = 0.05
    audit_first: int = 200
    audit_trial: float = 0.2
    audits_kept: int = 1000
    review_every: int = 500
    trust_factory: bool = True
    aim: float = 0.6
    trial_error: float = 0.02
    alarm_error: float = 0.001

    def __post_init__(self) -> None:
        shares = {
            name: getattr(self, name) for name in ("gate", "rare_drop", "forgetting", "audit", "audit_trial", "aim", "trial_error", "alarm_error")
        }
        for name, share in (*shares.items(), *(("left_for_rare", one) for one in self.left_for_rare)):
            if not 0 <= share <= 1:
                raise DataError(f"{name} {share:g} is no share", "give a number from 0 to 1")
        if not (self.audit > 0 and self.left_for_rare and min(self.left_for_rare) > 0 and self.trial_error > 0 and self.alarm_error > 0):
            problem = "without audits, chances of error and something left for rare classes nothing can be known of new heads"
            raise DataError(problem, "give audit, both errors and left_for_rare above 0")
        if min(self.audits_kept, self.review_every) < 50 or self.audit_first < 0 or not self.most_drift > 0:
            raise DataError("audits_kept and review_every are at least 50, audit_first at least 0, most_drift above 0", "see exitify.adapt.settings")


@dataclass(frozen=True)
class Learning:
    """How heads learn, the paper's way by default (Leroux et al., section 4.2: SGD, 1e-4, one sample at a time).

    targets: The deeper exit's class alone, or its probabilities. batch: Answers a step. half_life: Answers after which what was seen counts half.
    guards: None for none of them: what is learnt is in use at once, under the thresholds of the profile.
    """

    sgd: Sgd = field(default_factory=Sgd)
    targets: Literal["hard", "soft"] = "hard"
    batch: int = 1
    half_life: float = 5000.0
    guards: Guards | None = field(default_factory=Guards)

    def __post_init__(self) -> None:
        if self.batch < 1 or not self.half_life > 0:
            raise DataError(f"a batch of {self.batch} and a half-life of {self.half_life:g} are none", "give numbers above 0")
