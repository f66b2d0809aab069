"""What was measured: a folder with one file a task, named by the task's key, one JSON record a line.

Records are only ever added, each in one write, so that a run that is killed loses nothing but the line it was writing;
and a folder can be shared between artifacts, copied, and merged file by file.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exitify.errors import ExitifyError

Choice = dict[str, Any]
"""A schedule as data; `space.apply` knows how to make it."""


def default_folder() -> Path:
    """The user's own: `$XDG_CACHE_HOME/exitify/tuning`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exitify" / "tuning"


class BrokenRecord(ExitifyError):
    """A line of the database is none that tuning writes."""


@dataclass
class Known:
    """What the database holds of one task.

    seconds: By the choice's JSON; infinite for one that failed. searched: The largest budget that a search of it was
    finished with, in trials of all tasks together. best: What that search chose; None is the default.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    searched: int = 0
    best: Choice | None = None

    @property
    def trials(self) -> int:
        """How many candidates were measured."""
        return len(self.seconds)


class Database:
    """The folder; made when the first record is written."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def read(self, key: str) -> Known:
        """Everything known of a task.

        Raises:
            BrokenRecord: a line that is no record; one that was cut off at the file's end is none, and is left out.
        """
        known = Known()
        try:
            text = self._path(key).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return known
        except OSError as error:
            raise ExitifyError(f"cannot read {self._path(key)}: {error.strerror}", "choose another folder: --db DIR") from error
        lines = text.split("\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                _take(known, json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise BrokenRecord(f"{self._path(key)}:{number} is no tuning record: {line[:60]!r}", "delete that line, or the file") from error
        return known

    def measured(self, key: str, choice: Choice | None, seconds: float, failure: str = "") -> None:
        """Add a measurement: seconds a call, infinite with a reason for a candidate that failed."""
        self._add(key, {"choice": choice, "seconds": seconds if math.isfinite(seconds) else None, "failure": failure})

    def searched(self, key: str, best: Choice | None, trials: int) -> None:
        """Add that a search with a budget of so many trials over all tasks has ended for this task, and what it chose."""
        self._add(key, {"best": best, "searched": trials})

    def _add(self, key: str, record: dict[str, Any]) -> None:
        line = (json.dumps(record, sort_keys=True) + "\n").encode()
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_cut_line(path)
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ExitifyError(f"cannot write {path}: {error.strerror}", "free some space, or choose another folder: --db DIR") from error

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.jsonl"


def choice_text(choice: Choice | None) -> str:
    """The choice as text, the same for the same choice."""
    return json.dumps(choice, sort_keys=True)


def _take(known: Known, record: dict[str, Any]) -> None:
    if "searched" in record:
        if int(record["searched"]) >= known.searched:
            known.searched, known.best = int(record["searched"]), record["best"]
        return
    seconds = record["seconds"]
    known.seconds[choice_text(record["choice"])] = math.inf if seconds is None else float(seconds)


def _drop_cut_line(path: Path) -> None:
    """Take off what a killed run had begun to write."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
