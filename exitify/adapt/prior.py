"""Which classes a device sees, and what that says of an answer (label shift).

A head learnt p(class | x) where all classes were alike frequent. Where they come with shares q instead, Bayes' rule makes that
p(class | x) q(class) K, normalised (Saerens et al. 2002, Neural Computation 14:21, equation 2.4): a shift of the logits by log(q K), K classes.
Learning with the shift inside the softmax leaves to the weights what the shares do not explain, so that classes which are not seen are
not unlearnt (Menon et al. 2021, arXiv:2007.07314, the logit-adjusted loss). Nothing but counts is kept of what was seen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Shares = NDArray[np.float64]


class SeenClasses:
    """How often each class was answered, what is long ago counting less.

    counts: `(classes,)`. half_life: Answers after which one counts half.
    """

    def __init__(self, classes: int, half_life: float, counts: NDArray[np.float64] | None = None) -> None:
        self.counts = np.zeros(classes) if counts is None else np.array(counts, np.float64)
        self._keep = 0.5 ** (1.0 / half_life)

    def add(self, label: int) -> None:
        """One more answer of this class."""
        self.counts *= self._keep
        self.counts[label] += 1.0

    @property
    def shares(self) -> Shares:
        """`(classes,)`, of all answers; alike where there are none yet."""
        total = self.counts.sum()
        return self.counts / total if total else np.full(len(self.counts), 1.0 / len(self.counts))


def expected_shares(shares: Shares, left: float) -> Shares:
    """What to expect of the next answer: the shares seen, and this much left for all classes alike."""
    return (1.0 - left) * shares + left / len(shares)


def seen_shares(expected: Shares, left: float) -> Shares:
    """The shares seen, from what was expected with this much left, below 1."""
    return (expected - left / len(expected)) / (1.0 - left)


def shift_of(expected: Shares) -> NDArray[np.float32]:
    """What is added to logits at their temperature, `(classes,)`."""
    return np.log(expected * len(expected)).astype(np.float32)


def rare_classes(shares: Shares) -> NDArray[np.bool_]:
    """Classes that are seen less than half as often as if all were alike."""
    return shares < 0.5 / len(shares)
