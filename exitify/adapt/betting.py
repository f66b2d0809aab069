"""Whether a mean is within a limit, looked at after every sample: a proof that stays one however long it goes on.

Against the claim that a mean is `limit` or more somebody bets a share of his money on each sample to come; the bets are fair or worse
if the claim is true, so that the chance to ever make 1/d of one is d at most (Ville's inequality). Bets at several stakes share the money.
Source: Waudby-Smith and Ramdas 2024, Estimating means of bounded random variables by betting, arXiv:2010.09686, section 4.

A watch for a change begins again whenever its money has become less than it was, or what was long well would hide what has just gone wrong;
while the claim is true it takes 1/d samples and more, on average, until one has become 1/d.
Source: Shin, Ramdas and Rinaldo 2022, E-detectors, arXiv:2203.03532.
"""

from __future__ import annotations

import math

import numpy as np

_STAKES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75])
"""Of what may be staked without the risk to lose everything."""


class Bet:
    """Evidence on the mean of numbers in [low, high], each drawn alike whatever came before.

    above: Whether the claim to refute is that the mean is at most `limit`; otherwise that it is at least `limit`.
    watch: Whether the mean may change.
    """

    def __init__(self, limit: float, *, low: float = 0.0, high: float = 1.0, above: bool = False, watch: bool = False) -> None:
        self.limit, self.above, self.watch = limit, above, watch
        self.samples, self.total = 0, 0.0
        most = limit - low if above else high - limit
        self._stakes = _STAKES / most if most > 0 else _STAKES * 0.0
        self._logs = np.zeros(len(_STAKES))

    def add(self, number: float) -> None:
        """One more sample."""
        gain = number - self.limit if self.above else self.limit - number
        self._logs += np.log1p(self._stakes * gain)
        if self.watch:
            np.maximum(self._logs, 0.0, out=self._logs)
        self.samples += 1
        self.total += number

    @property
    def evidence(self) -> float:
        """What one of money has become; the claim is refuted at confidence 1 - d when it reaches 1/d."""
        top = float(self._logs.max())
        return math.exp(min(top, 700.0)) * float(np.exp(self._logs - top).mean())

    @property
    def mean(self) -> float:
        """Of the samples so far; 0 for none."""
        return self.total / self.samples if self.samples else 0.0
