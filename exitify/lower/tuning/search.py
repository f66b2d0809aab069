"""The search: which kernel to try next, and what is good enough to be chosen. It never ends with a kernel slower than the default."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from exitify.lower.processors import Machine
from exitify.lower.tuning import space
from exitify.lower.tuning.database import Choice, Database, Known, choice_text
from exitify.lower.tuning.measure import NotMeasured, Runner
from exitify.lower.tuning.tasks import Task

REPEATS, FINAL_REPEATS = 5, 25
FINALISTS = 3
WORTH = 0.97
"""A choice replaces the default when its time, measured in turn with the default's, is at most this share of it."""

Report = Callable[[int, int, float, float], None]
"""Called after each trial: done, budget, seconds a run of all tasks by the defaults, and by the best so far."""


def unheard(done: int, budget: int, default: float, best: float) -> None:
    """Show nothing."""


@dataclass
class _State:
    """A task while it is searched."""

    task: Task
    known: Known
    candidates: Iterator[Choice | None]
    ended: bool = False
    failures: int = field(default=0)

    @property
    def default(self) -> float:
        return self.known.seconds.get(choice_text(None), math.inf)

    @property
    def best(self) -> float:
        return min(self.known.seconds.values(), default=math.inf)

    @property
    def promise(self) -> float:
        """What another trial may bring: the task's share of the time, less for each trial it has had."""
        seconds = self.best if math.isfinite(self.best) else 1.0
        return math.inf if not self.known.seconds else self.task.calls * seconds / (1 + self.known.trials)


def tune(tasks: Sequence[Task], machine: Machine, database: Database, runner: Runner, trials: int, report: Report, seed: int = 0) -> int:
    """Measure up to `trials` candidates over all tasks that no search of that budget has been through; return how many were measured now.

    A task that such a search has been through costs nothing, whichever artifact it was for. One that was interrupted goes
    on: what was measured counts.
    """
    open_ = []
    for task in tasks:
        known = database.read(task.key)
        if known.searched < trials:
            open_.append(_State(task, known, space.candidates(task.kernel, machine, known, seed)))
    done = sum(state.known.trials for state in open_)
    with _ctrl_c() as raise_if_pressed:
        measured = _search(open_, machine, database, runner, trials, done, report, raise_if_pressed)
        for state in open_:
            chosen = _chosen(state, machine, runner)
            raise_if_pressed()
            database.searched(state.task.key, chosen, trials)
    return measured


def _search(
    open_: Sequence[_State],
    machine: Machine,
    database: Database,
    runner: Runner,
    trials: int,
    done: int,
    report: Report,
    raise_if_pressed: Callable[[], None],
) -> int:
    """Measure until the budget is spent or nothing is left; return how many were measured."""
    measured = 0
    while done < trials:
        state = max((state for state in open_ if not state.ended), key=lambda state: state.promise, default=None)
        if state is None:
            break
        choice = next(state.candidates, _NOTHING)
        if choice is _NOTHING:
            state.ended = True
            continue
        seconds, failure = _measure(state.task, choice, machine, runner)  # type: ignore[arg-type]
        state.known.seconds[choice_text(choice)] = seconds  # type: ignore[arg-type]
        raise_if_pressed()
        database.measured(state.task.key, choice, seconds, failure)  # type: ignore[arg-type]
        done += 1
        measured += 1
        report(done, trials, _total(open_, "default"), _total(open_, "best"))
    return measured


_NOTHING = object()


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], None]]:
    """A function that raises KeyboardInterrupt if Ctrl-C was pressed: when it is inside a callback of TVM's, TVM makes an error of its own of it."""
    pressed: list[int] = []

    def note(number: int, _: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    def raise_if_pressed() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield raise_if_pressed
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _measure(task: Task, choice: Choice | None, machine: Machine, runner: Runner) -> tuple[float, str]:
    try:
        return runner.seconds([space.apply(task.kernel, choice, machine)], REPEATS)[0], ""
    except NotMeasured as error:
        return math.inf, str(error)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # TVM refuses the schedule
        return math.inf, f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _chosen(state: _State, machine: Machine, runner: Runner) -> Choice | None:
    """The fastest of the finalists, timed in turn with the default; the default, if it is not beaten by more than noise."""
    better = sorted((seconds, text) for text, seconds in state.known.seconds.items() if seconds < state.default and text != choice_text(None))
    finalists: list[Choice] = [json.loads(text) for _, text in better[:FINALISTS]]
    if not finalists:
        return None
    try:
        kernels = [space.apply(state.task.kernel, choice, machine) for choice in (None, *finalists)]
        default, *others = runner.seconds(kernels, FINAL_REPEATS)
    except NotMeasured:
        return None
    fastest = min(range(len(others)), key=others.__getitem__)
    return finalists[fastest] if others[fastest] <= WORTH * default else None


def _total(states: Sequence[_State], which: str) -> float:
    """Seconds that a run of these tasks takes, those not measured yet left out."""
    return sum(state.task.calls * getattr(state, which) for state in states if math.isfinite(getattr(state, which)))
