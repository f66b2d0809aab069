"""Runs that went on to the network's end: what every exit read, and what the network itself said. In memory alone, never in a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from exitify.plan import Plan


class Audits:
    """The latest audited runs, oldest overwritten first.

    rows: Most that are kept.
    """

    def __init__(self, plan: Plan, rows: int) -> None:
        self._names = [point.name for point in plan.exits]
        self._features = {point.name: np.zeros((rows, point.head.features), np.float16) for point in plan.exits}
        self._logits = np.zeros((rows, plan.classes), np.float32)
        self.made = 0

    def __len__(self) -> int:
        return min(self.made, len(self._logits))

    def add(self, features: Mapping[str, NDArray[np.float32]], logits: NDArray[np.float32]) -> None:
        """One more run. features: `(width,)` by exit, of every exit of the plan. logits: `(classes,)`, the network's own."""
        at = self.made % len(self._logits)
        for name in self._names:
            self._features[name][at] = np.clip(features[name], -65504.0, 65504.0)
        self._logits[at] = logits
        self.made += 1

    def rows(self) -> tuple[Sequence[NDArray[np.float32]], NDArray[np.float32]]:
        """Copies of what is kept: features `(N, width)` by exit of the plan, and logits `(N, classes)`."""
        count = len(self)
        return [self._features[name][:count].astype(np.float32) for name in self._names], self._logits[:count].copy()

    def clear(self) -> None:
        """None any more."""
        self.made = 0
