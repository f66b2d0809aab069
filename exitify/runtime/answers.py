"""What a session says of samples: answers, what every exit says of them, and what a run passed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exitify.runtime.engines.base import Array
from exitify.runtime.policies import softmax


# Not frozen: each field would be set through a function call, in the path of every answer.
@dataclass(slots=True)
class Answer:
    """What the network says of one sample.

    label: Index of the class. exit: Name of the exit taken, `final` for the whole network.
    logits: `(classes,)` before the temperature. macs: Multiply-adds spent, heads on the way counted.
    ms: Wall-clock time; in a batch, the batch's time up to this answer.
    quantile: Of the profile's `conformal` at the exit that the logits are of; None where it has none.
    held: Whether it is an earlier frame's answer that still holds (`Session.stream`): label and logits are that frame's, exit says where
        this one stopped.
    """

    label: int
    exit: str
    logits: Array
    temperature: float
    macs: int
    ms: float
    classes: tuple[str, ...]
    quantile: float | None = None
    held: bool = False

    @property
    def probabilities(self) -> Array:
        """`(classes,)`, at the calibrated temperature."""
        return softmax(self.logits, self.temperature).astype(np.float32)

    @property
    def prediction_set(self) -> tuple[int, ...] | None:
        """Classes that may be the true one, the likeliest first: those with 1 - p up to the quantile; None where the profile has no quantiles.

        Of answers to samples like those that it was calibrated on, a share of `Conformal.alpha` misses the true class. It may be empty.
        """
        if self.quantile is None:
            return None
        p = softmax(self.logits, self.temperature)
        return tuple(int(label) for label in np.argsort(-p, kind="stable") if 1 - p[label] <= self.quantile)

    @property
    def name(self) -> str:
        """Name of the class, or its number when the artifact names none."""
        return self.classes[self.label] if self.label < len(self.classes) else str(self.label)


@dataclass(frozen=True)
class Recording:
    """What every exit says of some samples, none of them stopped.

    logits: `(N, classes)` by exit, `final` among them. features: the classifiers' inputs, `(N, width)` by early exit.
    """

    logits: dict[str, Array]
    features: dict[str, Array]


@dataclass(frozen=True)
class Visit:
    """An exit on the way of a run, taken or not.

    logits: `(classes,)`. features: The classifier's input, `(width,)`. score: The policy's; NaN where it has none there.
    """

    exit: str
    logits: Array
    features: Array
    score: float


@dataclass(frozen=True)
class Trace:
    """A run and what it passed.

    visits: The exits whose heads ran, in order, that of the answer among them unless it is the network's own.
    full: The network's own logits, `(classes,)`, where the run went on to its end; else None.
    """

    answer: Answer
    visits: tuple[Visit, ...]
    full: Array | None
