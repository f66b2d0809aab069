"""Heads that learn from deeper exits while a device answers, and the decisions around that: what is learnt from, when new heads are worth a
trial, when they are taken into use, and when all goes back.

The heads that learn are never those that answer. Every so often what was learnt is frozen, with thresholds found for it; under a
profile that promises a rate it is then held against audited inputs that came after it was frozen, until it is proven or dropped;
and what is in use is watched by the audits from then on. docs/specialization.md has the argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exitify.adapt.audits import Audits
from exitify.adapt.betting import Bet
from exitify.adapt.prior import SeenClasses, Shares, expected_shares, shift_of
from exitify.adapt.review import SURENESS, Factory, Heads, Proposal, Ruling, propose
from exitify.adapt.settings import Guards, Learning
from exitify.adapt.update import Classifier, Velocity, softmax, step, targets_of
from exitify.artifact.artifact import NO_PROFILE, Artifact
from exitify.artifact.manifest import ExitSetting, SegmentTimes
from exitify.calibration.bounds import upper_bound
from exitify.calibration.thresholds import NEVER
from exitify.errors import StateError
from exitify.runtime.answers import Trace

Array = NDArray[np.float32]
Stage = Literal["learning", "stopped"]

MARGIN, LEAST_MARGIN = 1.5, 0.02
"""Classes believed rare are other classes when they come this much oftener than expected: 1.5 times and 2 % of the answers more."""
OF_EVERY_ANSWER = 0.01
"""What of the audits' chance of a false alarm each answer has, which are many more."""
DRIFT_EVERY = 64
"""Steps of a head between two looks at how far it has moved."""
AUDIT_CONFIDENCE = 0.95
LEARNT_BY = ("top1", "margin")
"""Policies under which a device learns: scores that end at 1, each exit's for itself. What is moved towards 1 is stricter."""
STRICTER = 0.5
"""What a threshold keeps of its distance to 1 when a promise is broken."""
FEWEST_TRIED = 200
HOPELESS = 0.7
"""After `FEWEST_TRIED` audited inputs, a trial that differs in more than this share of the limit is given up: to prove it would take thousands."""
LONGEST_TRIAL = 4000
"""Audited inputs after which a trial is given up."""
FORGIVEN = 3
"""How often heads that learn may forget the memory and begin again; then they learn no more."""
PATIENCE = 0.75
"""What the aim is multiplied with after a trial that proved nothing."""


@dataclass
class _Pupil:
    """A head that learns.

    waiting: Read and not yet learnt from. steps: Made since the last look at its drift. is_own: Whether nobody else holds the head;
    spare: The weight before it, whose memory the next one may take.
    """

    name: str
    head: Classifier
    factory: Classifier
    temperature: np.float32
    velocity: Velocity | None = None
    waiting: list[tuple[Array, Array]] = field(default_factory=list)
    steps: int = 0
    is_own: bool = False
    spare: Array | None = None


@dataclass(frozen=True)
class Trial:
    """Heads that are held against audits. number: Of the trial, from 1. needed: The evidence that proves them."""

    number: int
    proposal: Proposal
    ruling: Ruling
    bet: Bet
    needed: float


@dataclass(frozen=True)
class AtExit:
    """Audited answers given at an exit. differed: Otherwise than the network. at_most: The rate of that, at 95 % (Clopper-Pearson)."""

    answers: int
    differed: int
    at_most: float


@dataclass(frozen=True)
class Happening:
    """Something that was decided, with its figures. exit: That it concerns, empty for all."""

    what: str
    reason: str
    exit: str = ""


