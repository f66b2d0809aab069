"""Digits as the trained network sees them, and devices that see them one after the other."""

from __future__ import annotations

import functools

import numpy as np

from benchmarks.recorded_device import Device, Population
from exitify.adapt.settings import Learning
from exitify.artifact.artifact import Artifact
from exitify.calibration.calibrate import calibrate
from exitify.plan import FINAL
from exitify.runtime.session import Session
from tests import digits

FEW = (3, 5, 8)
"""Classes that look alike."""


@functools.cache
def careful() -> Artifact:
    """Digits with a profile that promises a rate."""
    return calibrate(digits.trained_artifact(), digits.samples_of("calibration"), risk=(0.05, 0.9))


@functools.cache
def artifact() -> Artifact:
    """Digits with a profile that promises an accuracy."""
    return calibrate(digits.trained_artifact(), digits.samples_of("calibration"), max_drop=0.02)


@functools.cache
def population() -> Population:
    """The test digits, recorded."""
    made, samples = digits.trained_artifact(), digits.samples_of("test")
    recording = Session(made, profile="none").record(samples.inputs(np.arange(len(samples))))
    names = made.plan.exit_names
    features = {name: recording.features[name] for name in names if name != FINAL}
    return Population(made, features, np.stack([recording.logits[name] for name in names]), samples.labels)


def device(how: Learning | None = None, *, of: Artifact | None = None, seed: int = 0) -> Device:
    return Device(population(), of or artifact(), how or Learning(), seed=seed)


def stream(count: int, classes: tuple[int, ...] | None = None, seed: int = 0) -> np.ndarray:
    """Rows of the population, drawn with replacement."""
    rows = np.arange(len(population().labels))
    if classes is not None:
        rows = rows[np.isin(population().labels, classes)]
    return np.random.default_rng(seed).choice(rows, count)
