"""A session whose heads learn from what it answers."""

from __future__ import annotations

import hashlib
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
from exitify.errors import ExitifyError, StateError
from exitify.records import dumps
from exitify.runtime.answers import Answer, Trace
from exitify.runtime.engines.base import Array
from exitify.runtime.session import Session
from exitify.targets.board import conditions

log = logging.getLogger(__name__)


class LearningSession(Session):
    """Answers as `Session` does, from any number of threads, and lets the early exits learn from the deeper ones.

    `run` learns; `run_batch`, `record` and `trace` do not. Some inputs, drawn before they are seen, go on to the network's end
    (`Guards.audit`), which takes their callers longer. What is learnt is for the profile that it began with; others, and none, have the
    artifact's own heads, for which their thresholds were found. Where the artifact holds the times of its segments for this engine here
    (`exitify measure`), new thresholds save time; else multiply-adds.
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
        self._promise = hashlib.sha256(dumps(artifact.profile(self._judge))).hexdigest()
        self._learning = threading.Lock()
        self._in_background = in_background
        self._idle = threading.Event()
        self._idle.set()
        self._served = self.learner.factory.ruling
        self._take_over()

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

    def run(
        self,
        x: Array,
        skip: str | Sequence[bool] | None = None,
        *,
        exit: str | None = None,  # noqa: A002
        deadline_ms: float | None = None,
    ) -> Answer:
        """Answer for one sample, and learn from it.

        Args, Raises: as for `Session.run`. With a mask, one exit, a deadline, or under another profile than the first one, nothing is
            learnt.
        """
        if skip is not None or exit is not None or deadline_ms is not None or self.profile_name != self._judge:
            return super().run(x, skip, exit=exit, deadline_ms=deadline_ms)
        with self._learning:
            audited = self.learner.wants_audit()
        trace = self.trace(x, to_end=audited)
        try:
            self._learn(trace, audited=audited)
        except ExitifyError:  # the answer stands; what is in use is handed over again after the next one
            log.exception("learning from an answer failed; answers go on")
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

        Heads that were judged by another promise than this profile's, or not proven where this one must be, are not put into use; what
        was learnt goes on.

        Raises:
            StateError: it cannot be read, is another artifact's, or was learnt under another profile. Everything stays as it was.
        """
        state = State.open(path, self.artifact)
        snapshot = state.snapshot()
        if snapshot is not None and snapshot.profile not in ("", self._judge):
            raise StateError(f"{path} was learnt under the profile {snapshot.profile!r}, and this is {self._judge!r}", "use that profile")
        with self._learning:
            wrong, record = self._objection(snapshot), state.record
            ruling = None if wrong else self._ruling_of(state, snapshot)
            if ruling is not None:
                self.prepare_exits(self.learner.factory.settings(ruling), self._judge)
            tensors = {**self.artifact.classifiers(), **state.learnt}
            stage: Stage = "stopped" if record.stopped else "learning"
            self.learner.resume(
                ruling,
                {point.name: classifier_of(tensors, point) for point in self.artifact.plan.exits},
                np.array(record.seen) if record.seen else np.zeros(self.artifact.plan.classes),
                answers=record.answers,
                updates=record.updates,
                trials=record.trials,
                stage=stage,
                broken=record.broken,
                forgot=record.forgot,
                aim=record.aim,
            )
            self.state = state.use(FACTORY).note("not used", f"snapshot {record.current}: {wrong}") if wrong else state
            self._hand_over()

    def rollback(self, number: int | None = None) -> None:
        """Answer with an older snapshot's heads again, and begin to learn from the artifact's own.

        Args:
            number: The snapshot's, 0 for the artifact's own heads; by default the one before that in use that was judged by this
                profile's promise and not found to break it.

        Raises:
            StateError: it is not kept any more, or was judged by another promise.
        """
        with self._learning:
            record = self.state.record
            older = [one.number for one in record.snapshots if one.number < record.current and not one.condemned and not self._objection(one)]
            chosen = max(older, default=FACTORY) if number is None else number
            state = self.state.use(chosen)
            wrong = self._objection(state.snapshot())
            if wrong:
                raise StateError(f"snapshot {chosen} cannot be used: {wrong}", f"{FACTORY} is the artifact's own heads")
            self.learner.roll_back(f"asked for; from snapshot {record.current} to {chosen}", self._ruling_of(state, state.snapshot()))
            self.state = self.state.use(chosen)
            self._hand_over()

    def wait(self) -> None:
        """Until no review is under way."""
        self._idle.wait()

    def _learn(self, trace: Trace, *, audited: bool) -> None:
        work: Callable[[], Proposal] | None = None
        with self._learning:
            broken = self.learner.broken
            self.learner.observe(trace, audited=audited)
            if self.learner.broken > broken:
                self.state = self.state.condemn()
            self._take_over()
            if self._idle.is_set() and self.learner.wants_review():
                work = self.learner.review()
                self._idle.clear()
        if work is None:
            return
        if not self._in_background:
            self._review(work)
            return
        try:
            threading.Thread(target=self._review, args=(work,), daemon=True, name="exitify-review").start()
        except RuntimeError:  # no more threads: another answer tries again
            self._idle.set()
            log.exception("no thread to look at what was learnt")

    def _review(self, work: Callable[[], Proposal]) -> None:
        try:
            found = work()
            if found.ruling is not None:  # engines may take long to make other exits ready; answers go on meanwhile
                self.prepare_exits(self.learner.factory.settings(found.ruling), self._judge)
            with self._learning:
                self.learner.consider(found)
                self._take_over()
        except Exception:  # a thread of its own has nobody to raise to; answers go on with what is in use
            if not self._in_background:
                raise
            log.exception("looking at what was learnt failed; answers go on unchanged")
        finally:
            self._idle.set()

    def _take_over(self) -> None:
        """The engines and the state take what the learner has in use now, if they have not."""
        now = self.learner.in_use
        if now is self._served:
            return
        if now is self.learner.factory.ruling or (now is self.learner.first and not self.learner.broken):
            self.state = self.state.use(FACTORY)
        elif self.learner.guards is not None:  # without guard rails each update is in use, and only saved ones are kept
            self._keep(self.state.record.events[-1].reason if self.state.record.events else "taken into use")
        self._hand_over()

    def _hand_over(self) -> None:
        now = self.learner.in_use
        self.change_exits(self.learner.tensors, self.learner.settings, profile=self._judge, alone=True)
        self._served = now

    def _keep(self, reason: str) -> None:
        learner = self.learner
        ruling = learner.in_use
        self.state = self.state.keep(
            learner.tensors,
            learner.updates,
            reason,
            profile=self._judge,
            settings=learner.settings,
            left=ruling.left,
            expected=() if ruling.expected is None else tuple(map(float, ruling.expected)),
            promise=self._promise,
            is_proven=learner.guards is not None and learner.factory.is_proven,
        )

    def _remember_learnt(self) -> None:
        learner, points = self.learner, self.artifact.plan.exits
        if learner.guards is None and learner.updates:
            self._keep("saved")
        learner.check_heads()
        tensors = {
            name: array for point, head in zip(points, learner.learnt) for name, array in ((point.weight, head.weight), (point.bias, head.bias))
        }
        self.state = self.state.with_learnt(
            tensors,
            learner.updates,
            answers=learner.answers,
            trials=learner.trials,
            stopped=learner.stage == "stopped",
            broken=learner.broken,
            forgot=learner.forgot,
            aim=learner.aim,
            seen=tuple(float(count) for count in learner.seen.counts),
        )

    def _objection(self, snapshot: Snapshot | None) -> str:
        """Why a snapshot must not answer here, empty if it may."""
        if snapshot is None or not snapshot.settings:
            return ""
        if snapshot.promise != self._promise:
            return "it was judged by another promise than this profile's"
        if self.learner.guards is not None and self.learner.factory.is_proven and not snapshot.is_proven:
            return "it was never proven to keep this profile's promise"
        return ""

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
