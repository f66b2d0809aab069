"""Answers to frames that follow each other: while the last answer still holds, the network need not be run to its end."""

from __future__ import annotations

from dataclasses import dataclass

from exitify.errors import DataError
from exitify.runtime.answers import Answer
from exitify.runtime.policies import BEFORE, Array, one_similarity, one_softmax
from exitify.runtime.session import ExitsVersion, Session
from exitify.runtime.steps import Setup


@dataclass(frozen=True)
class _KeyFrame:
    """The last frame whose answer was not held.

    setup, version: What it was answered with; other heads' probabilities cannot be held against its own.
    answer: A copy of what was answered. probabilities: Of each exit that it passed, in order.
    """

    setup: Setup
    version: ExitsVersion
    answer: Answer
    probabilities: tuple[Array | list[float], ...]


class Stream:
    """Frames in order, answered by one session; made by `Session.stream`, for one thread.

    The last frame whose answer was not held is the key frame. After each exit that a new frame comes to, its probabilities there are held
    against the key frame's. Where their similarity, 1 - half the L1 distance, reaches the threshold, the key frame's answer still holds: the
    frame gets its label and logits (`Answer.held`) and stops. Otherwise the profile's own policy may take the exit, and the frame is the next
    key frame. Where the key frame stopped early, later exits have nothing to be held against.

    After Sponner et al. 2024 (Temporal Decisions, arXiv:2403.07958), who hold the first exit's outputs against a reference frame's, by
    their Euclidean distance. Here every exit compares, at its temperature, and the distance has bounds.
    """

    def __init__(self, session: Session, hold: float | None = None, every: int = 30) -> None:
        if hold is not None and not 0 <= hold <= 1:
            raise DataError(f"a similarity of {hold} is none from 0 to 1", "give hold=0.95, for instance")
        if every < 1:
            raise DataError(f"every={every} leaves no frame to hold", "give 1 or more")
        self._session, self._hold, self._every = session, hold, every
        self._key: _KeyFrame | None = None
        self._held = 0
        self._check(session._now(session.version))

    def reset(self) -> None:
        """Forget the key frame: what comes next does not follow what came before."""
        self._key, self._held = None, 0

    def run(self, x: Array) -> Answer:
        """Answer for the next frame. With no profile in use, all exits compare.

        Args:
            x: As for `Session.run`.

        Raises:
            DataError: as for `Session.run`; the profile now in use has no similarities as its thresholds, and none was given.
        """
        session, started = self._session, self._session._clock()
        x = session._one(x)
        version = session.version
        setup = session._with_some_exit(session._now(version))
        self._check(setup)
        key = self._key if self._key and self._key.setup is setup and self._key.version is version else None
        to_end = key is not None and self._held >= self._every
        bound = session._bound(setup, version)
        bound.set_input(x)
        state, seen = BEFORE, []
        for index, step in enumerate(setup.steps):
            bound.step(index)
            if step.is_last:
                break
            seen.append(one_softmax(bound.value(step.logits)[0], step.temperature))
            if to_end:
                continue
            if key is not None and index < len(key.probabilities):
                least = step.threshold if self._hold is None else self._hold
                if one_similarity(seen[index], key.probabilities[index]) >= least:
                    self._held += 1
                    return _held(key.answer, step.stretch.exit, step.macs, (session._clock() - started) / 1e6)
            sureness, state = setup.sureness(step, bound, state)
            if sureness >= step.threshold:
                break
        answer = session._answer(step, bound.value(step.logits)[0].copy(), started)
        self._key, self._held = _KeyFrame(setup, version, _held(answer, answer.exit, 0, 0.0), tuple(seen)), 0
        return answer

    def _check(self, setup: Setup) -> None:
        if self._hold is None and setup.rule.policy != "temporal":
            who = f"the profile {setup.rule.profile!r} does not" if setup.rule.profile else "there is no profile to"
            raise DataError(f"{who} say how similar frames must be for an answer to hold", "give hold=0.95, for instance")


def _held(key: Answer, exit_name: str, macs: int, ms: float) -> Answer:
    """The key frame's answer for another frame, which stopped at this exit."""
    return Answer(key.label, exit_name, key.logits.copy(), key.temperature, macs, ms, key.classes, key.quantile, held=True)
