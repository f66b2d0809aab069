"""One temperature a head: the divisor of its logits that makes its probabilities mean what they say."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exitify.errors import CalibrationError

LOG_RANGE = (np.log(0.05), np.log(20.0))
"""Temperatures outside 0.05 … 20 fit only data on which the head is (almost) always right or no better than chance."""


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities of logits `(..., classes)`, in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def fit_temperature(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Return the temperature with the least negative log-likelihood.

    The likelihood is unimodal in log T (its derivative in 1/T is monotone), so a bracketed search over log T finds
    the one minimum; at an end of the range the end is returned.

    Args:
        logits: `(N, classes)`, of samples that the network was not trained on.
        labels: `(N,)` integers in [0, classes).

    Returns:
        T in [0.05, 20].

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    if not np.isfinite(logits).all():
        raise CalibrationError("a head's logits are not finite on the calibration data", "train the heads again: `exitify train`")
    rows = np.arange(len(labels))
    centred = np.asarray(logits, np.float64) - np.asarray(logits, np.float64)[rows, labels][:, None]

    def derivative(log_t: float) -> float:
        """Sign of d NLL / d log T."""
        scaled = centred / np.exp(log_t)
        weights = np.exp(log_softmax(scaled))
        return float(-(weights * scaled).sum(axis=1).mean())

    low, high = LOG_RANGE
    if derivative(low) >= 0:
        return float(np.exp(low))
    if derivative(high) <= 0:
        return float(np.exp(high))
    for _ in range(40):
        middle = (low + high) / 2
        if derivative(middle) < 0:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


def expected_calibration_error(probabilities: NDArray[np.floating], labels: NDArray[np.integer], bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of equal mass, in [0, 1].

    Args:
        probabilities: `(N, classes)`.
        labels: `(N,)`.

    Source: Naeini et al. 2015; equal-mass bins as in Regol et al. 2024 (JEI-DNN).
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    groups = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(labels)))
    return float(sum(abs(confidence[g].mean() - correct[g].mean()) * len(g) for g in groups) / len(labels))
