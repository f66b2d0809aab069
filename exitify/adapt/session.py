"""A session whose heads learn from what it answers."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exitify.adapt.learner import Happening, Learner, Stage
from exitify.adapt.prior import rare_classes, seen_shares
from exitify.adapt.review import Proposal, Ruling
from exitify.adapt.settings import Learning
from exitify.adapt.state import FACTORY, Snapshot, State, classifier_of
from exitify.artifact.artifact import Artifact
from exitify.calibration.thresholds import NEVER
from exitify.errors import StateError
from exitify.runtime.engines.base import Array
from exitify.runtime.session import Answer, Session, Trace
from exitify.targets.board import conditions

log = logging.getLogger(__name__)


class LearningSession(Session):
    """Answers as `Session` does, from any number of threads, and lets the early exits learn from the deeper ones.

    `run` learns; `run_batch`, `record` and `trace` do not. Some inputs, drawn before they are seen, go on to the network's end
    (`Guards.audit`), which takes their callers longer. All profiles share the heads; what is learnt is judged by one of them. Where the
    artifact holds the times of its segments for this engine here (`exitify measure`), new thresholds save time; else multiply-adds.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        engine: str = "auto",
        profile: str | None = None,
        threads: int = 1,
        how: Learning | None = None,
        seed: int | None = None,
        in_background: bool = True,
    ) -> None:
        """Prepare the network and begin with the artifact's own heads.

        Args:
            artifact, engine, profile, threads: As for `Session`.
            how: What is learnt, and the guard rails.
            seed: Of the draw of audited inputs, for the same twice; None draws one.
            in_background: Whether thresholds are searched in a thread of their own, which is what a service wants: it takes up to
                seconds, a few times a day. Otherwise in `run`.

        Raises:
            StateError: nothing can be learnt under this profile. Others as for `Session`.
        """
        super().__init__(artifact, engine=engine, profile=profile, threads=threads)
        self.state = State.fresh(artifact)
        self._judge = self.profile_name or "none"
        seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
        here = (self.engine.full_name, threads, conditions())
        times = next((one for one in artifact.times.values() if (one.engine, one.threads, one.conditions) == here), None)
        self.learner = Learner(artifact, self._judge, how, times=times, seed=seed, happened=self._note)
        self._learning = threading.Lock()
        self._in_background = in_background
        if self.learner.first is not self.learner.factory.ruling:
            self._hand_over()
        self._reviewing: threading.Thread | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, state: str | os.PathLike[str] | None = None, **options: Any) -> LearningSession:
        """Open and check an artifact, prepare it, and go on where a state ended.

        Args:
            state: Path of a state, if there is one. options: As for the class.
        """
        session = cls(Artifact.open(path), **options)
        if state is not None and Path(state).exists():
            session.restore(state)
        return session

    def run(self, x: Array, skip: str | Sequence[bool] | None = None) -> Answer:
        """Answer for one sample, and learn from it.

        Args, Raises: as for `Session.run`. With a mask, or under another profile than the first one, nothing is learnt.
        """
        if skip is not None or self.profile_name != self._judge:
            return super().run(x, skip)
        with self._learning:
            audited = self.learner.wants_audit()
        trace = self.trace(x, to_end=audited)
        self._learn(trace, audited=audited)
        return trace.answer

    def save_state(self, path: str | os.PathLike[str]) -> Path:
        """Write what was learnt; see `State.save`.

        Raises:
            NotWritten: no space, no permission, no such folder; the state that was there is whole, and learning goes on.
        """
        return self.learnt_state().save(path)

    def learnt_state(self) -> State:
        """What was learnt until now."""
        with self._learning:
            self._remember_learnt()
            return self.state

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on where a state ended.

        Raises:
            StateError: it cannot be read, is another artifact's, or was learnt under another profile. Everything stays as it was.
        """
        state = State.open(path, self.artifact)
        snapshot = state.snapshot()
        if snapshot is not None and snapshot.profile not in ("", self._judge):
            raise StateError(f"{path} was learnt under the profile {snapshot.profile!r}, and this is {self._judge!r}", "use that profile")
        with self._learning:
            tensors = {**self.artifact.classifiers(), **state.learnt}
            learnt = {point.name: classifier_of(tensors, point) for point in self.artifact.plan.exits}
            counts = np.array(state.record.seen) if state.record.seen else np.zeros(self.artifact.plan.classes)
            record = state.record
            ruling = self._ruling_of(state, snapshot)
            stage: Stage = "stopped" if record.stopped else "learning"
            self.learner.resume(ruling, learnt, counts, answers=record.answers, updates=record.updates, trials=record.trials, stage=stage)
            self.state = state
            self._hand_over()

    def rollback(self, number: int | None = None) -> None:
        """Answer with an older snapshot's heads again, and learn on from the artifact's own.

        Args:
            number: The snapshot's, 0 for the artifact's own heads; by default the one before that in use.

        Raises:
            StateError: it is not kept any more.
        """
        with self._learning:
            older = [one.number for one in self.state.record.snapshots if one.number < self.state.record.current]
            chosen = max(older, default=FACTORY) if number is None else number
            state = self.state.use(chosen)
            self.learner.roll_back(f"asked for; from snapshot {self.state.record.current} to {chosen}", self._ruling_of(state, state.snapshot()))
            self.state = self.state.use(chosen)
            self._hand_over()

    def wait(self) -> None:
        """Until no review is under way."""
        reviewing = self._reviewing
        if reviewing is not None:
            reviewing.join()

    def _learn(self, trace: Trace, *, audited: bool) -> None:
        work: Callable[[], Proposal] | None = None
        with self._learning:
            before = self.learner.in_use
            self.learner.observe(trace, audited=audited)
            self._take_over(before)
            if self._reviewing is None and self.learner.wants_review():
                work = self.learner.review()
                self._reviewing = threading.Thread(target=self._review, args=(work,), daemon=True, name="exitify-review")
        if work is not None and self._reviewing is not None:
            if self._in_background:
                self._reviewing.start()
            else:
                self._review(work)

    def _review(self, work: Callable[[], Proposal]) -> None:
        try:
            found = work()
            with self._learning:
                before = self.learner.in_use
                self.learner.consider(found)
                self._take_over(before)
        except Exception:  # a thread of its own has nobody to raise to; answers go on with what is in use
            if not self._in_background:
                raise
            log.exception("looking at what was learnt failed; answers go on unchanged")
        finally:
            self._reviewing = None

    def _take_over(self, before: Ruling) -> None:
        """After the learner's decision: the engines and the state take what is in use now."""
        now = self.learner.in_use
        if now is before:
            return
        if now is self.learner.first:
            self.state = self.state.use(FACTORY)
        elif self.learner.guards is not None:  # without guard rails each update is in use, and only saved ones are kept
            self._keep("taken into use" if not self.state.record.events else self.state.record.events[-1].reason)
        self._hand_over()

    def _hand_over(self) -> None:
        self.change_exits(self.learner.tensors, self.learner.settings, profile=self._judge)

    def _keep(self, reason: str) -> None:
        learner = self.learner
        ruling = learner.in_use
        expected = () if ruling.expected is None else tuple(map(float, ruling.expected))
        self.state = self.state.keep(
            learner.tensors, learner.updates, reason, profile=self._judge, settings=learner.settings, left=ruling.left, expected=expected
        )

    def _remember_learnt(self) -> None:
        learner, points = self.learner, self.artifact.plan.exits
        if learner.guards is None and learner.updates:
            self._keep("saved")
        tensors = {
            name: array for point, head in zip(points, learner.learnt) for name, array in ((point.weight, head.weight), (point.bias, head.bias))
        }
        seen = tuple(float(count) for count in learner.seen.counts)
        self.state = self.state.with_learnt(
            tensors, learner.updates, answers=learner.answers, trials=learner.trials, stopped=learner.stage == "stopped", seen=seen
        )

    def _ruling_of(self, state: State, snapshot: Snapshot | None) -> Ruling | None:
        if snapshot is None:
            return None
        tensors, points = state.tensors[snapshot.number], self.artifact.plan.exits
        heads = tuple(classifier_of(tensors, point) for point in points)
        if not snapshot.settings:
            return replace(self.learner.factory.ruling, heads=heads)
        settings = [snapshot.settings[point.name] for point in points]
        thresholds = np.array([one.threshold if one.enabled else NEVER for one in settings])
        if not snapshot.expected or snapshot.left == 1:
            return Ruling(heads, thresholds, snapshot.left)
        expected = np.array(snapshot.expected)
        return Ruling(heads, thresholds, snapshot.left, rare_classes(seen_shares(expected, snapshot.left)), expected)

    def _note(self, what: Happening) -> None:
        state = replace(self.state, record=replace(self.state.record, updates=self.learner.updates, answers=self.learner.answers))
        self.state = state.note(what.what, what.reason, what.exit)
        log.info("%s%s: %s", what.what, f" ({what.exit})" if what.exit else "", what.reason)
