"""Deadlines: with a clock that only the network's stretches move, an answer is the deepest that can be done in time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitify.errors import DataError, PlanError
from exitify.plan import FINAL
from exitify.runtime.deadlines import FIRST_PASSES, FORGET, KEPT, SHRINK, StretchTimes
from exitify.runtime.engines.base import Bound
from exitify.runtime.session import Session
from tests.artifacts import inputs
from tests.runtime.stopping import NAMES, profile_of, recorded, session_of

MS = 1_000_000
EVERY = dict.fromkeys((*NAMES, FINAL), 10.0)
"""Milliseconds that each stretch takes."""


class Clock:
    """Nanoseconds that pass only where a stretch runs, as many as `ms` says for its exit."""

    def __init__(self, session: Session, ms: Mapping[str, float]) -> None:
        self.now, self.ms, self.ran = 0, dict(ms), []
        bind = session.engine.bind
        session.engine.bind = lambda stretches, parameters: _Slow(bind(stretches, parameters), [s.exit for s in stretches], self)
        session._clock = lambda: self.now


class _Slow(Bound):
    def __init__(self, bound: Bound, exits: list[str], clock: Clock) -> None:
        self.bound, self.exits, self.clock = bound, exits, clock

    def set_input(self, x):
        self.bound.set_input(x)

    def set_parameters(self, parameters):
        self.bound.set_parameters(parameters)

    def step(self, index):
        self.bound.step(index)
        self.clock.ran.append(self.exits[index])
        self.clock.now += int(self.clock.ms[self.exits[index]] * MS)

    def value(self, name):
        return self.bound.value(name)


def measured(ms: Mapping[str, float] = EVERY, profile: object = None) -> tuple[Session, Clock]:
    """A session that knows how long its stretches take."""
    session = session_of(profile)  # type: ignore[arg-type]
    clock = Clock(session, ms)
    session.run(inputs(1), deadline_ms=1.0)
    clock.ran.clear()
    return session, clock


@pytest.mark.parametrize(
    ("deadline", "exit_name"),
    [(0.001, "exit1"), (10, "exit1"), (19.9, "exit1"), (20, "exit2"), (35, "exit3"), (49.9, "exit4"), (50, FINAL), (1e6, FINAL)],
)
def test_an_answer_is_the_deepest_that_is_done_in_time(deadline, exit_name):
    x = inputs(1)
    session, clock = measured()
    answer = session.run(x, deadline_ms=deadline)
    assert answer.exit == exit_name
    assert clock.ran == [*NAMES, FINAL][: [*NAMES, FINAL].index(exit_name) + 1]
    assert answer.ms == 10 * len(clock.ran)
    np.testing.assert_allclose(answer.logits, recorded(x)[exit_name][0], rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 30), min_size=5, max_size=5), st.integers(1, 160))
def test_no_answer_is_late_but_the_first_exits_and_none_stops_too_early(ms, deadline):
    names = [*NAMES, FINAL]
    session, _ = measured(dict(zip(names, ms)))
    answer = session.run(inputs(1), deadline_ms=deadline)
    done = np.cumsum(ms)
    index = names.index(answer.exit)
    assert index == 0 or done[index] <= deadline
    assert index == 4 or done[index + 1] > deadline


def test_the_first_run_measures_and_answers_at_the_end():
    session = session_of()
    clock = Clock(session, EVERY)
    answer = session.run(inputs(1), deadline_ms=15)
    assert (answer.exit, clock.ran) == (FINAL, [*NAMES, FINAL] * FIRST_PASSES)
    assert session.run(inputs(1), deadline_ms=15).exit == "exit1"


def test_a_cold_first_pass_is_not_held_against_later_runs():
    session = session_of()
    clock = Clock(session, dict.fromkeys(EVERY, 1000.0))
    bound_step = _Slow.step

    def step(self, index):
        bound_step(self, index)
        if len(clock.ran) == 5:
            clock.ms = dict(EVERY)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Slow, "step", step)
        session.run(inputs(1), deadline_ms=15)
    assert session.run(inputs(1), deadline_ms=25).exit == "exit2"


def test_only_enabled_exits_are_run_and_the_policy_still_stops_earlier():
    session, clock = measured(profile=profile_of("top1", {"exit2": 2.0, "exit4": 2.0}))
    assert (session.run(inputs(1), deadline_ms=25).exit, clock.ran) == ("exit4", ["exit2", "exit4"])
    session, clock = measured(profile=profile_of("patience", {"exit1": 2.0, "exit3": 1.0}))
    assert (session.run(inputs(1), deadline_ms=1e6).exit, clock.ran) == ("exit3", ["exit1", "exit3"])


def test_a_profiles_temperature_is_that_of_the_exit_that_answered():
    session, _ = measured(profile=profile_of("top1", {"exit1": 2.0}, temperatures={"exit1": 1.7}, final_temperature=0.6))
    assert [session.run(inputs(1), deadline_ms=ms).temperature for ms in (1, 100)] == [1.7, 0.6]


def test_a_stretch_that_has_become_slower_is_left_after_one_late_answer():
    session, clock = measured()
    assert session.run(inputs(1), deadline_ms=50).exit == FINAL
    clock.ms[FINAL] = 25.0
    late = session.run(inputs(1), deadline_ms=50)
    assert (late.exit, late.ms) == (FINAL, 65)
    assert [session.run(inputs(1), deadline_ms=50).exit for _ in range(5)] == ["exit4"] * 5


def test_one_slow_run_is_forgotten_after_a_while():
    session, clock = measured()
    clock.ms[FINAL] = 500.0
    session.run(inputs(1), deadline_ms=50)
    clock.ms[FINAL] = 10.0
    taken = [session.run(inputs(1), deadline_ms=50).exit for _ in range(FORGET + 3)]
    assert taken == ["exit4"] * FORGET + [FINAL] * 3


def test_a_stretch_that_never_fits_is_tried_once_in_hundreds_of_runs():
    session, clock = measured()
    tried = []
    for run in range(10 * FORGET * KEPT):
        clock.ran.clear()
        session.run(inputs(1), deadline_ms=45)
        if FINAL in clock.ran:
            tried.append(run)
    assert 1 <= len(tried) <= 10
    assert min(np.diff([0, *tried])) > 10 * FORGET


def test_times_of_a_slow_hour_are_outlived():
    """All that is known of a stretch may come from a moment in which everything took longer."""
    times = StretchTimes()
    times.add(50 * MS)
    waited = next(run for run in range(10**5) if times.fits(20 * MS))
    assert 40 * FORGET < waited < 60 * FORGET


def test_times_belong_to_a_stretch_whatever_else_runs():
    """Another exit's heads on the way make other stretches, which are measured when they are first met."""
    session, clock = measured()
    session.artifact = session.artifact.with_profile("late", profile_of("top1", {"exit4": 2.0}))
    session.use("late")
    assert (session.run(inputs(1), deadline_ms=15).exit, len(clock.ran)) == (FINAL, 2 * FIRST_PASSES)
    clock.ran.clear()
    assert (session.run(inputs(1), deadline_ms=15).exit, clock.ran) == ("exit4", ["exit4"])
    session.use("none")
    clock.ran.clear()
    assert (session.run(inputs(1), deadline_ms=15).exit, clock.ran) == ("exit1", ["exit1"])


