"""Whether a stretch of the network will be done in time, going by how long it took the last times."""

from __future__ import annotations

KEPT = 16
"""How many of a stretch's last times are kept; the longest of them is expected of the next run."""
FORGET = 16
"""After so many refusals in a row the longest time is forgotten: something else may have held up that run."""
SHRINK = 0.98
"""The only one left is believed to be this much shorter instead: a stretch of twice the time that is there is tried again after 560 runs."""
FIRST_PASSES = 4
"""How often the first run with a deadline goes through the network; its first pass, with nothing in the caches, is not counted."""


class StretchTimes:
    """The last times of a stretch, in nanoseconds.

    Threads may share it: each change puts a new tuple in the place of the old one, and one that is lost is one reading less.
    """

    __slots__ = ("is_guess", "readings", "refused")

    def __init__(self) -> None:
        self.readings: tuple[int, ...] = ()
        self.refused = 0
        self.is_guess = False  # of the one reading: it was made shorter

    def add(self, nanoseconds: int) -> None:
        """Note how long it took."""
        self.readings = (nanoseconds,) if self.is_guess else (*self.readings[1 - KEPT :], nanoseconds)
        self.refused, self.is_guess = 0, False

    def fits(self, nanoseconds: float) -> bool:
        """Whether it should be done in this time; one that was never measured should."""
        readings = self.readings
        if max(readings, default=0) <= nanoseconds:
            return True
        self.refused += 1
        if self.refused % FORGET == 0 and len(readings) > 1:
            longest = readings.index(max(readings))
            self.readings = readings[:longest] + readings[longest + 1 :]
        elif self.refused % FORGET == 0:
            self.readings, self.is_guess = (int(SHRINK * readings[0]),), True
        return False
