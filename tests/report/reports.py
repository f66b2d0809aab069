"""Artifacts to report on, made once for the tests of this folder."""

from __future__ import annotations

import functools

from exitify.artifact.artifact import Artifact
from exitify.calibration.calibrate import calibrate
from exitify.report.report import Report, inspect
from tests.digits import samples_of, trained_artifact


@functools.cache
def calibrated() -> Artifact:
    """The digits' network with a profile that gives away half a point, and a memory."""
    return calibrate(trained_artifact(), samples_of("calibration"), max_drop=0.005)


@functools.cache
def with_samples() -> Report:
    """A report on digits that nothing has seen."""
    return inspect(calibrated(), samples_of("test"))


@functools.cache
def without_samples() -> Report:
    """A report on what the artifact remembers."""
    return inspect(calibrated())