def test_a_run_without_a_deadline_is_as_it_was():
    session, clock = measured()
    assert (session.run(inputs(1)).exit, clock.ran) == (FINAL, [FINAL])


def test_at_one_exit_there_is_nothing_to_leave():
    session, _ = measured()
    session.run(inputs(1), exit="exit3", deadline_ms=5)
    assert session.run(inputs(1), exit="exit3", deadline_ms=5).exit == "exit3"
    session.use(exit="exit2")
    session.run(inputs(1), deadline_ms=5)
    assert session.run(inputs(1), deadline_ms=5).exit == "exit2"


@pytest.mark.parametrize("deadline", [0, -1.0, math.nan, math.inf])
def test_a_deadline_that_is_no_time_is_refused(deadline):
    with pytest.raises(DataError, match=r"a deadline of .* ms is no time\n  hint: give milliseconds above 0"):
        session_of().run(inputs(1), deadline_ms=deadline)


def test_what_run_refuses_a_deadline_does_not_let_pass():
    session = session_of()
    with pytest.raises(DataError, match="takes one sample"):
        session.run(inputs(2), deadline_ms=5)
    with pytest.raises(PlanError, match="there is no exit"):
        session.run(inputs(1), exit="exit7", deadline_ms=5)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40))
def test_the_longest_of_the_last_times_is_expected(times):
    kept = StretchTimes()
    assert kept.fits(0)
    for time in times:
        kept.add(time)
    longest = max(times[-KEPT:])
    assert (kept.fits(longest), kept.fits(longest - 1)) == (True, False)


@given(st.lists(st.integers(MS, 100 * MS), min_size=1, max_size=KEPT), st.integers(0, FORGET * KEPT * 2))
def test_refusals_forget_the_longest_times_and_doubt_the_shortest(times, refusals):
    kept = StretchTimes()
    for time in times:
        kept.add(time)
    for _ in range(refusals):
        assert not kept.fits(0)
    steps = refusals // FORGET
    left = sorted(times)[: max(1, len(times) - steps)]
    for _ in range(steps - len(times) + 1):
        left = [int(SHRINK * left[0])]
    assert sorted(kept.readings) == left
