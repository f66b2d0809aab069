"""The search: which kernel to try next, and what is good enough to be chosen. It never ends with a kernel slower than the default."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tvm import tirx

from exitify.errors import ExitifyError, one_line
from exitify.lower.library import AnyMachine
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


def tune(tasks: Sequence[Task], machine: AnyMachine, database: Database, runner: Runner, trials: int, report: Report, seed: int = 0) -> int:
    """Measure up to `trials` candidates over all tasks that no search of that budget has been through; return how many were measured now.

    A task that such a search has been through costs nothing, whichever artifact it was for. One that was interrupted goes
    on: what was measured counts. The runner is closed when it is interrupted while several kernels are measured at once.
    """
    open_ = []
    for task in tasks:
        known = database.read(task.key)
        if known.searched < trials:
            open_.append(_State(task, known, space.candidates(task.kernel, machine, known, seed)))
    done = sum(state.known.trials for state in open_)
    with _CtrlC() as ctrl_c:
        measured = _search(open_, machine, database, runner, trials, done, report, ctrl_c)
        finals = [(state, _final(state, machine, runner)) for state in open_]

        def keep(state: _State, chosen: Choice | None) -> None:
            with ctrl_c.held():
                database.searched(state.task.key, chosen, trials)

        _at_once(finals, runner, runner.places if finals else 1, keep, ctrl_c)
    return measured


def _search(
    open_: Sequence[_State], machine: AnyMachine, database: Database, runner: Runner, trials: int, done: int, report: Report, ctrl_c: _CtrlC
) -> int:
    """Measure, in rounds of as many candidates as the runner has places, until the budget is spent or nothing is left; return how many."""
    measured = 0

    def keep(proposed: tuple[_State, Choice | None], result: tuple[float, str]) -> None:
        nonlocal measured
        (state, choice), (seconds, failure) = proposed, result
        state.known.seconds[choice_text(choice)] = seconds
        with ctrl_c.held():
            database.measured(state.task.key, choice, seconds, failure)
        measured += 1

    def tell() -> None:
        report(done + measured, trials, _total(open_, "default"), _total(open_, "best"))

    while done + measured < trials:
        places = min(runner.places, trials - done - measured)
        proposed = _proposed(open_, places)
        if not proposed:
            break
        _at_once([((state, choice), _job(state.task, choice, machine, runner)) for state, choice in proposed], runner, places, keep, ctrl_c, tell)
    return measured


def _proposed(open_: Sequence[_State], count: int) -> list[tuple[_State, Choice | None]]:
    """What to measure next, up to so many candidates; from now on each counts as one that failed, until its result is known."""
    proposed: list[tuple[_State, Choice | None]] = []
    while len(proposed) < count:
        state = max((state for state in open_ if not state.ended), key=lambda state: state.promise, default=None)
        if state is None:
            break
        choice = next(state.candidates, _NOTHING)
        if isinstance(choice, _Nothing):
            state.ended = True
            continue
        state.known.seconds[choice_text(choice)] = math.inf
        proposed.append((state, choice))
    return proposed


class _Nothing:
    """No candidate; the default is None."""


_NOTHING = _Nothing()


class _CtrlC:
    """Ctrl-C while tuning, remembered: when it is inside a callback of TVM's, TVM makes an error of its own of it."""

    def __init__(self) -> None:
        self._pressed = self._held = False
        self._before: Any = None

    def __enter__(self) -> _CtrlC:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def raise_if_pressed(self) -> None:
        """KeyboardInterrupt, if it was."""
        if self._pressed:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While a record is written it is only remembered."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _note(self, _: int, __: object) -> None:
        self._pressed = True
        if not self._held:
            raise KeyboardInterrupt


_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def _nothing() -> None:
    pass


def _at_once(
    jobs: Sequence[tuple[_Item, Callable[[], _Result]]],
    runner: Runner,
    places: int,
    keep: Callable[[_Item, _Result], None],
    ctrl_c: _CtrlC,
    tell: Callable[[], None] = _nothing,
) -> None:
    """Do all jobs, in as many threads as there are places, and keep each result as it comes, in this thread.

    When something goes wrong what is done is kept, and the runner closed, so that nobody waits for what is not.
    """
    if min(places, len(jobs)) <= 1:
        for item, job in jobs:
            result = job()
            ctrl_c.raise_if_pressed()
            keep(item, result)
            ctrl_c.raise_if_pressed()
            tell()
        return
    with ThreadPoolExecutor(places) as pool:
        waiting = {pool.submit(job): item for item, job in jobs}
        try:
            while waiting:
                ready, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)  # a wait without end may miss Ctrl-C
                for future in ready:
                    result = future.result()
                    keep(waiting.pop(future), result)
                    ctrl_c.raise_if_pressed()
                    tell()
        except BaseException:
            done = [future for future in waiting if future.done() and future.exception() is None]
            pool.shutdown(wait=False, cancel_futures=True)
            runner.close()
            for future in done:
                keep(waiting[future], future.result())
            raise


def _job(task: Task, choice: Choice | None, machine: AnyMachine, runner: Runner) -> Callable[[], tuple[float, str]]:
    """A function that measures a candidate: its seconds, or infinity and why. It is scheduled now, in the thread that Ctrl-C reaches."""
    try:
        kernel = space.apply(task.kernel, choice, machine)
    except Exception as error:  # TVM refuses the schedule
        refused = (math.inf, one_line(error))
        return lambda: refused
    return functools.partial(_measure, kernel, runner)


def _measure(kernel: tirx.PrimFunc, runner: Runner) -> tuple[float, str]:
    try:
        return runner.seconds([kernel], REPEATS)[0], ""
    except NotMeasured as error:
        return math.inf, str(error)
    except ExitifyError:  # there is nowhere to measure
        raise
    except Exception as error:
        return math.inf, one_line(error)


def _final(state: _State, machine: AnyMachine, runner: Runner) -> Callable[[], Choice | None]:
    """A function that chooses: the fastest of the finalists, timed in turn with the default, in one place; scheduled now, as above."""
    better = sorted((seconds, text) for text, seconds in state.known.seconds.items() if seconds < state.default and text != choice_text(None))
    finalists: list[Choice] = [json.loads(text) for _, text in better[:FINALISTS]]
    kernels = [space.apply(state.task.kernel, choice, machine) for choice in (None, *finalists)] if finalists else []
    return functools.partial(_chosen, finalists, kernels, runner)


def _chosen(finalists: Sequence[Choice], kernels: Sequence[tirx.PrimFunc], runner: Runner) -> Choice | None:
    """The default, too, if it is not beaten by more than noise."""
    if not finalists:
        return None
    try:
        default, *others = runner.seconds(kernels, FINAL_REPEATS)
    except NotMeasured:
        return None
    fastest = min(range(len(others)), key=others.__getitem__)
    return finalists[fastest] if others[fastest] <= WORTH * default else None


def _total(states: Sequence[_State], which: str) -> float:
    """Seconds that a run of these tasks takes, those not measured yet left out."""
    return sum(state.task.calls * getattr(state, which) for state in states if math.isfinite(getattr(state, which)))
