"""One temperature a head: the divisor of its logits that makes its probabilities mean what they say."""

from __future__ import annotations

from dataclasses import dataclass

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

    The likelihood is unimodal in log T (its derivative in 1/T is monotone), so the one minimum is bracketed by the range;
    Newton's steps go to it, and where one leaves the bracket it is halved. At an end of the range the end is returned.

    Args:
        logits: `(N, classes)`, of samples that the network was not trained on.
        labels: `(N,)` integers in [0, classes).

    Returns:
        T in [0.05, 20].

    Raises:
        CalibrationError: logits that are not finite, a label outside the classes.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    if not np.isfinite(logits).all():
        raise CalibrationError("a head's logits are not finite on the calibration data", "train the heads again: `exitify train`")
    require_labels(labels, logits.shape[1])
    rows = np.arange(len(labels))
    centred = np.asarray(logits, np.float64) - np.asarray(logits, np.float64)[rows, labels][:, None]

    def derivatives(log_t: float) -> tuple[float, float]:
        """First and second, of the mean NLL by log T."""
        scaled = centred / np.exp(log_t)
        weights = np.exp(log_softmax(scaled))
        mean = (weights * scaled).sum(axis=1)
        return float(-mean.mean()), float(((weights * scaled * scaled).sum(axis=1) - mean**2 + mean).mean())

    low, high = LOG_RANGE
    if derivatives(low)[0] >= 0:
        return float(np.exp(low))
    if derivatives(high)[0] <= 0:
        return float(np.exp(high))
    log_t = 0.0
    for _ in range(100):
        slope, curvature = derivatives(log_t)
        low, high = (log_t, high) if slope < 0 else (low, log_t)
        step = -slope / curvature if curvature > 0 else np.inf
        before, log_t = log_t, log_t + step if low < log_t + step < high else (low + high) / 2
        if abs(log_t - before) < 1e-11:
            break
    return float(np.exp(log_t))


def require_labels(labels: NDArray[np.integer], classes: int) -> None:
    """Refuse labels that name no class, by the first of them.

    Raises:
        CalibrationError: a label outside [0, classes).
    """
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(outside):
        raise CalibrationError(
            f"the label {labels[outside[0]]} of sample {outside[0]} is none of the network's {classes} classes",
            f"they are numbered 0 to {classes - 1}",
        )


def diverges(temperature: float) -> bool:
    """Whether a fitted temperature is an end of the range: the head is (almost) always right on the samples, or no better than chance."""
    low, high = np.exp(LOG_RANGE)
    return bool(temperature <= low * (1 + 1e-6) or temperature >= high * (1 - 1e-6))


def calibration_errors(logits: NDArray[np.floating], labels: NDArray[np.integer], seed: int = 0) -> NDArray[np.float64]:
    """The calibration error of each exit without a temperature and with one, `(exits, 2)`.

    Each half of the samples is judged at the temperature of the other: one fitted on the samples that judge it flatters itself.

    Args:
        logits: `(exits, N, classes)`. labels: `(N,)`. seed: Of the halves.
    """
    halves = np.array_split(np.random.default_rng(seed).permutation(len(labels)), 2)
    found = np.zeros((len(logits), 2))
    for row, one in zip(found, logits):
        fitted = np.ones(len(labels))
        for judged, others in (halves, halves[::-1]):
            fitted[judged] = fit_temperature(one[others], labels[others])
        row[:] = [expected_calibration_error(np.exp(log_softmax(one / t)), labels) for t in (1.0, fitted[:, None])]
    return found


@dataclass(frozen=True)
class Reliability:
    """How often an exit is right where it is so and so sure, over bins that hold as many samples each.

    confidence, accuracy: `(bins,)`, means. error: Mean gap between both over the samples, in [0, 1].
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    error: float


def reliability(probabilities: NDArray[np.floating], labels: NDArray[np.integer], bins: int = 15) -> Reliability:
    """What probabilities are worth, over bins of equal mass.

    Args:
        probabilities: `(N, classes)`.
        labels: `(N,)`.

    Source: Naeini et al. 2015; equal-mass bins as in Regol et al. 2024 (JEI-DNN).
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    groups = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(labels)))
    sure, right = (np.array([values[group].mean() for group in groups]) for values in (confidence, correct))
    return Reliability(sure, right, float(sum(abs(s - r) * len(group) for s, r, group in zip(sure, right, groups)) / len(labels)))


def expected_calibration_error(probabilities: NDArray[np.floating], labels: NDArray[np.integer], bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of equal mass, in [0, 1] (see `reliability`)."""
    return reliability(probabilities, labels, bins).error
