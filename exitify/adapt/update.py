"""How a head learns on the device: cross-entropy against a deeper exit's answer, in closed form, by SGD (Leroux et al., Test-time Specialization of
Dynamic Neural Networks, section 3).

Of logits W z + b with targets t and probabilities p = softmax(W z + b) the gradient is (p - t) z^T for W and p - t for b, so
that nothing but what a run has computed anyway is needed: the logits and the classifier's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exitify.runtime.engines.base import aligned

Array = NDArray[np.float32]

_ROWS = 64
"""Rows of a weight that are computed at once: their product stays in the cache (0.69 ms in place of 0.80 for 1000 x 2048)."""


@dataclass(frozen=True)
class Classifier:
    """A head's last layer. weight: `(classes, width)`. bias: `(classes,)`. Both float32; a step makes new ones and leaves these."""

    weight: Array
    bias: Array

    @property
    def is_finite(self) -> bool:
        """Whether every number is one."""
        return bool(np.isfinite(self.weight).all() and np.isfinite(self.bias).all())

    def is_same(self, other: Classifier) -> bool:
        """Whether all numbers are equal."""
        return bool(np.array_equal(self.weight, other.weight) and np.array_equal(self.bias, other.bias))

    def distance(self, other: Classifier) -> float:
        """How far it is from another, over that one's size: the 2-norm of the differences over that of the numbers."""
        moved = float(np.linalg.norm(self.weight - other.weight)) ** 2 + float(np.linalg.norm(self.bias - other.bias)) ** 2
        size = float(np.linalg.norm(other.weight)) ** 2 + float(np.linalg.norm(other.bias)) ** 2
        return float(np.sqrt(moved / size)) if size else float("inf" if moved else 0.0)


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent as torch.optim.SGD computes it, without dampening.

    learning_rate: The paper's 1e-4. momentum: Of the velocity, which takes as much memory as the classifier.
    parts: What moves.
    """

    learning_rate: float = 1e-4
    momentum: float = 0.0
    parts: Literal["both", "weight", "bias"] = "both"


@dataclass(frozen=True)
class Velocity:
    """What momentum keeps between two steps; of the classifier's shapes."""

    weight: Array
    bias: Array


def targets_of(logits: NDArray[Any], kind: Literal["hard", "soft"], temperature: float = 1.0) -> Array:
    """What a deeper exit's logits `(..., classes)` teach: its class alone, or its probabilities at a temperature."""
    if kind == "soft":
        return softmax(np.asarray(logits) / temperature)
    targets = np.zeros(np.shape(logits), np.float32)
    np.put_along_axis(targets, np.argmax(logits, axis=-1, keepdims=True), 1.0, axis=-1)
    return targets


def softmax(logits: NDArray[Any]) -> Array:
    """Probabilities of the last axis."""
    powers = np.subtract(logits, np.maximum.reduce(logits, axis=-1, keepdims=True), dtype=np.float32)
    np.exp(powers, out=powers)
    powers /= np.add.reduce(powers, axis=-1, keepdims=True)
    return powers


def step(
    classifier: Classifier,
    features: Array,
    logits: Array,
    targets: Array,
    sgd: Sgd,
    velocity: Velocity | None = None,
    into: Array | None = None,
) -> tuple[Classifier, Velocity | None]:
    """The classifier after one step on the mean cross-entropy of a batch, and its velocity where there is momentum.

    Args:
        features: What it read, `(N, width)`. logits: What it said, `(N, classes)`. targets: What it should have, rows that sum to 1.
        velocity: From the step before; none for the first.
        into: Memory for the new weight, where somebody has some to spare: fresh memory takes longer than the step. Not used with momentum.
    """
    error = softmax(logits)
    error -= targets
    if len(features) > 1:
        error /= np.float32(len(features))
    if not sgd.momentum:
        error *= np.float32(sgd.learning_rate)
        weight = classifier.weight if sgd.parts == "bias" else _less(classifier.weight, error, features, into)
        bias = classifier.bias if sgd.parts == "weight" else classifier.bias - np.add.reduce(error, axis=0)
        return Classifier(weight, bias), None
    before = velocity or Velocity(np.zeros_like(classifier.weight), np.zeros_like(classifier.bias))
    pushed = Velocity(np.float32(sgd.momentum) * before.weight + error.T @ features, np.float32(sgd.momentum) * before.bias + error.sum(axis=0))
    rate = np.float32(sgd.learning_rate)
    weight = classifier.weight if sgd.parts == "bias" else classifier.weight - rate * pushed.weight
    bias = classifier.bias if sgd.parts == "weight" else classifier.bias - rate * pushed.bias
    return Classifier(weight, bias), pushed


def _less(weight: Array, error: Array, features: Array, into: Array | None) -> Array:
    """`weight - error^T features`, some rows after the others."""
    result = aligned(weight.shape, weight.dtype.name) if into is None else into  # aligned, so that engines take it as it is
    if len(weight) <= _ROWS and len(features) == 1:
        np.multiply(error[0, :, None], features, out=result)
        return np.subtract(weight, result, out=result)
    product = np.empty((min(_ROWS, len(weight)), weight.shape[1]), np.float32)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, min(start + _ROWS, len(weight)))
        part = product[: rows.stop - rows.start]
        if len(features) == 1:
            np.multiply(error[0, rows, None], features[0], out=part)
        else:
            np.matmul(error[:, rows].T, features, out=part)
        np.subtract(weight[rows], part, out=result[rows])
    return result
