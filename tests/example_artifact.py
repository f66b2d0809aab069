"""What `python -m examples.digits.run` writes, in seconds: a calibrated artifact that reads pictures of digits of any size."""

from __future__ import annotations

import functools
from dataclasses import replace

import exitify
from exitify.artifact.artifact import Artifact
from tests.artifacts import with_contract
from tests.digits import samples_of, trained_artifact


@functools.cache
def example_artifact() -> Artifact:
    """Two exits, the profile `default`, and `thrifty`, which costs less."""
    artifact = exitify.calibrate(trained_artifact(), samples_of("calibration"), max_drop=0.01)
    artifact = exitify.calibrate(artifact, samples_of("calibration"), budget_macs=0.2, name="thrifty")
    steps = artifact.manifest.input.preprocess
    assert steps is not None
    return with_contract(artifact, preprocess=replace(steps, resize=(16, 16)))