class Learner:
    """What learns, and decides. Not for several threads at once; `LearningSession` sees to that.

    in_use: The heads and thresholds that answer. first: Those it began with.
    updates: Steps that the heads that learn have had. answers: Seen; learnt_from, audited: Of these; differed: Of the audited, answered
    otherwise than by the network.
    """

    def __init__(
        self,
        artifact: Artifact,
        profile: str,
        how: Learning | None = None,
        *,
        times: SegmentTimes | None = None,
        seed: int = 0,
        happened: Callable[[Happening], None] | None = None,
    ) -> None:
        """Begin with the artifact's own heads.

        Args:
            times: How long segments take here; without them, multiply-adds stand for time.

        Raises:
            UnknownProfile: there is none of that name. StateError: this profile's exits cannot learn.
        """
        if profile == NO_PROFILE or not artifact.plan.exits:
            raise StateError("nothing can be learnt without exits and a profile", "`exitify calibrate` makes one")
        tied = [point.name for point in artifact.plan.exits if point.previous]
        if tied:
            raise StateError(
                f"the heads of {', '.join(tied)} read what earlier exits say: to change one changes the others", "transform with `--cascade none`"
            )
        self.factory, self.how = Factory.of(artifact, profile, times), how or Learning()
        if "1" in self.factory.profile.skip:
            raise StateError(
                f"the profile {profile!r} leaves blocks out, and what it promises cannot be seen then", "learn with a profile that does not"
            )
        policy = artifact.profile(profile).policy
        if policy not in LEARNT_BY:
            raise StateError(
                f"the profile {profile!r} decides by {policy}, and a device learns under {', '.join(LEARNT_BY)}",
                "calibrate one: exitify calibrate --profile",
            )
        promise = artifact.profile(profile).promise
        if promise.kind == "max-drop" and promise.confidence:
            raise StateError(
                f"the profile {profile!r} was proven to keep its accuracy, which a device without labels cannot prove again",
                "calibrate one to learn under: --max-drop alone, or --risk-of disagreement",
            )
        if artifact.profile(profile).conformal is not None:
            raise StateError(
                f"the profile {profile!r} has sets of classes, which hold for its heads as they were calibrated",
                "calibrate one without --prediction-sets",
            )
        self.guards: Guards | None = self.how.guards
        self.first = self.factory.ruling
        if self.guards and self.factory.is_proven and not self.guards.trust_factory:
            self.first = replace(self.first, thresholds=np.full_like(self.first.thresholds, NEVER))
        self.in_use = self.first
        self.stage: Stage = "learning"
        self.answers = self.updates = self.learnt_from = self.trials = self.audited = self.differed = 0
        self.trial: Trial | None = None
        self.epoch = 0
        self.seen = SeenClasses(artifact.plan.classes, self.how.half_life)
        self._names = [point.name for point in artifact.plan.exits]
        temperatures = self.factory.temperatures.astype(np.float32)
        self._pupils = {name: _Pupil(name, head, head, t) for name, head, t in zip(self._names, self.factory.ruling.heads, temperatures)}
        self._final_temperature = float(temperatures[-1])
        self._random = np.random.default_rng(seed)
        self._happened = happened or (lambda _: None)
        self.broken = self.forgot = self._begun = 0
        self.aim = self.guards.aim if self.guards else 1.0
        self._next_review = self.guards.review_every if self.guards else 0
        self._shift = np.zeros(artifact.plan.classes, np.float32)
        self.audits = Audits(artifact.plan, self.guards.audits_kept if self.guards else 1)
        self._at_exits = {name: [0, 0] for name in self._names}
        self._alarm = self._new_alarm()
        self._rare: Bet | None = None

    @property
    def learnt(self) -> Heads:
        """The heads that learn, one an exit."""
        for pupil in self._pupils.values():
            pupil.is_own = False
        return tuple(self._pupils[name].head for name in self._names)

    @property
    def tensors(self) -> dict[str, Array]:
        """The classifiers in use, as a session takes them."""
        found: dict[str, Array] = {}
        for point, head in zip(self.factory.plan.exits, self.in_use.heads):
            found[point.weight], found[point.bias] = head.weight, head.bias
        return found

    @property
    def settings(self) -> dict[str, ExitSetting]:
        """The thresholds in use, as a session takes them."""
        return self.factory.settings(self.in_use)

    def at_exits(self) -> dict[str, AtExit]:
        """What audits have seen of the answers given at each exit, since what is in use is in use."""
        return {
            name: AtExit(answers, differed, upper_bound(differed, answers, AUDIT_CONFIDENCE) if answers else 1.0)
            for name, (answers, differed) in self._at_exits.items()
        }

    def wants_audit(self) -> bool:
        """Whether the next input is to go on to the end. Drawn before it is seen, so that audited inputs are inputs like all."""
        if self.guards is None:
            return False
        if not (self.in_use.thresholds < NEVER).any():
            return True  # it goes to the end anyway
        share = self.guards.audit_trial if self.trial else self.guards.audit
        return self._random.random() < max(share, self.guards.audit, self.guards.audit_first / (self.answers - self._begun + 1))

    def observe(self, trace: Trace, *, audited: bool) -> bool:
        """Learn from a run. Returns whether heads or thresholds in use have changed.

        audited: Whether it went on to the end because `wants_audit` said so.
        """
        before = self.in_use
        self.answers += 1
        target = trace.answer.logits if trace.full is None else trace.full
        visits = [visit for visit in trace.visits if trace.full is not None or visit.exit != trace.answer.exit]
        at = self._final_temperature if trace.full is not None else trace.answer.temperature
        sure = softmax(target / np.float32(at))
        if audited and trace.full is not None and self.guards is not None:
            self._audit(trace)
        label = int(target.argmax())
        if self.guards is None or sure[label] >= self.guards.gate:
            self.seen.add(label)
            self._watch_classes(label)
            if self.stage == "learning" and visits:
                self.learnt_from += 1
                wanted = targets_of(target, "hard") if self.how.targets == "hard" else sure
                for visit in visits:
                    self._teach(self._pupils[visit.exit], visit.features, wanted)
                if self.guards is None:
                    self.in_use = replace(self.in_use, heads=self.learnt)
        return self.in_use is not before

    def wants_review(self) -> bool:
        """Whether it is time to look at what was learnt."""
        if self.guards is None or self.stage != "learning" or self.trial is not None or self.answers < self._next_review:
            return False
        return len(self.audits) >= self._fewest_audits()

    def review(self) -> Callable[[], Proposal]:
        """Freeze what was learnt. What is returned looks for heads and thresholds; it takes long, and may be called in another thread."""
        assert self.guards is not None
        known_for = self.answers - self._begun  # what is long known changes slowly
        self._next_review = self.answers + max(self.guards.review_every, known_for // 2)
        shares: Shares = self.seen.shares
        self._shift = shift_of(expected_shares(shares, min(self.guards.left_for_rare)))
        learnt, in_use, rows, guards, aim, epoch = self.learnt, self.in_use, self.audits.rows(), self.guards, self.aim, self.epoch
        return lambda: replace(propose(self.factory, learnt, in_use, shares, rows, guards, aim), epoch=epoch)

    def consider(self, found: Proposal) -> bool:
        """What a review found: begin a trial, or take it into use where no rate was promised. Returns whether what is in use has changed."""
        assert self.guards is not None
        if found.epoch != self.epoch:
            return False  # of heads that are gone
        for name in found.forgotten:
            self._forget(self._pupils[name])
        if found.forgotten:
            self.forgot += 1
            reason = f"more than {self.guards.forgetting:.0%} of what the artifact remembers is answered wrongly by the head that learns"
            self._say("rollback", reason, *found.forgotten)
            if self.forgot >= FORGIVEN:
                self.stage = "stopped"
                self._say("updates off", f"what was learnt was forgotten {self.forgot} times")
            return False
        if found.ruling is None or self.stage != "learning" or self.trial is not None or found.in_use is not self.in_use:
            return False
        figures = (
            f"cost {found.cost:.3f} after {found.cost_now:.3f}, other answers {found.differs:.2%} after {found.differs_now:.2%}, "
            f"{found.ruling.left:.0%} left for rare classes, whose answers fall by {found.rare_drop:.2%}"
        )
        if not self.factory.is_proven:
            self._use(found.ruling)
            self._say("in use", f"on {len(self.audits)} audited inputs: {figures}")
            return True
        self.trials += 1
        needed = self.trials * (self.trials + 1) / self.guards.trial_error
        self.trial = Trial(self.trials, found, found.ruling, Bet(self.factory.limit), needed)
        self._say("trial", f"number {self.trials}: {figures}; evidence of {needed:.0f} proves it")
        return False

    def roll_back(self, reason: str, ruling: Ruling | None = None) -> None:
        """Answer with older heads again, by default those of the beginning, and learn on from the factory's."""
        for pupil in self._pupils.values():
            self._forget(pupil)
        self.trial, self.updates = None, 0
        self.epoch += 1
        self._use(ruling or self.first)
        self._say("rollback", reason)

    def resume(
        self,
        in_use: Ruling | None,
        learnt: Mapping[str, Classifier],
        counts: NDArray[np.float64],
        *,
        answers: int,
        updates: int,
        trials: int,
        stage: Stage,
        broken: int = 0,
        forgot: int = 0,
        aim: float | None = None,
    ) -> None:
        """Go on where a state ended. What was audited, and a trial that was under way, are not in a state: the first inputs are audited again."""
        for name, head in learnt.items():
            self._forget(self._pupils[name])
            self._pupils[name].head = head  # somebody else's until the next step
        self.seen = SeenClasses(len(self.seen.counts), self.how.half_life, counts)
        self.answers, self.updates, self.trials, self.stage, self.trial = answers, updates, trials, stage, None
        self.broken, self.forgot, self.aim = broken, forgot, aim or self.aim
        self._begun = answers
        self.epoch += 1
        if self.guards is not None and counts.any():
            self._shift = shift_of(expected_shares(self.seen.shares, min(self.guards.left_for_rare)))
        self._next_review = answers + (self.guards.review_every if self.guards else 0)
        self.audits.clear()
        self._use(in_use or self.first)
        if in_use is not None and self._is_factory():
            self.first = self.in_use

    def _watch_classes(self, label: int) -> None:
        """Whether classes come that were rare when what is in use was found: of every answer that is sure enough, so that it is soon seen."""
        rare = self.in_use.rare
        if self.guards is None or self._rare is None or rare is None:
            return
        self._rare.add(float(rare[label]))
        if self._rare.evidence >= 1.0 / (self.guards.alarm_error * OF_EVERY_ANSWER):
            reason = f"{self._rare.mean:.1%} of {self._rare.samples} answers are classes of which {self._rare.limit:.1%} were expected"
            self._use(self.first)
            self.trial, self._begun, self._next_review = None, self.answers, self.answers + self.guards.review_every
            self.epoch += 1
            self._shift = np.zeros_like(self._shift)
            self.audits.clear()
            self.seen = SeenClasses(len(rare), self.how.half_life)
            self._say("rollback", f"other classes are seen: {reason}")

    def _teach(self, pupil: _Pupil, features: Array, wanted: Array) -> None:
        pupil.waiting.append((features, wanted))
        if len(pupil.waiting) < self.how.batch:
            return
        if self.how.batch == 1:
            z, targets = features[None], wanted[None]
        else:
            z, targets = (np.array(column) for column in zip(*pupil.waiting))
        pupil.waiting.clear()
        logits = z @ pupil.head.weight.T + pupil.head.bias
        if self.guards is not None:
            logits = logits / pupil.temperature + self._shift
        before = pupil.head
        pupil.head, pupil.velocity = step(before, z, logits, targets, self.how.sgd, pupil.velocity, pupil.spare)
        pupil.spare = before.weight if pupil.is_own and before.weight is not pupil.head.weight else None
        pupil.is_own = True
        self.updates += 1
        pupil.steps += 1
        if self.guards is not None and pupil.steps >= DRIFT_EVERY:
            pupil.steps = 0
            self._bound(pupil, self.guards.most_drift)

    def check_heads(self) -> None:
        """Bring every head that learns within its bounds now."""
        if self.guards is not None:
            for pupil in self._pupils.values():
                self._bound(pupil, self.guards.most_drift)

    def _bound(self, pupil: _Pupil, most: float) -> None:
        """Bring a head that has moved too far back to the edge."""
        if not pupil.head.is_finite:
            self._forget(pupil)
            self._say("rollback", "its head, as it learns, holds a number that is not finite", pupil.name)
            return
        drift = pupil.head.distance(pupil.factory)
        if drift > most:
            keep = np.float32(most / drift)
            weight = pupil.factory.weight + keep * (pupil.head.weight - pupil.factory.weight)
            pupil.head, pupil.velocity = Classifier(weight, pupil.factory.bias + keep * (pupil.head.bias - pupil.factory.bias)), None

    def _forget(self, pupil: _Pupil) -> None:
        pupil.head, pupil.velocity, pupil.steps, pupil.is_own, pupil.spare = pupil.factory, None, 0, False, None
        pupil.waiting.clear()

    def _audit(self, trace: Trace) -> None:
        assert trace.full is not None
        assert self.guards is not None
        features = {visit.exit: visit.features for visit in trace.visits}
        differs = trace.answer.label != int(trace.full.argmax())
        self.audited += 1
        self.differed += differs
        if not np.isfinite(trace.full).all() or not all(np.isfinite(array).all() for array in features.values()):
            return  # an absurd input; the audited rows are what thresholds are searched on
        self.audits.add(features, trace.full)
        if trace.answer.exit in self._at_exits:
            counts = self._at_exits[trace.answer.exit]
            counts[0] += 1
            counts[1] += differs
        rows = [features[name][None] for name in self._names], trace.full[None]
        watched = float(differs)
        if not self.factory.is_proven:
            watched -= float(self.factory.ruling.differs(self.factory, rows)[0])
        self._alarm.add(watched)
        if self._alarm.evidence >= 1.0 / self.guards.alarm_error:
            what = "answered otherwise than by the network" if self.factory.is_proven else "more than with the factory's heads answered otherwise"
            self._broken_again(f"{self._alarm.mean:.2%} {what} in {self._alarm.samples} audited inputs, at most {self.factory.limit:.2%} promised")
            return
        if self.trial:
            self._try(self.trial, float(self.trial.ruling.differs(self.factory, rows)[0]))

    def _try(self, trial: Trial, differs: float) -> None:
        trial.bet.add(differs)
        figures = f"number {trial.number}: {trial.bet.mean:.2%} of {trial.bet.samples} audited inputs answered otherwise"
        if trial.bet.evidence >= trial.needed:
            self.trial, self.aim = None, self.guards.aim if self.guards else 1.0
            self._use(trial.ruling)
            self._say(
                "in use", f"{figures}, at most {self.factory.limit:.2%} proven; cost {trial.proposal.cost:.3f} after {trial.proposal.cost_now:.3f}"
            )
        elif trial.bet.samples >= LONGEST_TRIAL or (trial.bet.samples >= FEWEST_TRIED and trial.bet.mean > HOPELESS * self.factory.limit):
            self.trial, self.aim = None, max(self.aim * PATIENCE, self._least_aim())
            self._say("dropped", f"{figures}, which does not prove {self.factory.limit:.2%}")

    def _broken_again(self, reason: str) -> None:
        """The next rung: stricter thresholds, no more updates, back to the factory's heads; these too become stricter, and at last take no exit."""
        self.broken += 1
        self.trial = None
        self._alarm = self._new_alarm()
        is_factory = self._is_factory()
        if self.broken == 1 or is_factory:
            off = self.broken > 3
            thresholds = np.where(self.in_use.thresholds < NEVER, 1 - (1 - self.in_use.thresholds) * STRICTER, NEVER)
            self.in_use = replace(self.in_use, thresholds=np.full_like(thresholds, NEVER) if off else thresholds)
            if is_factory:
                self.first = self.in_use  # whatever goes back goes back to these
            self._say("exits off" if off else "thresholds up", reason)
        elif self.broken == 2:
            self.stage = "stopped"
            self._say("updates off", reason)
        else:
            self.stage = "stopped"
            self.roll_back(reason)

    def _is_factory(self) -> bool:
        return all(ours.is_same(theirs) for ours, theirs in zip(self.in_use.heads, self.factory.ruling.heads))

    def _use(self, ruling: Ruling) -> None:
        self.in_use, self._rare = ruling, None
        if ruling.rare is not None and ruling.expected is not None and ruling.rare.any():
            expected = float(ruling.expected[ruling.rare].sum())
            self._rare = Bet(min(1.0, expected * MARGIN + LEAST_MARGIN), above=True, watch=True)
        self._alarm = self._new_alarm()
        for counts in self._at_exits.values():
            counts[:] = 0, 0

    def _fewest_audits(self) -> int:
        """Without which a review could propose nothing."""
        assert self.guards is not None
        return fewest_audits(self.factory.limit * self.aim if self.factory.is_proven else 1.0, self.guards.audits_kept)

    def _least_aim(self) -> float:
        """Below which no number of audits kept could show that a proposal keeps it."""
        assert self.guards is not None
        return upper_bound(0, self.guards.audits_kept, SURENESS) / self.factory.limit

    def _new_alarm(self) -> Bet:
        return Bet(self.factory.limit, low=0.0 if self.factory.is_proven else -1.0, above=True, watch=True)

    def _say(self, what: str, reason: str, *exits: str) -> None:
        for name in exits or ("",):
            self._happened(Happening(what, reason, name))


@functools.lru_cache
def fewest_audits(rate: float, most: int) -> int:
    """How many audits, none of which differs, make a rate likely; 100 at least, `most` at most."""
    fewest = min(100, most)
    while fewest < most and upper_bound(0, fewest, SURENESS) > rate:
        fewest += 10
    return min(fewest, most)


def review_now(learner: Learner) -> bool:
    """Review at once, in this thread. Returns whether what is in use has changed."""
    return learner.wants_review() and learner.consider(learner.review()())
