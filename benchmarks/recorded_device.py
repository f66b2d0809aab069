"""Devices that see recorded images: what a session would say, from what heads read, so that hundred thousand answers take seconds.

The population is the 5,000 test images of $EXITIFY_DATA/cifar10.npz as an artifact's network sees them. Features do not
depend on classifiers, so any heads' answers follow from them exactly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exitify.adapt.learner import Happening, Learner, review_now
from exitify.adapt.review import Factory, Ruling
from exitify.adapt.settings import Learning
from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Profile, SegmentTimes
from exitify.artifact.memory import remember
from exitify.calibration.calibrate import Outputs, Settings, disagreement_of, exit_settings
from exitify.calibration.thresholds import NEVER, judge
from exitify.data import load_samples
from exitify.plan import FINAL
from exitify.runtime.answers import Answer, Trace, Visit
from exitify.runtime.session import Session

TRIPLES = ((3, 5, 7), (2, 4, 6), (1, 8, 9), (0, 2, 8), (3, 4, 6))
"""Classes that a device sees, chosen before anything was measured: cat dog horse, bird deer frog, automobile ship truck, airplane bird ship,
cat deer frog."""


@dataclass(frozen=True)
class Population:
    """Recorded images. features: `(N, width)` by exit. logits: `(K + 1, N, classes)`, the network's own last. labels: `(N,)`."""

    artifact: Artifact
    features: dict[str, NDArray[np.float32]]
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]

    @classmethod
    def record(cls, path: Path) -> Population:
        """What the artifact's network sees of the test images."""
        artifact = Artifact.open(path)
        data = Path(os.environ.get("EXITIFY_DATA", "../shared/data")) / "cifar10.npz"
        samples = load_samples(f"{data}#test", artifact.manifest.input, classes=artifact.plan.classes)
        session = Session(artifact, profile="none", threads=2)
        parts = [session.record(x) for x, _ in samples.batches(500)]
        names = artifact.plan.exit_names
        logits = np.stack([np.concatenate([part.logits[name] for part in parts]) for name in names])
        features = {name: np.concatenate([part.features[name] for part in parts]) for name in names if name != FINAL}
        return cls(artifact, features, logits, samples.labels)

    def rows(self, rows: NDArray[np.integer]) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
        """Features by exit and the network's own logits of these."""
        return [array[rows] for array in self.features.values()], self.logits[-1, rows]

    def calibrated(self, rows: NDArray[np.integer], settle: Callable[[Outputs], Settings]) -> Artifact:
        """The artifact with a profile `default` and a memory, both of these images alone."""
        settings = settle(Outputs(self.logits[:, rows], self.labels[rows]))
        exits = exit_settings(self.artifact.plan, settings.thresholds, settings.temperatures)
        profile = Profile(self.artifact.manifest.model_id, "top1", exits, float(settings.temperatures[-1]), "", settings.promise, "recorded", "")
        features = {name: array[rows].astype(np.float16) for name, array in self.features.items()}
        return self.artifact.with_profile("default", profile).with_memory(remember(features, self.logits[-1, rows], self.labels[rows], 0))


@dataclass(frozen=True)
class Judged:
    """What heads and thresholds make of some images. cost: Mean, in full networks."""

    accuracy: float
    differs: float
    cost: float


def judged(factory: Factory, ruling: Ruling, population: Population, rows: NDArray[np.integer]) -> Judged:
    """Answers to these images, none learnt from."""
    answers, outputs = factory.answers(ruling.heads, ruling.thresholds, population.rows(rows))
    differs, cost = judge(factory.searchable(outputs, disagreement_of(outputs, smooth=False)), ruling.thresholds)
    return Judged(float((answers == population.labels[rows]).mean()), differs, cost)


class Device:
    """A learner over recorded images. differed: Answers other than the network's. versions: What was in use, from which answer on."""

    def __init__(self, population: Population, artifact: Artifact, how: Learning, *, times: SegmentTimes | None = None, seed: int = 0) -> None:
        self.artifact = artifact
        self.happened: list[tuple[int, Happening]] = []
        self.learner = Learner(
            artifact, "default", how, times=times, seed=seed, happened=lambda what: self.happened.append((self.learner.answers, what))
        )
        self.differed = self.audited = 0
        self.versions: list[tuple[int, Ruling]] = [(0, self.learner.in_use)]
        self.names, self.features, self.final = list(population.features), list(population.features.values()), population.logits[-1]

    def see(self, rows: Iterable[int]) -> None:
        """Answer for these images one after the other, and learn."""
        for row in rows:
            audit = self.learner.wants_audit()
            self.take(self.trace([array[row] for array in self.features], self.final[row], to_end=audit), audited=audit)

    def take(self, trace: Trace, *, audited: bool) -> None:
        """Learn from a run."""
        self.audited += audited
        if trace.full is not None:
            self.differed += trace.answer.label != int(trace.full.argmax())
        changed = self.learner.observe(trace, audited=audited)
        if review_now(self.learner) or changed:
            self.versions.append((self.learner.answers, self.learner.in_use))

    def trace(self, features: list[NDArray[np.float32]], full: NDArray[np.float32], *, to_end: bool) -> Trace:
        """What `Session.trace` gives, by its rules."""
        ruling, temperatures = self.learner.in_use, self.learner.factory.temperatures
        visits, answer = [], None
        for name, z, head, threshold, temperature in zip(self.names, features, ruling.heads, ruling.thresholds, temperatures):
            if threshold == NEVER and not to_end:
                continue
            logits = head.weight @ z + head.bias
            scaled = logits / np.float32(temperature)
            score = 1.0 / float(np.exp(scaled - scaled.max()).sum())
            visits.append(Visit(name, logits, z, score))
            if answer is None and score >= threshold:
                answer = Answer(int(logits.argmax()), name, logits, float(temperature), 0, 0.0, ())
                if not to_end:
                    return Trace(answer, tuple(visits), None)
        return Trace(answer or Answer(int(full.argmax()), FINAL, full, float(temperatures[-1]), 0, 0.0, ()), tuple(visits), full)
