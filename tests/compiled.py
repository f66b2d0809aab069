"""Networks of the zoo compiled for this machine, once for all tests that run libraries, and thresholds for them."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from exitify.artifact.artifact import Artifact, target_path
from exitify.lower.pipeline import compile_artifact
from exitify.runtime.session import Session
from exitify.targets import load_target
from tests.artifacts import exported

HOST = "host"
LIBRARY = target_path(HOST, "library.so")
DERIVED = target_path(HOST, "weights.safetensors")


@functools.cache
def compiled(name: str) -> Artifact:
    """An exported network with a library for this machine, by default schedules."""
    return compile_artifact(exported(name)[1], load_target(HOST))


def with_record(artifact: Artifact, **changes: object) -> Artifact:
    """The artifact, its library for this machine saying something else of itself."""
    record = replace(artifact.targets[HOST], **changes)
    return artifact.with_target(record, bytes(artifact.files[LIBRARY]), bytes(artifact.files[DERIVED]))


def with_library(artifact: Artifact, library: bytes) -> Artifact:
    """The artifact with other bytes in the place of its library for this machine."""
    return artifact.with_target(artifact.targets[HOST], library, bytes(artifact.files[DERIVED]))


def thresholds(artifact: Artifact, x: np.ndarray, temperature: float = 1.0) -> dict[str, float]:
    """For each exit one that some of these inputs reach and others do not, none of them by chance."""
    logits = Session(artifact, profile="none").record(x).logits
    chosen = {}
    for point in artifact.plan.exits:
        scaled = logits[point.name].astype(np.float64) / temperature
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        best = np.sort((powers / powers.sum(axis=1, keepdims=True)).max(axis=1))[len(x) // 2 :]
        gap = int(np.diff(best).argmax())
        assert np.diff(best)[gap] > 1e-3
        chosen[point.name] = float(best[gap : gap + 2].mean())
    return chosen
