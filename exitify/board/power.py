"""What a board draws, from its INA3221 power monitors through sysfs: NVML has no power on Orin."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exitify.errors import ExitifyError
from exitify.targets import load_target
from exitify.targets.board import ROOT, board_at_hand

MONITORS = "sys/bus/i2c/drivers/ina3221"
IDLE_SECONDS, BUSY_SECONDS, ROUNDS = 2.0, 2.0, 3
"""How long nothing runs, and then an answer after the other; in turn, so often."""
SETTLING = 0.5
"""Seconds before each recording: clocks follow the load in tenths of a second, and the monitor averages over milliseconds."""
BETWEEN_READINGS = 0.02

Read = Callable[[], float]
Clock = Callable[[], float]


class NoPower(ExitifyError):
    """What this machine draws cannot be read; the message says why."""


@dataclass(frozen=True)
class Rail:
    """A channel of a power monitor. label: The name of what it feeds. volts, amps: Files, in mV and mA."""

    label: str
    volts: Path
    amps: Path

    def watts(self) -> float:
        """What flows now."""
        return _number(self.volts) * _number(self.amps) / 1e6


@dataclass(frozen=True)
class Energy:
    """What an answer takes.

    mj: Millijoules above idle, the median over rounds; spread: the lowest and the highest of them. total_mj: Idle included.
    watts: While it answers. idle_watts: Before.
    """

    mj: float
    spread: tuple[float, float]
    total_mj: float
    watts: float
    idle_watts: float


def find_rails(root: Path = ROOT) -> list[Rail]:
    """The rails whose sum is what the module draws, as its target names them.

    Raises:
        NoPower: this is no Jetson that exitify knows, it has no power monitor, one may not be read, or a rail is missing.
    """
    board = board_at_hand(root)
    if board is None:
        raise NoPower("energy is measured on a Jetson, and this machine is none", "leave --energy out")
    wanted = load_target(board.target).rails if board.target else ()
    if not wanted:
        raise NoPower(f"the rails of {board.model} are not known", f"name them in a target's file for {', '.join(board.modules) or 'it'}")
    channels = _channels(root)
    if not channels:
        raise NoPower(f"there is no INA3221 power monitor under /{MONITORS}", "the kernel has no driver for it, or this is a container without /sys")
    missing = [label for label in wanted if label not in channels]
    if missing:
        raise NoPower(f"no power monitor has the rail {missing[0]!r}", f"there are {', '.join(sorted(channels))}")
    rails = [channels[label] for label in wanted]
    for rail in rails:
        rail.watts()
    return rails


def measure(
    answers: Sequence[Callable[[], object]],
    read: Read,
    *,
    seconds: float = BUSY_SECONDS,
    idle: float = IDLE_SECONDS,
    rounds: int = ROUNDS,
    clock: Clock = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> list[Energy]:
    """What each of these takes: in turn, idle before each, over several rounds.

    Args:
        answers: Each makes one answer a call.
        read: Watts now. seconds, idle: How long each answers, and how long nothing runs before it. clock, wait: The time, and how it passes.
    """
    found: list[list[tuple[float, float, float, float]]] = [[] for _ in answers]
    for _ in range(rounds):
        for answer, rows in zip(answers, found):
            wait(SETTLING)
            with Recording(read, clock) as quiet:
                wait(idle)
            idle_watts = quiet.joules() / quiet.seconds
            _repeat(answer, SETTLING, clock)
            with Recording(read, clock) as busy:
                count = _repeat(answer, seconds, clock)
            joules = busy.joules()
            rows.append(((joules - idle_watts * busy.seconds) / count, joules / count, joules / busy.seconds, idle_watts))
    results = []
    for rows in found:
        above = sorted(row[0] for row in rows)
        middle = np.median(np.array(rows), axis=0)
        results.append(Energy(float(middle[0]) * 1e3, (above[0] * 1e3, above[-1] * 1e3), float(middle[1]) * 1e3, float(middle[2]), float(middle[3])))
    return results


def _repeat(answer: Callable[[], object], seconds: float, clock: Clock) -> int:
    """Answer for so long, at least once; how often it was."""
    started, count = clock(), 0
    while clock() - started < seconds or not count:
        answer()
        count += 1
    return count


class Recording:
    """Readings by a thread of their own while a block runs, the first and the last at its ends."""

    def __init__(self, read: Read, clock: Clock = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self.times: list[float] = []
        self.watts: list[float] = []
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self) -> Recording:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        self._take()

    @property
    def seconds(self) -> float:
        """From the first reading to the last."""
        return self.times[-1] - self.times[0]

    def joules(self) -> float:
        """What flowed between the first reading and the last."""
        return integrate(np.array(self.times), np.array(self.watts))

    def _take(self) -> None:
        self.watts.append(self._read())
        self.times.append(self._clock())

    def _go_on(self) -> None:
        try:
            while not self._ended.wait(BETWEEN_READINGS):
                self._take()
        except BaseException as failure:
            self._failure = failure


def integrate(times: NDArray[np.float64], watts: NDArray[np.float64]) -> float:
    """Joules, by the trapezoid rule. times: Seconds, ascending."""
    return float((np.diff(times) * (watts[1:] + watts[:-1])).sum() / 2)


def _channels(root: Path) -> dict[str, Rail]:
    """Every channel by its label; those that are not connected (NC), and sums that the driver makes itself, left out."""
    found: dict[str, Rail] = {}
    for monitor in sorted((root / MONITORS).glob("*/hwmon/hwmon*")):
        for path in sorted(monitor.glob("in*_label")):
            number = path.name[2:].partition("_")[0]
            try:
                label = path.read_text(encoding="ascii", errors="replace").strip()
            except OSError as error:
                raise NoPower(f"{path} cannot be read: {error.strerror}", "run as a user who may read it: sudo") from error
            if label and label != "NC" and number in ("1", "2", "3"):
                found[label] = Rail(label, monitor / f"in{number}_input", monitor / f"curr{number}_input")
    return found


def _number(path: Path) -> int:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise NoPower(f"{path} cannot be read: {error.strerror}", "run as a user who may read it: sudo") from error
    try:
        return int(text)
    except ValueError as error:
        raise NoPower(f"{path} says {text[:40]!r}, which is no number", "look at the kernel's log: dmesg | grep ina3221") from error
