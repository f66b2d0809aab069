"""What learning has changed: before and after, on the classes that were seen and on the others."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exitify.adapt.learner import AtExit
from exitify.adapt.prior import rare_classes
from exitify.adapt.session import LearningSession
from exitify.adapt.state import Event
from exitify.adapt.stream import Stream
from exitify.data import Samples
from exitify.errors import DataError
from exitify.files import NotWritten
from exitify.progress import Progress, silent
from exitify.runtime.answers import Answer
from exitify.runtime.session import Session

SAVE_EVERY = 1000
"""Answers between two writes of the state."""


@dataclass(frozen=True)
class Judged:
    """What a session makes of labelled samples that it does not learn from.

    accuracy_seen, accuracy_rest: On classes that the stream often had, and on the others; None where there are none.
    macs_seen: Mean share of the network's multiply-adds, on the classes seen; macs: On all. ms_seen: Mean time of an answer to them.
    exits: Share of samples of the classes seen that leave at each.
    """

    samples: int
    accuracy: float
    accuracy_seen: float | None
    accuracy_rest: float | None
    macs: float
    macs_seen: float | None
    ms_seen: float | None
    exits: dict[str, float]


@dataclass(frozen=True)
class AdaptReport:
    """A stream that was learnt from.

    answers: Given. refused: Inputs that could not be answered; refusal: What was wrong with the first of them. audited: Gone on to the end.
    differed: Share of the audited answers other than the network's. seen: Indices of the classes that the stream often had.
    drift: Of each head that learns. at_exits: What audits have seen of answers at each exit with what is in use.
    before, after: On labelled samples, where there are any. not_saved: Why the state could not be written on the way, empty if it could.
    """

    answers: int
    refused: int
    refusal: str
    audited: int
    differed: float
    updates: int
    seen: tuple[int, ...]
    drift: dict[str, float]
    at_exits: dict[str, AtExit]
    events: tuple[Event, ...]
    before: Judged | None
    after: Judged | None
    seconds: float
    not_saved: str


def adapt(
    session: LearningSession,
    stream: Stream,
    *,
    judge_on: Samples | None = None,
    passes: int = 1,
    seed: int | None = None,
    save_to: Path | None = None,
    progress: Progress = silent,
) -> AdaptReport:
    """Answer for a stream and learn from it.

    Args:
        session: That learns. What it has learnt before stays.
        stream: Its labels, if it has any, are not read.
        judge_on: Labelled samples of other images, answered before and after, not learnt from.
        passes: Over the stream. seed: To shuffle it by, each time anew; None keeps its order.
        save_to: Where to write the state, now and then and at the end.

    Raises:
        NotWritten: the state could not be written at the end.
    """
    random = np.random.default_rng(seed)
    last = session.state.record.events[-1:]
    answered_before, audited_before = session.learner.answers, session.learner.audited
    differed_before = session.learner.differed
    started, refused, refusal, not_saved = time.perf_counter(), 0, "", ""
    verdicts = _verdicts(session, judge_on, "before", progress) if judge_on is not None else None
    total = len(stream) * passes
    for turn in range(passes):
        order = np.arange(len(stream)) if seed is None else random.permutation(len(stream))
        for i, row in enumerate(order):
            done = turn * len(stream) + i
            if done % 50 == 0:
                progress("learning", done, total)
            try:
                session.run(stream[int(row)])
            except DataError as error:
                refused, refusal = refused + 1, refusal or error.problem
            if save_to is not None and done % SAVE_EVERY == SAVE_EVERY - 1:
                try:
                    session.save_state(save_to)
                except NotWritten as error:  # a full disk stops nobody from answering; at the end it is an error
                    not_saved = error.problem
    progress("learning", total, total)
    session.wait()
    if save_to is not None:
        session.save_state(save_to)
    learner = session.learner
    audited = learner.audited - audited_before
    rare = rare_classes(learner.seen.shares)
    before = _judged(verdicts, rare) if verdicts is not None else None
    after = _judged(_verdicts(session, judge_on, "after", progress), rare) if judge_on is not None else None
    learnt = session.learnt_state()
    events = learnt.record.events
    return AdaptReport(
        learner.answers - answered_before,
        refused,
        refusal,
        audited,
        (learner.differed - differed_before) / audited if audited else 0.0,
        learner.updates,
        tuple(int(label) for label in np.flatnonzero(~rare)),
        learnt.drift(learning=True),
        learner.at_exits(),
        events[events.index(last[0]) + 1 :] if last and last[0] in events else events,
        before,
        after,
        time.perf_counter() - started,
        not_saved,
    )


@dataclass(frozen=True)
class _Verdicts:
    """One number a sample: labels, whether right, share of multiply-adds, milliseconds, exit."""

    labels: NDArray[np.int64]
    right: NDArray[np.bool_]
    macs: NDArray[np.float64]
    ms: NDArray[np.float64]
    exits: list[str]
    names: tuple[str, ...]


def _verdicts(session: LearningSession, samples: Samples, when: str, progress: Progress) -> _Verdicts:
    found: list[Answer] = []
    for start in range(0, len(samples), 100):
        progress(f"judging {when}", start, len(samples))
        found += [Session.run(session, x) for x in samples.inputs(np.arange(start, min(start + 100, len(samples))))]  # without learning
    progress(f"judging {when}", len(samples), len(samples))
    full = session.artifact.plan.full_macs
    right = np.array([one.label for one in found]) == samples.labels
    macs, ms = np.array([one.macs / full for one in found]), np.array([one.ms for one in found])
    return _Verdicts(samples.labels, right, macs, ms, [one.exit for one in found], session.artifact.plan.exit_names)


def _judged(verdicts: _Verdicts, rare: NDArray[np.bool_]) -> Judged:
    of_rare = rare[verdicts.labels]
    seen = ~of_rare
    left = Counter(name for name, is_seen in zip(verdicts.exits, seen) if is_seen)
    exits = {name: left[name] / max(int(seen.sum()), 1) for name in verdicts.names}

    def mean(numbers: NDArray[np.float64] | NDArray[np.bool_], rows: NDArray[np.bool_]) -> float | None:
        return float(numbers[rows].mean()) if rows.any() else None

    return Judged(
        len(seen),
        float(verdicts.right.mean()),
        mean(verdicts.right, seen),
        mean(verdicts.right, of_rare),
        float(verdicts.macs.mean()),
        mean(verdicts.macs, seen),
        mean(verdicts.ms, seen),
        exits,
    )
