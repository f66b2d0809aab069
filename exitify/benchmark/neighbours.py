"""How busy other programs keep the machine meanwhile: no statistics can tell what a quiet one would have shown."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

STATISTICS = Path("/proc/stat")
_BUSY = (0, 1, 2, 5, 6, 7)
"""Of the first line's numbers: user, nice, system, interrupts, soft interrupts, and what a host gave to other guests."""


@dataclass(frozen=True)
class Moment:
    """Seconds since the machine started, summed over its processors: all there were, those busy, and those busy for this process or children
    that have ended.
    """

    all: float
    busy: float
    own: float


def now(statistics: Path = STATISTICS) -> Moment | None:
    """What the kernel has counted so far; None where it does not say (others than Linux)."""
    try:
        numbers = [int(word) for word in statistics.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    if len(numbers) < 8:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    own = os.times()
    return Moment(sum(numbers) / ticks, sum(numbers[i] for i in _BUSY) / ticks, own.user + own.system + own.children_user + own.children_system)


def others_share(before: Moment | None, after: Moment | None) -> float | None:
    """Share of the processors' time that other programs took between two moments, in [0, 1]; None where nobody says."""
    if before is None or after is None or after.all <= before.all:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(max(others / (after.all - before.all), 0.0), 1.0)
