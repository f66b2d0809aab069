"""How much a command says beside its result: -v and -q, and how its progress is shown, on a terminal and in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from exitify.progress import Progress

VERBOSE = Annotated[
    int,
    typer.Option(
        "-v",
        "--verbose",
        count=True,
        show_default=False,
        rich_help_panel="Output",
        help="Say what happens inside; -vv: where an error came from, too.",
    ),
]
QUIET = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no warnings, no advice.", rich_help_panel="Output")]

EVERY = 20.0
"""Seconds between two lines of progress in a log file; work that takes less says nothing."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """What was asked for. verbose: How often -v was given."""

    verbose: int = 0
    quiet: bool = False


_chosen = Output()


def chosen() -> Output:
    """What was asked for."""
    return _chosen


def choose(verbose: int, quiet: bool) -> None:
    """Set it for this command, and let the log follow: warnings, with -v also what the parts of exitify say of their work."""
    global _chosen
    _chosen = Output(verbose, quiet)
    logging.getLogger().setLevel(logging.ERROR if quiet else logging.WARNING)
    logging.getLogger("exitify").setLevel(logging.INFO if verbose and not quiet else logging.NOTSET)


class Formatter(logging.Formatter):
    """`exitify: warning: …`; what is no warning has the time in place of the word."""

    def format(self, record: logging.LogRecord) -> str:
        word = record.levelname.lower() if record.levelno >= logging.WARNING else time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"exitify: {word}: {record.getMessage()}"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Progress on stderr: a bar a stage on a terminal, lines now and then in a file; nothing with -q."""
    if _chosen.quiet or not sys.stderr.isatty():
        lines = _Lines()
        yield lines
        lines.end()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with _bars(*columns) as bars:
        stages: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            bars.update(stages[stage], completed=done, total=total)

        yield advance


@contextmanager
def tuning_bar() -> Iterator[Callable[[int, int, float, float], None]]:
    """The same for trials: how many, how far the best so far is ahead, the time left."""

    def described(default: float, best: float) -> str:
        return f"tuning: {best * 1e3:.3f} ms, {best / default:.3f} of the default" if default else "tuning"

    if _chosen.quiet or not sys.stderr.isatty():
        lines = _Lines()
        yield lambda done, budget, default, best: lines("tuning", done, budget, described(default, best))
        lines.end()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    with _bars(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bars:
        trials: list[Any] = []

        def report(done: int, budget: int, default: float, best: float) -> None:
            if not trials:
                trials.append(bars.add_task("tuning", total=budget))
            bars.update(trials[0], completed=done, description=described(default, best))

        yield report


def _bars(*columns: Any) -> Any:
    from rich.console import Console
    from rich.progress import Progress as Bars

    return Bars(*columns, console=Console(stderr=True))


class _Lines:
    """Progress for a file: a line now and then. With -v each stage says when it is done, and how long it took."""

    def __init__(self) -> None:
        self.stage, self.first = "", 0
        self.began = self.said = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.end()
            self.stage, self.first, self.began, self.said = stage, done, now, now  # work that goes on does not begin at 0
        if now - self.said < EVERY or not self.first < done < total or _chosen.quiet:
            return
        self.said = now
        left = (now - self.began) / (done - self.first) * (total - done)
        print(f"exitify: {time.strftime('%H:%M:%S')}: {text or stage}, {done} of {total}, {_duration(left)} left", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Of the stage that is going on."""
        if self.stage:
            log.info("%s: done in %s", self.stage, _duration(time.monotonic() - self.began))
        self.stage = ""


def _duration(seconds: float) -> str:
    """Seconds, minutes, or hours and minutes."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
